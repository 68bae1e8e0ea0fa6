"""What a KV cache sheds: key channels (ThinK) and entries of each token (Mustafar)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_prune.kv.cache import MustafarCache, ThinKCache, enable_kv_pruning
    from rag_prune.kv.config import KVPruneConfig
    from rag_prune.kv.masks import calibrate_masks
    from rag_prune.kv.presses import ThinKPress
    from rag_prune.kv.snapkv import SnapKV

__all__ = [
    "KVPruneConfig",
    "MustafarCache",
    "SnapKV",
    "ThinKCache",
    "ThinKPress",
    "calibrate_masks",
    "enable_kv_pruning",
]

_WHERE = {
    "KVPruneConfig": "config",
    "MustafarCache": "cache",
    "SnapKV": "snapkv",
    "ThinKCache": "cache",
    "ThinKPress": "presses",
    "calibrate_masks": "masks",
    "enable_kv_pruning": "cache",
}


def __getattr__(name: str) -> Any:
    """Import the public names when first asked for: the arithmetic needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'rag_prune.kv' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"rag_prune.kv.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
