"""LlamaIndex: a node post-processor, between a retriever and what writes the answer.

    prune = PruningPostprocessor(top_k=3)
    index.as_query_engine(node_postprocessors=[prune])
    prune.postprocess_nodes(retriever.retrieve(question), query_str=question)

Nodes come back as new objects, best first, their text cut to the sentences that help and their
score the pruner's relevance; those with nothing left, such as images without text, are missing.
Id, relationships and all else stay. The text is the node's own, without its metadata; what metadata
gains is said in `documents.py`, and neither the language model nor an embedding is shown it.
"""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import ConfigDict, PrivateAttr, model_validator

from prune_core.errors import InputError
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PassageLike, PrunedPassage
from rag_prune.integrations.documents import as_passage, load_tokenizer, new_metadata


class PruningPostprocessor(BaseNodePostprocessor):
    """Prunes and ranks retrieved nodes.

    The first three fields are those of `ContextPruner.from_pretrained` (`model` its first one), the
    others those of `ContextPruner.prune`, with `tokenizer` as the folder or hub name of a
    transformers tokenizer: so `to_dict` holds all that `from_dict` needs. The async forms run in a
    thread.

    Raises:
        ValidationError: (pydantic's, a ValueError) an unknown field or method, two budgets, or one
            outside its range.
        CheckpointError: A model or tokenizer that cannot be loaded.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    method: str | None = None
    device: str | None = None
    threshold: float | None = None
    keep_ratio: float | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    top_k: int | None = None
    reorder: bool = True

    _pruner: ContextPruner = PrivateAttr()
    _tokenizer: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _load(self) -> Self:
        self._pruner = ContextPruner.from_pretrained(
            self.model, method=self.method, device=self.device
        )
        if self.tokenizer is not None:
            self._tokenizer = load_tokenizer(self.tokenizer)
        self._prune("?", [])  # checks the budget; without nodes no model is called
        return self

    @classmethod
    def class_name(cls) -> str:
        return "PruningPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError(
                "Pruning needs the question: call postprocess_nodes(nodes, query_str=…), or put "
                "this post-processor into a query engine."
            )
        return self._prune(query_bundle.query_str, nodes)

    def _prune(self, question: str, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        result = self._pruner.prune(
            question,
            [_passage(node) for node in nodes],
            threshold=self.threshold,
            keep_ratio=self.keep_ratio,
            max_tokens=self.max_tokens,
            tokenizer=self._tokenizer,
            top_k=self.top_k,
            reorder=self.reorder,
        )
        return [_cut(nodes[passage.index], passage) for passage in result.remaining]


def _passage(found: NodeWithScore) -> PassageLike:
    if not isinstance(found, NodeWithScore):
        raise InputError(
            f"A node must be a NodeWithScore, got {type(found).__name__}: put NodeWithScore(node=…)"
            " around it."
        )
    return as_passage(found.node.get_content(MetadataMode.NONE), found.node.metadata)


def _cut(found: NodeWithScore, passage: PrunedPassage) -> NodeWithScore:
    node, added = found.node, new_metadata(found.node.get_content(MetadataMode.NONE), passage)
    # LlamaIndex writes metadata into prompts, unless a node excludes the key.
    cut = node.model_copy(
        update={
            "metadata": node.metadata | added,
            "excluded_llm_metadata_keys": _union(node.excluded_llm_metadata_keys, added),
            "excluded_embed_metadata_keys": _union(node.excluded_embed_metadata_keys, added),
        }
    )
    cut.set_content(passage.text)
    return found.model_copy(update={"node": cut, "score": passage.relevance})


def _union(keys: list[str], more: dict[str, Any]) -> list[str]:
    return [*dict.fromkeys([*keys, *more])]
