"""What a network sheds: weights, neurons, KV groups and layers that do little."""

from typing import TYPE_CHECKING, Any

from prune_core.registry import Method, Registry

if TYPE_CHECKING:
    from model_prune.core.calibration import Calibration
    from model_prune.method import Method as PruningMethod
    from model_prune.plan import Plan
    from model_prune.prune import prune_model

__all__ = ["METHODS", "Calibration", "Plan", "load_method", "prune_model"]

_WHERE = {
    "Calibration": "model_prune.core.calibration",
    "Plan": "model_prune.plan",
    "prune_model": "model_prune.prune",
}

METHODS = Registry(
    "model_prune",
    "weight-pruning method",
    [
        Method(
            "random",
            "model_prune.methods.random:Random",
            family="baseline",
            paper="baseline: random weights or units",
            needs="nothing",
            cost="none",
        ),
        Method(
            "magnitude",
            "model_prune.methods.magnitude:Magnitude",
            family="weights",
            paper="Learning both weights and connections for efficient neural networks",
            year=2015,
            arxiv="1506.02626",
            needs="nothing",
            cost="reading the weights",
        ),
        Method(
            "wanda",
            "model_prune.methods.wanda:Wanda",
            family="weights",
            paper="A simple and effective pruning approach for large language models (Wanda)",
            year=2023,
            arxiv="2306.11695",
            needs="calibration text",
            cost="two forward passes, or one (staged)",
        ),
        Method(
            "sparsegpt",
            "model_prune.methods.sparsegpt:SparseGPT",
            family="weights",
            paper="SparseGPT: massive language models can be accurately pruned in one-shot",
            year=2023,
            arxiv="2301.00774",
            needs="calibration text",
            cost="two forward passes, or one (staged), and a sweep of every matrix",
        ),
        Method(
            "ria",
            "model_prune.methods.ria:RIA",
            family="weights",
            paper="Plug-and-play: an efficient post-training pruning method for LLMs (RIA)",
            year=2024,
            needs="calibration text",
            cost="two forward passes, or one (staged)",
        ),
        Method(
            "dsnot",
            "model_prune.methods.dsnot:DSnoT",
            family="weights",
            paper="Dynamic sparse no training (DSnoT)",
            year=2023,
            arxiv="2310.08915",
            needs="calibration text",
            cost="two forward passes",
        ),
        Method(
            "owl",
            "model_prune.methods.owl:OWL",
            family="weights",
            paper="Outlier weighed layerwise sparsity (OWL)",
            year=2023,
            arxiv="2310.05175",
            needs="calibration text",
            cost="one forward pass more than the method that prunes",
        ),
        Method(
            "icbs",
            "model_prune.methods.icbs:ICBS",
            family="weights",
            paper="Scalable iterative pruning of large language and vision models using block "
            "coordinate descent (iCBS)",
            year=2024,
            arxiv="2411.17796",
            needs="calibration text; the whole model and its gradients in memory",
            cost="20 steps of three to seven passes over 16 windows, two of them backward",
        ),
        Method(
            "flap",
            "model_prune.methods.flap:FLAP",
            family="units",
            paper="Fluctuation-based adaptive structured pruning for large language models (FLAP)",
            year=2023,
            arxiv="2312.11983",
            needs="calibration text",
            cost="one forward pass",
        ),
        Method(
            "llm_pruner",
            "model_prune.methods.llm_pruner:LLMPruner",
            family="units",
            paper="LLM-Pruner: on the structural pruning of large language models",
            year=2023,
            arxiv="2305.11627",
            needs="calibration text; the whole model and its gradients in memory",
            cost="a forward and a backward pass over 640 tokens",
        ),
        Method(
            "amp",
            "model_prune.methods.amp:AMP",
            family="units",
            paper="Efficient LLMs with AMP: attention heads and MLP pruning",
            year=2025,
            arxiv="2504.21174",
            needs="calibration text",
            cost="one forward pass",
        ),
        Method(
            "cfsp",
            "model_prune.methods.cfsp:CFSP",
            family="units",
            paper="CFSP: an efficient structured pruning framework for LLMs with coarse-to-fine "
            "activation information",
            year=2024,
            arxiv="2409.13199",
            needs="calibration text",
            cost="one forward pass",
        ),
        Method(
            "adapt_pruner",
            "model_prune.methods.adapt_pruner:AdaptPruner",
            family="units",
            paper="Adapt-Pruner: adaptive structural pruning for efficient small language model "
            "training",
            year=2025,
            arxiv="2502.03460",
            needs="calibration text; the whole model and its gradients in memory",
            cost="a forward and a backward pass for each of some dozen steps",
        ),
        Method(
            "spa",
            "model_prune.methods.spa:SPA",
            family="units",
            paper="Structurally prune anything: any architecture, any framework, any time (SPA)",
            year=2024,
            arxiv="2403.18955",
            needs="calibration text, but by magnitude; the whole model and its gradients in memory",
            cost="a forward and a backward pass over 640 tokens",
        ),
        Method(
            "obspa",
            "model_prune.methods.obspa:OBSPA",
            family="units",
            paper="Structurally prune anything: any architecture, any framework, any time (OBSPA)",
            year=2024,
            arxiv="2403.18955",
            needs="calibration text",
            cost="one forward pass and a factorisation for each reader",
        ),
        Method(
            "tyr",
            "model_prune.methods.tyr:Tyr",
            family="units",
            paper="Týr-the-Pruner: structural pruning LLMs via global sparsity distribution "
            "optimization",
            year=2025,
            arxiv="2503.09657",
            needs="calibration text",
            cost="four times two forward passes, refits of every layer, and a search over 6,400 "
            "candidates",
        ),
        Method(
            "prunenet",
            "model_prune.methods.prunenet:PruneNet",
            family="units",
            paper="You only prune once: designing calibration-free model compression with policy "
            "learning (PruneNet)",
            year=2025,
            arxiv="2501.15296",
            needs="nothing",
            cost="20 episodes of some decompositions of a hidden × hidden matrix a layer",
        ),
        Method(
            "angle",
            "model_prune.methods.angle:Angle",
            family="layers",
            paper="The unreasonable ineffectiveness of the deeper layers; the pruning half of "
            "Self-data distillation",
            year=2024,
            arxiv="2403.17887",
            needs="calibration text",
            cost="one forward pass",
        ),
        Method(
            "shortgpt",
            "model_prune.methods.shortgpt:ShortGPT",
            family="layers",
            paper="ShortGPT: layers in large language models are more redundant than you expect",
            year=2024,
            arxiv="2403.03853",
            needs="calibration text",
            cost="one forward pass",
        ),
        Method(
            "premoe",
            "model_prune.methods.premoe:PreMoe",
            family="experts",
            paper="PreMoe: lightening MoEs on constrained memory by expert pruning and retrieval",
            year=2025,
            arxiv="2505.17639",
            needs="calibration text of the task; a mixture of experts",
            cost="one forward pass",
        ),
    ],
)


def load_method(name: str, **settings: Any) -> "PruningMethod":
    """A method by its name in METHODS, with its settings; nothing of a model is read.

    Raises UnknownName for a name that is not in the table, InputError for a setting that the
    method does not have or refuses.
    """
    method: PruningMethod = METHODS.build(name, settings)
    return method


def __getattr__(name: str) -> Any:
    """Import the public names when first asked for, so that this package imports no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'model_prune' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
