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
