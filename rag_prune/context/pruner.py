"""`ContextPruner`: prune the passages of one question, of many, or of a stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from prune_core.errors import CheckpointError, InputError
from rag_prune.context.result import Budget, PassageLike, PrunedContext, Request, Scores

DEFAULT_THRESHOLD = 0.1


class Scorer(Protocol):
    """Whatever scores passages and their sentences: the engines, the baselines, yours."""

    name: str

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request, one `Scores` a passage, in order; no request may sway another."""
        ...


class ContextPruner:
    """Drops the sentences that do not help to answer and ranks passages; the rest stays verbatim.

    pruner = ContextPruner.from_pretrained()
    result = pruner.prune("Who found radium?", passages)
    result.text, result.passages[0].kept, result.recut(keep_ratio=0.3)
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        *,
        method: str | None = None,
        device: str | None = None,
    ) -> ContextPruner:
        """Load a pruner.

        Args:
            name_or_folder: A checkpoint folder or a hub name; the bundled default without one.
            method: A name from `prunekit methods`: one of the checkpoint's engines (`provence`,
                `late`, `both`) or a baseline; the checkpoint's own choice by default.
            device: Where the network runs; a GPU when there is one by default.

        Raises:
            CheckpointError: No such folder, weights that are not safetensors, remote code.
            UnknownName: An unknown method.
        """
        from rag_prune import METHODS

        if method is not None and METHODS.row(method).family == "heads":
            raise InputError(
                f"'{method}' prunes a language model's heads, not a context: see "
                f"{METHODS.row(method).module}."
            )
        if method is not None and METHODS.row(method).family == "baseline":
            model = {} if name_or_folder is None else {"model": str(name_or_folder)}
            if model and method != "embedding":
                raise InputError(
                    f"The baseline '{method}' has no model, so '{name_or_folder}' must go."
                )
            return cls(METHODS.get(method)(**model))

        import torch

        from rag_prune.context.checkpoints import load

        checkpoint = load(_folder(name_or_folder))
        checkpoint.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(METHODS.get(method or checkpoint.settings.method)(checkpoint))

    def prune(
        self,
        question: str,
        passages: Sequence[PassageLike],
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        top_k: int | None = None,
        reorder: bool = True,
    ) -> PrunedContext:
        """Keep the sentences that help to answer the question.

        Args:
            question: Used as given.
            passages: Strings, or mappings with `text` and maybe `title`; never edited. An exact
                copy of an earlier passage is dropped.
            threshold: Keep sentences whose probability is at least this, in [0, 1]; 0.1 when no
                other budget is given.
            keep_ratio: Keep the best sentences up to this share of all characters, in [0, 1].
            max_tokens: Keep the best sentences such that the text has at most this many tokens of
                `tokenizer`.
            top_k: Keep at most this many passages, the most relevant ones.
            reorder: Put the best passage first in `text`.

        Raises:
            InputError: An empty question, a passage that is no text, two budgets, a budget outside
                its range.
        """
        budget = _budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)
        [result] = self._prune([(question, passages)], budget, reorder)
        return result

    def prune_many(
        self,
        requests: Iterable[tuple[str, Sequence[PassageLike]]],
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        top_k: int | None = None,
        reorder: bool = True,
    ) -> list[PrunedContext]:
        """`prune` for many (question, passages) pairs: batches are built across questions."""
        budget = _budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)
        return self._prune(requests, budget, reorder)

    def stream(
        self,
        requests: Iterable[tuple[str, Sequence[PassageLike]]],
        *,
        batch_size: int = 32,
        **options: Any,
    ) -> Iterator[PrunedContext]:
        """`prune_many` over any iterable: results in order, `batch_size` requests in memory.

        `options` are those of `prune`.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1 request, got {batch_size}: try 32.")
        iterator = iter(requests)
        chunks = iter(lambda: list(islice(iterator, batch_size)), [])
        return (result for chunk in chunks for result in self.prune_many(chunk, **options))

    def _prune(
        self,
        requests: Iterable[tuple[str, Sequence[PassageLike]]],
        budget: Budget,
        reorder: bool,
    ) -> list[PrunedContext]:
        read = [Request.read(question, passages) for question, passages in requests]
        scored = self.scorer.score(read) if read else []
        return [
            PrunedContext.from_scores(
                request, scores, budget, method=self.scorer.name, reorder=reorder
            )
            for request, scores in zip(read, scored, strict=True)
        ]


def _folder(name_or_folder: str | Path | None) -> Path:
    """The bundled folder, a local one, or a hub's files fetched to the local cache."""
    if name_or_folder is None:
        return Path(__file__).parent / "default"
    folder = Path(name_or_folder)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_folder)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name_or_folder), allow_patterns=["*.json", "*.safetensors", "*.txt"]
            )
        )
    except Exception as error:  # the hub client has many errors; each means that there is no model
        raise CheckpointError(
            f"'{name_or_folder}' is neither a folder here nor a model that could be fetched from "
            f"the hub: {error}"
        ) from error


def _budget(
    threshold: float | None,
    keep_ratio: float | None,
    max_tokens: int | None,
    tokenizer: Any,
    top_k: int | None,
) -> Budget:
    """The budget that was given, or the default threshold; checked before any model is called."""
    if threshold is None and keep_ratio is None and max_tokens is None:
        threshold = DEFAULT_THRESHOLD
    return Budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)
