"""What a training set sheds: rows that teach little, or nothing that is not taught already."""

from typing import TYPE_CHECKING, Any

from prune_core.registry import Method, Registry

if TYPE_CHECKING:
    from data_prune.budget import Budget
    from data_prune.engine import Local, Ray
    from data_prune.selector import select
    from data_prune.selection import Selection

__all__ = ["METHODS", "Budget", "Local", "Ray", "Selection", "select"]

_WHERE = {
    "Budget": "data_prune.budget",
    "Local": "data_prune.engine",
    "Ray": "data_prune.engine",
    "Selection": "data_prune.selection",
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
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'data_prune' has no attribute '{name}'")
