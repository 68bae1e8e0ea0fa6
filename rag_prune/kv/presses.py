"""ThinK as a context manager with kvpress's arguments, on caches whose bytes are really fewer.

with ThinKPress(key_channel_compression_ratio=0.5)(model):
    model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from rag_prune.kv.cache import PrunedCache, enable_kv_pruning
from rag_prune.kv.config import KVPruneConfig


@dataclass(frozen=True)
class ThinKPress:
    """Prune the key channels of every cache that is filled inside the block.

    key_channel_compression_ratio: share of the channels that is dropped, in [0, 1).
    window_size: newest queries of the prompt that score the channels.

    kvpress zeroes the channels of the whole prompt and keeps those of generated tokens, and saves
    no memory; here dropped entries are not stored, the newest tokens are whole (`KVPruneConfig`'s
    `recent` and `sinks`), and generated tokens are pruned when they leave this window.
    """

    key_channel_compression_ratio: float = 0.0
    window_size: int = 32

    @property
    def compression_ratio(self) -> float:
        """The share of the whole cache that is dropped: keys are half of it."""
        return self.key_channel_compression_ratio / 2

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Any]:
        """Give `model` pruned caches inside the block.

        An empty cache that is passed in becomes a pruned one; where none is passed, one is made.
        Caches filled here may be used after the block, so the model keeps the attention that reads
        them; with other caches that is "sdpa". Raises InputError for a model whose cache cannot be
        pruned.
        """
        config = KVPruneConfig(
            key_ratio=self.key_channel_compression_ratio, obs_window=self.window_size
        )
        new_cache = enable_kv_pruning(model, config)

        def give(_: Any, args: Any, kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if cache is None:
                if kwargs.get("use_cache", True):
                    kwargs["past_key_values"] = new_cache()
            elif not isinstance(cache, PrunedCache) and not cache.get_seq_length():
                _turn(cache, new_cache())
            return args, kwargs

        hook = model.base_model.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield model
        finally:
            hook.remove()


def _turn(cache: Cache, pruned: PrunedCache) -> None:
    """Make an empty cache a pruned one, so that whoever passed it in holds the pruned one."""
    cache.__class__ = type(pruned)
    cache.__dict__.clear()
    cache.__dict__.update(pruned.__dict__)
