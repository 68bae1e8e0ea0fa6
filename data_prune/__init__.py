"""What a training set sheds: rows that teach little, or nothing that is not taught already."""

from typing import TYPE_CHECKING, Any

from prune_core.registry import Method, Registry

if TYPE_CHECKING:
    from data_prune.budget import Budget
    from data_prune.costs import Estimate, estimate
    from data_prune.engine import Local, Ray
    from data_prune.selection import Selection
    from data_prune.selector import select

__all__ = ["METHODS", "Budget", "Estimate", "Local", "Ray", "Selection", "estimate", "select"]

_WHERE = {
    "Budget": "data_prune.budget",
    "Estimate": "data_prune.costs",
    "Local": "data_prune.engine",
    "Ray": "data_prune.engine",
    "Selection": "data_prune.selection",
    "estimate": "data_prune.costs",
    "select": "data_prune.selector",
}

METHODS = Registry(
    "data_prune",
    "data metric",
    [
        Method(
            "random",
            "data_prune.metrics.random:Random",
            family="baseline",
            paper="baseline: random rows",
            needs="nothing",
            cost="none",
        ),
        Method(
            "imported",
            "data_prune.metrics.imported:Imported",
            family="baseline",
            paper="scores made elsewhere, such as memorization (Feldman and Zhang)",
            year=2020,
            arxiv="2008.03703",
            needs="scores",
            cost="none",
        ),
        Method(
            "prototypes",
            "data_prune.metrics.prototypes:Prototypes",
            family="embeddings",
            paper="Beyond neural scaling laws: beating power law scaling via data pruning",
            year=2022,
            arxiv="2206.14486",
            needs="embeddings",
            cost="an embedding of each row, and k-means",
        ),
        Method(
            "semdedup",
            "data_prune.metrics.semdedup:SemDeDup",
            family="embeddings",
            paper="SemDeDup: data-efficient learning at web-scale through semantic deduplication",
            year=2023,
            arxiv="2303.09540",
            needs="embeddings",
            cost="an embedding of each row, k-means, and cosines within clusters",
        ),
        Method(
            "d4",
            "data_prune.metrics.d4:D4",
            family="embeddings",
            paper="D4: improving LLM pretraining via document de-duplication and diversification",
            year=2023,
            arxiv="2308.12284",
            needs="embeddings",
            cost="an embedding of each row, k-means twice, and cosines within clusters",
        ),
        Method(
            "kcenter",
            "data_prune.metrics.kcenter:KCenter",
            family="embeddings",
            paper="Active learning for convolutional neural networks: a core-set approach",
            year=2018,
            arxiv="1708.00489",
            needs="embeddings",
            cost="an embedding of each row, and cosines of each row kept with all",
        ),
        Method(
            "facility_location",
            "data_prune.metrics.facility_location:FacilityLocation",
            family="embeddings",
            paper="Submodularity in data subset selection and active learning (facility location)",
            year=2015,
            needs="embeddings",
            cost="an embedding of each row, and its nearest rows",
        ),
        Method(
            "dsir",
            "data_prune.metrics.dsir:DSIR",
            family="target",
            paper="Data selection for language models via importance resampling (DSIR)",
            year=2023,
            arxiv="2302.03169",
            needs="target rows",
            cost="no model call: the words of each row, counted",
        ),
        Method(
            "rds",
            "data_prune.metrics.rds:RDS",
            family="target",
            paper="Large-scale data selection for instruction tuning (RDS+)",
            year=2025,
            arxiv="2503.01807",
            needs="embeddings, target rows",
            cost="an embedding of each row and target, and cosines between them",
        ),
        Method(
            "ifd",
            "data_prune.metrics.ifd:IFD",
            family="language model",
            paper="From quantity to quality: boosting LLM performance with self-guided data "
            "selection for instruction tuning (IFD)",
            year=2023,
            arxiv="2308.12032",
            needs="a language model's losses; rows with a prompt and a response",
            cost="two forward passes of each response and one of its prompt",
        ),
        Method(
            "paser",
            "data_prune.metrics.paser:PASER",
            family="language model",
            paper="PASER: post-training data selection for efficient pruned large language model "
            "recovery",
            year=2025,
            arxiv="2502.12594",
            needs="embeddings; what a pruned model lost on each row, or both models",
            cost="an embedding of each prompt; both models' pass over each row, or over a sample",
        ),
        Method(
            "el2n",
            "data_prune.metrics.el2n:EL2N",
            family="training log",
            paper="Deep learning on a data diet: finding important examples early in training",
            year=2021,
            arxiv="2107.07075",
            needs="a training log",
            cost="the first epochs of a training run, or of several",
        ),
        Method(
            "grand",
            "data_prune.metrics.grand:GraNd",
            family="training log",
            paper="Deep learning on a data diet: finding important examples early in training",
            year=2021,
            arxiv="2107.07075",
            needs="a training log with gradient norms",
            cost="the first epochs of a training run, or of several, and a gradient of each row",
        ),
        Method(
            "forgetting",
            "data_prune.metrics.forgetting:Forgetting",
            family="training log",
            paper="An empirical study of example forgetting during deep neural network learning",
            year=2019,
            arxiv="1812.05159",
            needs="a training log",
            cost="a training run",
        ),
        Method(
            "aum",
            "data_prune.metrics.aum:AUM",
            family="training log",
            paper="Identifying mislabeled data using the area under the margin ranking (AUM)",
            year=2020,
            arxiv="2001.10528",
            needs="a training log",
            cost="a training run, or half of one",
        ),
        Method(
            "entropy",
            "data_prune.metrics.entropy:Entropy",
            family="training log",
            paper="Selection via proxy: efficient data selection for deep learning",
            year=2020,
            arxiv="1906.11829",
            needs="a training log",
            cost="a training run of a small proxy",
        ),
        Method(
            "ccs",
            "data_prune.metrics.ccs:CCS",
            family="training log",
            paper="Coverage-centric coreset selection for high pruning rates (CCS)",
            year=2023,
            arxiv="2210.15809",
            needs="what its base needs: a training log by default",
            cost="that of its base",
        ),
        Method(
            "kd_data_pruning",
            "data_prune.distill:Distillation",
            family="training",
            paper="Distilling the knowledge in data pruning",
            year=2024,
            arxiv="2403.07854",
            needs="a teacher: the model that saw all rows, or the unpruned one",
            cost="a forward pass of the teacher a step",
        ),
        Method(
            "self_distill",
            "data_prune.self_distill:SelfDistill",
            family="training",
            paper="Self-data distillation for recovering quality in pruned large language models",
            year=2024,
            arxiv="2410.09982",
            needs="the model before pruning; rows with a prompt and a response",
            cost="one generation a row",
        ),
    ],
)


def __getattr__(name: str) -> Any:
    """Import the public names when first asked for, so that this package imports little."""
    if name not in _WHERE:
        raise AttributeError(f"module 'data_prune' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
