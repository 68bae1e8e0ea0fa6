"""`ContextPruner`: prune the passages of one question, of many, or of a stream."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from prune_core.errors import CheckpointError, InputError
from rag_prune.context.result import Budget, PassageLike, PrunedContext, Request, Scores

DEFAULT_THRESHOLD = 0.1
TOGETHER = 64  # requests of `prune_many` that share batches; more of them save no more padding

# Requests as read, and what scores them.
Begun = tuple[list[Request], Callable[[], list[list[Scores]]]]


class Scorer(Protocol):
    """Whatever scores passages and their sentences: the engines, the baselines, yours.

    One that also has `begin_score(requests)`, which does what can be done ahead and returns a
    function that does the rest, is asked for it in a thread while the requests before are scored.
    """

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
        precision: Literal["float32", "fast"] = "float32",
        **options: Any,
    ) -> ContextPruner:
        """Load a pruner.

        Args:
            name_or_folder: A checkpoint folder or a hub name; the bundled default without one.
                A release of Provence, XProvence, OpenProvence or LLMLingua-2 is known by its
                config.json and run by our own code (docs/checkpoints.md).
            method: A name from `prunekit methods`: one of the checkpoint's engines (`provence`,
                `late`, `both`) or a baseline; the checkpoint's own choice by default.
            device: Where the network runs; a GPU when there is one by default.
            precision: What the network multiplies in. "fast" is bfloat16 (or float16 on a GPU
                without it) where the device multiplies it faster, and float32 elsewhere; on a CPU
                OpenVINO runs the network if it is installed. Nearly all decisions are the same, but
                scores move in their third digit, also with what else is in a batch.
            options: Of the method's class, such as `force_reserve_digit` for `llmlingua2`.

        Raises:
            CheckpointError: No such folder, weights that are not safetensors or not the
                family's, remote code in a checkpoint of ours.
            InputError: A precision that is neither, a method that the checkpoint is not of, a
                baseline with a model it has no use for.
            UnknownName: An unknown method.
        """
        from rag_prune import METHODS

        if precision not in ("float32", "fast"):
            raise InputError(f"precision must be 'float32' or 'fast', got {precision!r}.")
        elsewhere = {"heads": "heads", "cache": "KV cache"}
        if method is not None and METHODS.row(method).family in elsewhere:
            raise InputError(
                f"'{method}' prunes a language model's {elsewhere[METHODS.row(method).family]}, "
                f"not a context: see {METHODS.row(method).module}."
            )
        if method is not None and METHODS.row(method).family == "baseline":
            model = {} if name_or_folder is None else {"model": str(name_or_folder)}
            if model and method != "embedding":
                raise InputError(
                    f"The baseline '{method}' has no model, so '{name_or_folder}' must go."
                )
            return cls(METHODS.get(method)(**model, **options))

        import torch

        from rag_prune.context.checkpoints import load, read_config
        from rag_prune.context.model import fast_dtype
        from rag_prune.context.released import family

        folder = checkpoint_folder(name_or_folder)
        config = read_config(folder)
        released = family(config, str(name_or_folder), method)
        if method is not None and (
            method != released if released else METHODS.row(method).family == "released"
        ):
            kind = f"of '{released}'" if released else "none of a released family"
            raise InputError(
                f"The checkpoint in {folder} is {kind}, so method='{method}' cannot run it: leave "
                "the method out."
            )
        checkpoint: Any
        if released:
            engine = METHODS.get(released)
            checkpoint = engine.read_release(folder, config)
        else:
            checkpoint = load(folder)
            engine = METHODS.get(method or checkpoint.settings.method)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        checkpoint.model.to(place)
        if precision == "fast" and place.type == "cpu" and not released and find_spec("openvino"):
            from rag_prune.context.openvino import run_in_openvino

            run_in_openvino(checkpoint.model)
        elif precision == "fast":
            checkpoint = replace(checkpoint, multiply_in=fast_dtype(place))
        return cls(engine(checkpoint, **options))

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
            threshold: Keep sentences whose probability is at least this, in [0, 1]; when no other
                budget is given 0.1, or what a released checkpoint names as its own.
            keep_ratio: Keep the best sentences up to this share of all characters, in [0, 1].
            max_tokens: Keep the best sentences such that the text has at most this many tokens of
                `tokenizer`.
            top_k: Keep at most this many passages, the most relevant ones.
            reorder: Put the best passage first in `text`.

        Raises:
            InputError: An empty question, a passage that is no text, two budgets, a budget outside
                its range.
        """
        budget = self._budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)
        [result] = self._finish(self._begin([(question, passages)]), budget, reorder)
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
        budget = self._budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)
        return list(self._prune(requests, TOGETHER, budget, reorder))

    def stream(
        self,
        requests: Iterable[tuple[str, Sequence[PassageLike]]],
        *,
        batch_size: int = 32,
        reorder: bool = True,
        **options: Any,
    ) -> Iterator[PrunedContext]:
        """`prune_many` over any iterable: results in order, two batches of requests in memory.

        The next `batch_size` requests are split and tokenised in a thread while the network reads
        these. `options` are the budgets of `prune`.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1 request, got {batch_size}: try 32.")
        return self._prune(requests, batch_size, self._budget(**options), reorder)

    def _budget(
        self,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        top_k: int | None = None,
    ) -> Budget:
        """The budget that was given, or the default threshold; checked before a model is called."""
        if threshold is None and keep_ratio is None and max_tokens is None:
            threshold = getattr(self.scorer, "default_threshold", DEFAULT_THRESHOLD)
        return Budget(threshold, keep_ratio, max_tokens, tokenizer, top_k)

    def _prune(
        self,
        requests: Iterable[tuple[str, Sequence[PassageLike]]],
        together: int,
        budget: Budget,
        reorder: bool,
    ) -> Iterator[PrunedContext]:
        """Results in order; the requests are taken in the caller's thread, one batch ahead."""
        iterator = iter(requests)
        begun: deque[Future[Begun]] = deque()
        with ThreadPoolExecutor(1, "prunekit-ahead") as thread:
            for batch in iter(lambda: list(islice(iterator, together)), []):
                begun.append(thread.submit(self._begin, batch))
                if len(begun) == 2:
                    yield from self._finish(begun.popleft().result(), budget, reorder)
            while begun:
                yield from self._finish(begun.popleft().result(), budget, reorder)

    def _begin(self, requests: Iterable[tuple[str, Sequence[PassageLike]]]) -> Begun:
        read = [Request.read(question, passages) for question, passages in requests]
        begin = getattr(self.scorer, "begin_score", None)
        return read, begin(read) if begin else partial(self.scorer.score, read)

    def _finish(self, begun: Begun, budget: Budget, reorder: bool) -> list[PrunedContext]:
        read, score = begun
        return [
            PrunedContext.from_scores(
                request, scores, budget, method=self.scorer.name, reorder=reorder
            )
            for request, scores in zip(read, score(), strict=True)
        ]


def checkpoint_folder(name_or_folder: str | Path | None) -> Path:
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
