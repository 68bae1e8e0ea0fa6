"""What one request sheds: sentences that do not help to answer, heads, entries of its KV cache."""

from typing import TYPE_CHECKING, Any

from prune_core.registry import Method, Registry

if TYPE_CHECKING:
    from rag_prune.context.pruner import ContextPruner
    from rag_prune.context.result import PrunedContext

__all__ = ["METHODS", "ContextPruner", "PrunedContext"]

_WHERE = {
    "ContextPruner": "rag_prune.context.pruner",
    "PrunedContext": "rag_prune.context.result",
}

METHODS = Registry(
    "rag_prune",
    "pruning method",
    [
        Method(
            "provence",
            "rag_prune.context.cross:Cross",
            family="context",
            paper="Provence: efficient and robust context pruning for RAG",
            year=2025,
            arxiv="2501.16214",
            needs="a trained checkpoint; one is bundled",
            cost="one encoder pass a passage and question",
        ),
        Method(
            "late",
            "rag_prune.context.late:Late",
            family="context",
            paper="ours; late interaction over sentences, after ColBERT",
            year=2020,
            arxiv="2004.12832",
            needs="a trained checkpoint; one is bundled",
            cost="one encoder pass a passage, once; one short pass a question",
        ),
        Method(
            "both",
            "rag_prune.context.both:Both",
            family="context",
            paper="ours; weighted mean of provence and late",
            needs="a trained checkpoint; one is bundled",
            cost="that of provence and of late",
        ),
        Method(
            "provence_debertav3",
            "rag_prune.context.released.provence:Provence",
            family="released",
            paper="Provence: efficient and robust context pruning for RAG",
            year=2025,
            arxiv="2501.16214",
            needs="naver's checkpoint (non-commercial), by name or folder",
            cost="one encoder pass a passage and question",
        ),
        Method(
            "xprovence",
            "rag_prune.context.released.xprovence:XProvence",
            family="released",
            paper="XProvence: zero-cost multilingual context pruning for RAG",
            year=2026,
            arxiv="2601.18886",
            needs="naver's checkpoint (non-commercial), by name or folder",
            cost="one encoder pass a passage and question",
        ),
        Method(
            "open_provence",
            "rag_prune.context.released.open_provence:OpenProvence",
            family="released",
            paper="OpenProvence, after Provence",
            year=2025,
            arxiv="2501.16214",
            needs="a checkpoint of hotchpotch's or Zilliz's (MIT), by name or folder",
            cost="one encoder pass a block of each passage and question",
        ),
        Method(
            "llmlingua2",
            "rag_prune.context.released.llmlingua2:LLMLingua2",
            family="released",
            paper="LLMLingua-2: data distillation for efficient and faithful prompt compression",
            year=2024,
            arxiv="2403.12968",
            needs="Microsoft's checkpoint, by name or folder",
            cost="one encoder pass a chunk, whatever the question",
        ),
        Method(
            "embedding",
            "rag_prune.context.baselines:Embedding",
            family="baseline",
            paper="baseline: cosine of sentence and question",
            needs="a sentence-transformers model",
            cost="one encoder pass a sentence, passage and question",
        ),
        Method(
            "bm25",
            "rag_prune.context.baselines:BM25",
            family="baseline",
            paper="baseline: Okapi BM25 over sentences",
            year=1994,
            needs="nothing",
            cost="no model call",
        ),
        Method(
            "lead",
            "rag_prune.context.baselines:Lead",
            family="baseline",
            paper="baseline: first sentences",
            needs="nothing",
            cost="no model call",
        ),
        Method(
            "random",
            "rag_prune.context.baselines:Random",
            family="baseline",
            paper="baseline: random sentences",
            needs="nothing",
            cost="no model call",
        ),
        Method(
            "keep_all",
            "rag_prune.context.baselines:KeepAll",
            family="baseline",
            paper="baseline: no pruning",
            needs="nothing",
            cost="no model call",
        ),
        Method(
            "ph3",
            "rag_prune.heads:PH3",
            family="heads",
            paper="Cutting off the head ends the conflict (PH3)",
            year=2024,
            arxiv="2402.18154",
            needs="a causal language model like Llama, Mistral or Qwen; a few dozen conflicts",
            cost="two forward passes a conflict, once; nothing a request",
        ),
        Method(
            "think",
            "rag_prune.kv.cache:ThinKCache",
            family="cache",
            paper="ThinK: thinner key cache by query-driven pruning",
            year=2024,
            arxiv="2407.21018",
            needs="a causal language model with full attention",
            cost="two column norms a prompt; none with calibrated masks",
        ),
        Method(
            "mustafar",
            "rag_prune.kv.cache:MustafarCache",
            family="cache",
            paper="Mustafar: promoting unstructured sparsity for KV cache pruning",
            year=2025,
            arxiv="2505.22913",
            needs="a causal language model with full attention",
            cost="a top-k of each key and value, once",
        ),
    ],
)


def __getattr__(name: str) -> Any:
    """Import the public classes when first asked for, so that this package imports no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'rag_prune' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
