"""Haystack: a ranker that also shortens, between a retriever and a prompt.

    pipeline.add_component("prune", PruningRanker(top_k=3))
    pipeline.connect("retriever.documents", "prune.documents")
    pipeline.connect("prune.documents", "prompt.documents")

Documents come back as new objects, best first, their content cut to the sentences that help and
their score the pruner's relevance; those with nothing left, such as images without text, are
missing. Id and all else stay; what `meta` gains, and which title is read, is said in
`documents.py`. Haystack loads a saved pipeline's components only from modules it is told to trust:
`Pipeline.loads(text, allowed_modules=["rag_prune"])`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Self

from haystack import Document, component, default_from_dict, default_to_dict

from prune_core.errors import InputError
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PassageLike, PrunedPassage
from rag_prune.integrations.documents import as_passage, load_tokenizer, new_metadata


@component
class PruningRanker:
    """Prunes and ranks retrieved documents.

    The first three arguments are those of `ContextPruner.from_pretrained` (`model` its first one),
    the others those of `ContextPruner.prune`, with `tokenizer` as the folder or hub name of a
    transformers tokenizer. Model and tokenizer are loaded by `warm_up`, or by the first `run`; the
    async forms run in a thread.

    Raises:
        InputError: Two budgets, or one outside its range.
        CheckpointError: (in `warm_up`) a model or tokenizer that cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        method: str | None = None,
        device: str | None = None,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        tokenizer: str | None = None,
        top_k: int | None = None,
        reorder: bool = True,
    ) -> None:
        self.model, self.method, self.device = model, method, device
        self.tokenizer = tokenizer
        self.budget: dict[str, Any] = {
            "threshold": threshold,
            "keep_ratio": keep_ratio,
            "max_tokens": max_tokens,
            "top_k": top_k,
        }
        self.reorder = reorder
        self._pruner: ContextPruner | None = None
        self._tokenizer: Any = None
        # A budget is checked here, by a pruner that has no model to load.
        ContextPruner.from_pretrained(method="keep_all").prune_many(
            [], tokenizer=tokenizer, **self.budget
        )

    def to_dict(self) -> dict[str, Any]:
        """What a saved pipeline holds: the arguments."""
        return default_to_dict(
            self,
            model=self.model,
            method=self.method,
            device=self.device,
            tokenizer=self.tokenizer,
            reorder=self.reorder,
            **self.budget,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The component that `to_dict` told of."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model, once."""
        if self._pruner is None:
            if self.tokenizer is not None:
                self._tokenizer = load_tokenizer(self.tokenizer)
            self._pruner = ContextPruner.from_pretrained(
                self.model, method=self.method, device=self.device
            )

    async def warm_up_async(self) -> None:
        """`warm_up` in a thread, so that the event loop goes on."""
        await asyncio.to_thread(self.warm_up)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """{"documents": the pruned ones}; a `top_k` given here goes before the component's own.

        Raises:
            InputError: An empty query, what is no document, a top_k below 1.
        """
        self.warm_up()
        assert self._pruner is not None
        result = self._pruner.prune(
            query,
            [_passage(document) for document in documents],
            tokenizer=self._tokenizer,
            reorder=self.reorder,
            **(self.budget if top_k is None else {**self.budget, "top_k": top_k}),
        )
        return {"documents": [_cut(documents[p.index], p) for p in result.remaining]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """`run` in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(self.run, query, documents, top_k)


def _passage(document: Document) -> PassageLike:
    if not isinstance(document, Document):
        raise InputError(f"A document must be Haystack's, got {type(document).__name__}.")
    return as_passage(document.content or "", document.meta)


def _cut(document: Document, passage: PrunedPassage) -> Document:
    return replace(
        document,
        content=passage.text,
        meta=document.meta | new_metadata(document.content or "", passage),
        score=passage.relevance,
    )
