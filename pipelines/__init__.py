"""Where the packages meet: retrieve → prune context → answer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.rag import Answer, answer

__all__ = ["Answer", "answer"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for a model library."""
    if name not in __all__:
        raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
    from pipelines import rag

    return getattr(rag, name)
