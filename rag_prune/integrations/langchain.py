"""LangChain: one object that is a document compressor and a step of a chain.

    prune = PruningCompressor(pruner=ContextPruner.from_pretrained())
    ContextualCompressionRetriever(base_compressor=prune, base_retriever=retriever)
    {"question": RunnablePassthrough(), "documents": retriever} | prune | prompt | model

Documents come back as new objects, best first, their text cut to the sentences that help; those
with nothing left are missing. Id and metadata stay; what metadata gains, and which title is read,
is said in `documents.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, run_in_executor
from pydantic import ConfigDict, model_validator

from prune_core.errors import InputError, PruneError
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PassageLike, PrunedPassage
from rag_prune.integrations.documents import as_passage, new_metadata

Query = tuple[str, Sequence[Document]]
Input = dict[str, Any]


class PruningCompressor(BaseDocumentCompressor, RunnableSerializable[Input, list[Document]]):
    """Prunes retrieved documents; the fields besides `pruner` are those of `ContextPruner.prune`.

    As a step of a chain it takes {"question": …, "documents": […]} ("query" does as well) and
    returns the documents; a batch is pruned at once, across its questions. The async forms run in a
    thread.

    Raises:
        ValidationError: (pydantic's, a ValueError) an unknown field, two budgets, or one outside
            its range.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    pruner: ContextPruner
    threshold: float | None = None
    keep_ratio: float | None = None
    max_tokens: int | None = None
    tokenizer: Any = None
    top_k: int | None = None
    reorder: bool = True

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compress_many([])  # checks the budget; without documents no model is called
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The pruned documents of one query; `callbacks` are not used."""
        return self.compress_many([(query, documents)])[0]

    def compress_many(self, queries: Sequence[Query]) -> list[list[Document]]:
        """`compress_documents` for many (query, documents) pairs, in batches across queries."""
        results = self.pruner.prune_many(
            [(query, [_passage(d) for d in documents]) for query, documents in queries],
            threshold=self.threshold,
            keep_ratio=self.keep_ratio,
            max_tokens=self.max_tokens,
            tokenizer=self.tokenizer,
            top_k=self.top_k,
            reorder=self.reorder,
        )
        return [
            [_cut(documents[passage.index], passage) for passage in result.remaining]
            for result, (_, documents) in zip(results, queries, strict=True)
        ]

    async def acompress_many(self, queries: Sequence[Query]) -> list[list[Document]]:
        """`compress_many` in a thread, so that the event loop goes on."""
        return await run_in_executor(None, self.compress_many, queries)

    def invoke(
        self, input: Input, config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[Document]:
        return self._call_with_config(
            lambda given: self.compress_many([_query(given)])[0], input, config
        )

    def batch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        answer = self._answer_each if return_exceptions else self._answer
        return self._batch_with_config(answer, inputs, config, return_exceptions=return_exceptions)

    async def abatch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        answer = self._answer_each if return_exceptions else self._answer

        async def aanswer(inputs: list[Input]) -> list[Exception | list[Document]]:
            return await run_in_executor(None, answer, inputs)

        return await self._abatch_with_config(
            aanswer, inputs, config, return_exceptions=return_exceptions
        )

    def _answer(self, inputs: list[Input]) -> list[Exception | list[Document]]:
        return [*self.compress_many([_query(given) for given in inputs])]

    def _answer_each(self, inputs: list[Input]) -> list[Exception | list[Document]]:
        """All at once if all are good; else one by one, so that a bad one costs only itself."""
        try:
            return self._answer(inputs)
        except PruneError as error:
            if len(inputs) == 1:
                return [error]
            return [answer for given in inputs for answer in self._answer_each([given])]


def _query(given: Any) -> Query:
    """The question and documents of a chain's input."""
    if isinstance(given, Mapping) and "documents" in given:
        for name in ("question", "query"):
            if name in given:
                return given[name], given["documents"]
    found = (
        f"keys {sorted(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
    )
    raise InputError(
        f"The input must be a mapping with 'question' (or 'query') and 'documents', got {found}: "
        'put {"question": RunnablePassthrough(), "documents": retriever} before this step.'
    )


def _passage(document: Document) -> PassageLike:
    if not isinstance(document, Document):
        raise InputError(f"A document must be LangChain's, got {type(document).__name__}.")
    return as_passage(document.page_content, document.metadata)


def _cut(document: Document, passage: PrunedPassage) -> Document:
    metadata = document.metadata | new_metadata(document.page_content, passage)
    return document.model_copy(update={"page_content": passage.text, "metadata": metadata})
