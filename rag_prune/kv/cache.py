"""KV caches for transformers whose bytes are really fewer, and the attention that reads them.

    config = KVPruneConfig(method="think", key_ratio=0.5)
    new_cache = enable_kv_pruning(model, config)
    model.generate(**inputs, past_key_values=new_cache())

A cache's `update` only hands the new keys and values on; the attention function, which alone sees
the queries too, stores them and attends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from prune_core.errors import InputError
from rag_prune.kv import channels, kernels, pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.masks import load_masks, model_fingerprint
from rag_prune.kv.prefill import prefill
from rag_prune.kv.snapkv import SnapKV
from rag_prune.kv.spec import STEP, PageSpec
from rag_prune.kv.think import best_channels

IMPLEMENTATION = "prunekit_kv"
BLOCK = 16  # tokens of a page: small, since the last one is half empty on average
SLACK = 16  # tokens that `crop` can always take back, as assisted generation does


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The pages and rings of one layer; sequences of a batch share one length.

    Page j of row b is block j · B + b, so that growing appends.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self, config: KVPruneConfig, head_size: int, eviction: SnapKV | None, kept: Tensor | None
    ) -> None:
        """kept: int64 [H, kept], the static channels of this layer."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.config, self.head_size, self.eviction = config, head_size, eviction
        self.static = kept
        self.seen = 0  # tokens that came in
        self.length = 0  # tokens that are stored: fewer, if some were evicted
        self.evicted = False
        self.valid: Tensor | None = None  # of the stored tokens; None if there is no padding

    # -------------------------------------------------------------------- what transformers asks
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads = key_states.shape[:2]
        spec = PageSpec.of(
            self.config,
            head_size=self.head_size,
            block_size=BLOCK,
            itemsize=self.dtype.itemsize,
            slack=SLACK,
        )
        ring = None
        if spec.prunes:
            ring = self._zeros(self.batch, self.heads, spec.ring_slots * spec.slot_bytes)
        empty = self._zeros(0, self.heads, spec.page_bytes)
        self.store = pages.Storage(spec, self.dtype, empty, ring)
        self.kernels = kernels.choose(self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handed = key_states.view_as(key_states)
        handed.prunekit_layer = self  # type: ignore[attr-defined]  # `attention` looks for it
        return handed, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.__init__(self.config, self.head_size, self.eviction, self.static)  # type: ignore[misc]

    def offload(self) -> None:
        raise InputError("A pruned KV cache cannot be offloaded: it stays on the model's device.")

    def crop(self, max_length: int) -> None:
        """Take back the newest tokens; negative: that many of them.

        Raises InputError beyond what the ring still has whole, or into an evicted prompt.
        """
        length = self.seen + max_length if max_length < 0 else max_length
        back = self.seen - length
        if back <= 0:
            return
        if not self.is_initialized or length < 0:
            raise InputError(f"A cache of {self.seen} tokens cannot be cropped to {length}.")
        spec, stored = self.store.spec, self.length - back
        if self.evicted and stored < self.prompt:
            raise InputError(
                f"The cache cannot be cropped to {length} tokens: the prompt's were evicted. "
                f"Crop only what was generated, or start a new cache."
            )
        if spec.prunes and self.length - spec.cut(stored) > spec.window_slots and spec.cut(stored):
            raise InputError(
                f"The cache can be cropped by at most {SLACK} tokens, got {back}: of older ones "
                f"the dropped entries are gone. Start a new cache for a prompt that is edited."
            )
        self.seen, self.length = length, stored
        if self.valid is not None:
            self.valid = self.valid[:, :stored]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices])

    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        if not self.is_initialized:
            return 0
        stored = (self.store.pages, self.store.ring, self.valid)
        return sum(x.untyped_storage().nbytes() for x in stored if x is not None)

    # -------------------------------------------------------------------- storing and attending
    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None
    ) -> Tensor:
        """Store new tokens and attend to all, [B, heads, T, D]; all after RoPE.

        queries: [B, heads, T, D].   keys, values: [B, H, T, D].
        valid: bool [B, tokens seen before + T], False for the padding; None if there is none.
        """
        new = keys.shape[2]
        mask = self._valid(valid, new)
        if new == 1 and self.length:
            return self._decode(queries, keys, values, scale, mask)
        return self._prefill(queries, keys, values, scale, mask)

    def _valid(self, valid: Tensor | None, new: int) -> Tensor | None:
        """Which of the stored and the new tokens are no padding, bool [B, length + new]."""
        if valid is None and self.valid is None:
            return None
        before = self.valid
        if before is None:
            before = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        if valid is None:
            now = torch.ones(self.batch, new, dtype=torch.bool, device=self.device)
        else:
            now = valid[:, -new:]
        return torch.cat([before, now], 1)

    def _decode(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None
    ) -> Tensor:
        self._grow(1)
        if self.store.spec.thin_keys and self.length % BLOCK == 0:
            pages.set_ids(self.store, self._blocks(self.length // BLOCK), self._before())
        self._append(keys, values, valid)
        rows = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        out = self.kernels.decode(
            self.store, queries[:, :, 0], self.table, rows, self.rings, scale, self.valid
        )
        return torch.unsqueeze(out, 2)

    def _prefill(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None
    ) -> Tensor:
        spec, past, new = self.store.spec, self.length, keys.shape[2]
        total = past + new
        evicts = self.eviction is not None and past == 0
        positions = torch.arange(past, total, device=self.device)
        starts = (positions + 1 - spec.recent).clamp(min=0) // STEP * STEP
        if not spec.prunes:
            starts = starts.clamp(max=0)
        elif evicts or (self.config.method == "think" and self.config.policy == "prompt"):
            starts = starts.clamp(max=past)  # a call's own tokens are whole, as in the paper
        near = min(int(starts[0]), past)
        near_keys, near_values = self._whole(near, past)
        near_keys, near_values = (
            torch.cat([near_keys, keys], 2),
            torch.cat([near_values, values], 2),
        )
        far, sinks = int(starts[-1]), min(spec.sinks, total)
        if far:
            sink_keys, sink_values = self._whole(0, min(sinks, past))
        kept_keys, kept_values, kept_valid = keys, values, valid
        if evicts:
            kept_keys, kept_values, kept_valid = self._evict(queries, keys, values, scale, valid)
        if spec.thin_keys:
            self._choose(queries, kept_keys, kept_valid)
        else:
            self._grow(kept_keys.shape[2])
        self._append(kept_keys, kept_values, kept_valid)
        self.seen += new - kept_keys.shape[2]
        far_keys, far_values = keys[:, :, :0], values[:, :, :0]
        if far:
            far_keys, far_values = self._read(-(-far // BLOCK))
            own = max(0, sinks - past)  # sinks that came in this call
            first = slice(0, sinks)
            far_keys[:, :, first] = torch.cat([sink_keys, keys[:, :, :own]], 2)
            far_values[:, :, first] = torch.cat([sink_values, values[:, :, :own]], 2)
        return prefill(
            queries, far_keys, far_values, near_keys, near_values, starts, scale, total, valid
        )

    def _evict(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.eviction is not None
        stay = self.eviction.select(queries, keys, scale, valid)
        self.prompt = keys.shape[2] if stay is None else stay.shape[2]
        if stay is None:
            return keys, values, valid
        self.evicted = True
        at = stay[..., None].expand(-1, -1, -1, self.head_size)
        if valid is not None:  # the padding is on the left and goes first: alike in all heads
            valid = valid.gather(1, stay[:, 0])
        return keys.gather(2, at), values.gather(2, at), valid

    def _choose(self, queries: Tensor, keys: Tensor, valid: Tensor | None) -> None:
        """Name the channels of the pages that begin with these tokens, and make the pages."""
        spec, config = self.store.spec, self.config
        past, new = self.length, keys.shape[2]
        first, last = -(-past // BLOCK), -(-(past + new) // BLOCK)
        before = self._before() if past else None
        self._grow(new)
        if first == last:
            return
        now = None if valid is None else valid[:, past:]
        count = last - first
        if config.policy == "static":
            assert self.static is not None
            chosen = self.static.expand(count, self.batch, -1, -1)
        elif config.policy == "causal":
            ends = [min((page + 1) * BLOCK, past + new) - past for page in range(first, last)]
            chosen = channels.causal(
                queries, keys, spec.kept_keys, config.obs_window, ends, before, now
            )
        else:
            if before is None or new >= config.obs_window:
                before = channels.by_prompt(queries, keys, spec.kept_keys, config.obs_window, now)
            chosen = before.expand(count, -1, -1, -1)
        blocks = self.table[:, first:last].T.flatten()
        pages.set_ids(self.store, blocks, chosen.flatten(0, 1))

    def _before(self) -> Tensor:
        """The channels of the page that holds the newest token, [B, H, kept]."""
        return pages.ids(self.store, self._blocks((self.length - 1) // BLOCK))

    def _append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        new = keys.shape[2]
        total = self.length + new
        positions = torch.arange(self.length, total, device=self.device)
        blocks = self.table[:, positions // BLOCK].flatten()
        rings = self.rings
        self.kernels.write(
            self.store,
            blocks,
            positions.repeat(self.batch),
            torch.full_like(blocks, total),
            None if rings is None else rings.repeat_interleave(new, 0),
            keys.transpose(1, 2).flatten(0, 1),
            values.transpose(1, 2).flatten(0, 1),
        )
        self.length, self.seen, self.valid = total, self.seen + new, valid

    def _whole(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The stored tokens from start to stop whole, [B, H, stop − start, D]."""
        if start >= stop:
            none = torch.empty(
                self.batch, self.heads, 0, self.head_size, dtype=self.dtype, device=self.device
            )
            return none, none
        at = torch.arange(start, stop, device=self.device)
        first, last = start // BLOCK, -(-stop // BLOCK)
        keys, values = (
            x[:, :, start - first * BLOCK : stop - first * BLOCK] for x in self._read(last, first)
        )
        if self.rings is None:
            return keys, values
        rows = [
            pages.restore(self.store, self.table[b][at // BLOCK], self.rings[b], at, k, v)
            for b, (k, v) in enumerate(zip(keys, values, strict=True))
        ]
        return torch.stack([k for k, _ in rows]), torch.stack([v for _, v in rows])

    def _read(self, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Pages first to last of all rows as they are read from afar, [B, H, tokens, D]."""
        found = pages.read(self.store, self.table[:, first:last].flatten())
        keys, values = (torch.unflatten(x, 1, (self.batch, -1)).transpose(0, 1) for x in found)
        return keys, values

    # -------------------------------------------------------------------- pages of the batch
    @property
    def table(self) -> Tensor:
        """The blocks of each row's pages, int64 [B, pages]."""
        return torch.arange(len(self.store.pages), device=self.device).view(-1, self.batch).T

    @property
    def rings(self) -> Tensor | None:
        if self.store.ring is None:
            return None
        return torch.arange(self.batch, device=self.device)[:, None]

    def _blocks(self, page: int) -> Tensor:
        return self.table[:, page]

    def _grow(self, new: int) -> None:
        have, need = len(self.store.pages) // self.batch, -(-(self.length + new) // BLOCK)
        if need <= have:
            return
        # A prompt gets what it needs; single tokens a little more, so that few copies are made.
        more = need - have if new > 1 else max(1, have // 64)
        added = self._zeros(more * self.batch, self.heads, self.store.spec.page_bytes)
        self._replace(torch.cat([self.store.pages, added]), self.store.ring)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the batch, given as the first dimension."""
        if not self.is_initialized:
            return
        by_row = torch.unflatten(self.store.pages, 0, (-1, self.batch)).transpose(0, 1)
        changed = change(by_row).transpose(0, 1)
        ring = None if self.store.ring is None else change(self.store.ring)
        self.batch = changed.shape[1]
        self._replace(changed.flatten(0, 1).contiguous(), ring)
        self.valid = None if self.valid is None else change(self.valid)

    def _replace(self, all_pages: Tensor, ring: Tensor | None) -> None:
        self.store = pages.Storage(self.store.spec, self.dtype, all_pages, ring)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)


class PrunedCache(Cache):
    """A KV cache for one model under one configuration.

    model_config: of a decoder whose layers all have full attention.
    config: see KVPruneConfig.
    eviction: tokens of the prompt that go before anything else is pruned; none if None.

    Raises InputError for a model whose cache cannot be pruned, or masks made for another one.
    """

    def __init__(
        self, model_config: Any, config: KVPruneConfig, *, eviction: SnapKV | None = None
    ) -> None:
        text = model_config.get_text_config(decoder=True)
        check_model(text, config)
        size = _head_size(text)
        static: list[Tensor] | list[None] = [None] * text.num_hidden_layers
        if config.masks is not None:
            scores = load_masks(config.masks, model_fingerprint(text))
            static = list(best_channels(scores, config.kept(size)[0]))
        self.model_config = text
        super().__init__(layers=[PrunedLayer(config, size, eviction, kept) for kept in static])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.model_config._attn_implementation != IMPLEMENTATION:
            raise InputError(
                f"A pruned KV cache is read by prunekit's attention, and the model runs "
                f"{self.model_config._attn_implementation!r}: call enable_kv_pruning(model, "
                f"config) first."
            )
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found

    def nbytes(self) -> int:
        """Bytes of all that is stored: pages with their ids, rings, and the padding's mask."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, PrunedLayer))


class ThinKCache(PrunedCache):
    """A cache whose keys have fewer channels (ThinK); see PrunedCache.

    Raises InputError for a configuration of another method.
    """

    def __init__(
        self, model_config: Any, config: KVPruneConfig, *, eviction: SnapKV | None = None
    ) -> None:
        _check_method(config, "think", type(self).__name__)
        super().__init__(model_config, config, eviction=eviction)


class MustafarCache(PrunedCache):
    """A cache whose tokens keep their largest entries (Mustafar); see PrunedCache.

    Raises InputError for a configuration of another method.
    """

    def __init__(
        self, model_config: Any, config: KVPruneConfig, *, eviction: SnapKV | None = None
    ) -> None:
        _check_method(config, "mustafar", type(self).__name__)
        super().__init__(model_config, config, eviction=eviction)


def enable_kv_pruning(
    model: Any, config: KVPruneConfig, *, eviction: SnapKV | None = None
) -> Callable[[], PrunedCache]:
    """Let `model` read pruned caches, and return a function that makes an empty one.

    Its attention is that of "sdpa" wherever another cache or none is used. Raises InputError for a
    model whose cache cannot be pruned.
    """
    make = functools.partial(PrunedCache, model.config, config, eviction=eviction)
    make()  # so that what is wrong is said now
    model.set_attn_implementation(IMPLEMENTATION)
    return make


def check_model(text_config: Any, config: KVPruneConfig) -> None:
    """Raise InputError, with the reason, if the cache of such a decoder cannot be pruned."""
    name = getattr(text_config, "model_type", "the model")
    if getattr(text_config, "kv_lora_rank", None):
        raise InputError(
            f"{name} has latent attention (MLA), whose cache holds no keys and values to prune."
        )
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    window = getattr(text_config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and getattr(text_config, "use_sliding_window", True)):
        raise InputError(
            f"{name} has layers that are not full attention (a sliding window, or another kind): "
            f"their cache is small already and is not pruned."
        )
    PageSpec.of(config, head_size=_head_size(text_config), block_size=BLOCK, itemsize=4)


def _check_method(config: KVPruneConfig, method: str, cache: str) -> None:
    if config.method not in (method, "none"):
        raise InputError(
            f"{cache} is for method {method!r}, got {config.method!r}: use the other cache, or "
            f"the one that enable_kv_pruning makes."
        )


def _head_size(text_config: Any) -> int:
    size = getattr(text_config, "head_dim", None)
    return int(size or text_config.hidden_size // text_config.num_attention_heads)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: attention over whichever cache the keys come from.

    attention_mask: bool [B, tokens] from `padding`; None if there is no padding.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(
            f"Attention over a pruned KV cache takes a mask of the padding, [batch, tokens], and "
            f"got one of shape {tuple(attention_mask.shape)}: pass attention_mask as a tokenizer "
            f"returns it."
        )
    if kwargs.get("sliding_window") or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise InputError(
            f"{type(module).__name__} has a sliding window, capped logits or attention sinks, "
            f"which attention over a pruned KV cache does not know."
        )
    layer = getattr(key, "prunekit_layer", None)
    if layer is not None:
        out = layer.attend(query, key, value, scale, attention_mask)
    else:
        none = torch.zeros(query.shape[2], dtype=torch.long, device=query.device)
        empty = key[:, :, :0]
        out = prefill(query, empty, empty, key, value, none, scale, key.shape[2], attention_mask)
    return out.transpose(1, 2).contiguous(), None


def padding(
    *, mask_function: Any = causal_mask_function, attention_mask: Any = None, **kwargs: Any
) -> Tensor | None:
    """What transformers asks for a mask: where the padding is, bool [B, tokens], or None."""
    if mask_function is not causal_mask_function:
        raise InputError(
            "Attention over a pruned KV cache is causal over one sequence a row: sliding windows, "
            "packed sequences and prefixes seen both ways are not."
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()  # type: ignore[no-any-return]


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, padding)
