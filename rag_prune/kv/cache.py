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
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prune_core.errors import InputError
from rag_prune.kv import kernels, pages
from rag_prune.kv.chunk import Chunk, attend, choose
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.masks import load_masks, model_fingerprint
from rag_prune.kv.models import check_attention, head_size
from rag_prune.kv.prefill import dense
from rag_prune.kv.snapkv import SnapKV
from rag_prune.kv.spec import PageSpec
from rag_prune.kv.think import best_channels

IMPLEMENTATION = "prunekit_kv"
BLOCK = 16  # tokens of a page: small, since the last one is half empty on average
SLACK = 16  # tokens that `crop` can always take back, as assisted generation does


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The pages and rings of one layer; the padding of a batch is not stored.

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
        self.seen = 0  # tokens that came in, padding and evicted ones included
        self.lengths: list[int] = []  # stored tokens of each row
        self.written: list[int] = []  # the most that ever were: later ones took slots of the ring
        self.prompt: list[int] = []  # tokens that eviction left of each row's prompt

    # -------------------------------------------------------------------- what transformers asks
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads = key_states.shape[:2]
        self.lengths, self.written, self.prompt = ([0] * self.batch for _ in range(3))
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
        self._hold(spec, empty, ring)
        if self.static is not None:
            self.static = self.static.to(self.device)
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

    def crop(self, tokens_to_remove: int) -> None:
        """Take back so many of the newest tokens, given as a negative number; none is padding.

        A positive number is the length that is left, as transformers' caches have it, too.

        Raises InputError beyond what the ring still has whole, or into an evicted prompt.
        """
        length = tokens_to_remove
        if tokens_to_remove <= 0:
            length += self.seen
        back = self.seen - length
        if back <= 0:
            return
        left = [stored - back for stored in self.lengths]
        if length < 0 or min(left, default=0) < 0:
            raise InputError(f"A cache of {self.seen} tokens cannot be cropped to {length}.")
        spec = self.store.spec
        if any(n < m for n, m in zip(left, self.prompt, strict=True)):
            raise InputError(
                f"The cache cannot be cropped to {length} tokens: the prompt's were evicted. "
                f"Crop only what was generated, or start a new cache."
            )
        for stored, most in zip(left, self.written, strict=True):
            first = max(spec.cut(stored), spec.sinks)  # the next token reads whole from here on
            if spec.prunes and most - first > spec.window_slots:
                raise InputError(
                    f"The cache can be cropped by at most {SLACK} tokens, got {back}: the dropped "
                    f"entries of older ones are gone. Start a new cache for an edited prompt."
                )
        self.seen, self.lengths = length, left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(torch.arange(len(self.lengths))[indices.cpu()])

    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        if not self.is_initialized:
            return 0
        stored = (self.store.pages, self.store.ring)
        return sum(x.untyped_storage().nbytes() for x in stored if x is not None)

    # -------------------------------------------------------------------- storing and attending
    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, real: Tensor | None
    ) -> Tensor:
        """Store new tokens and attend to all, [B, heads, T, D]; queries of the padding get zeros.

        queries: [B, heads, T, D].   keys, values: [B, H, T, D].   All after RoPE.
        real: bool [B, T], False for the padding; None if there is none.
        """
        new = keys.shape[2]
        if real is not None and bool(real.all()):
            real = None
        self._grow(new)
        if new == 1 and real is None and min(self.lengths):
            out = self._decode(queries, keys, values, scale)
        else:
            out = torch.zeros_like(queries)
            for row in range(self.batch):
                at = slice(None) if real is None else real[row].nonzero()[:, 0]
                q, k, v = (x[row][:, at] for x in (queries, keys, values))
                if k.shape[1]:
                    out[row, :, at] = self._prefill(row, q, k, v, scale)
        self.seen += new
        return out

    def _decode(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """One token in every row."""
        rows = range(self.batch)
        begins = [row for row in rows if self.lengths[row] % BLOCK == 0]
        if self.store.spec.thin_keys and begins:
            new, last = (
                torch.stack([self.table[row, self.lengths[row] // BLOCK - back] for row in begins])
                for back in (0, 1)
            )
            pages.set_ids(self.store, new, pages.ids(self.store, last))
        positions = torch.tensor(self.lengths, device=self.device)
        self._append(list(rows), positions, keys, values)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        out = self.kernels.decode(
            self.store, queries[:, :, 0], self.table, lengths, self.rings, scale
        )
        return torch.unsqueeze(out, 2)

    def _prefill(
        self, row: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Tokens of one row: queries [heads, T, D], keys and values [H, T, D]."""
        past, total = self.lengths[row], self.lengths[row] + keys.shape[1]
        if self.eviction is not None and not past:
            out = dense(queries, keys, values, scale)
            keys, values = self._evict(row, queries, keys, values, scale)
            chunk = Chunk.of(self.store.spec, self.config, self.table[row], 0, keys.shape[1])
            self._store(row, chunk, queries, keys, values)
            return out
        chunk = Chunk.of(self.store.spec, self.config, self.table[row], past, total)
        ring = before = None
        if self.store.ring is not None and self.rings is not None:
            ring, before = self.rings[row], self.store.ring[row : row + 1].clone()
        self._store(row, chunk, queries, keys, values)
        return attend(self.store, self.kernels, chunk, ring, before, queries, keys, values, scale)

    def _store(self, row: int, chunk: Chunk, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.store.spec.thin_keys:
            choose(self.store, self.config, chunk, queries, keys, self.static)
        positions = torch.arange(chunk.past, chunk.total, device=self.device)
        self._append([row], positions, keys[None], values[None])

    def _evict(
        self, row: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert self.eviction is not None
        stay = self.eviction.select(queries[None], keys[None], scale)
        if stay is None:
            return keys, values
        self.prompt[row] = stay.shape[2]
        at = stay[0, ..., None].expand(-1, -1, self.head_size)
        return keys.gather(1, at), values.gather(1, at)

    def _append(self, rows: list[int], positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the tokens [rows, H, T, D] at `positions`, [rows · T], of their rows."""
        new = keys.shape[2]
        of = torch.tensor(rows, device=self.device).repeat_interleave(new)
        for row in rows:
            self.lengths[row] += new
            self.written[row] = max(self.written[row], self.lengths[row])
        self.kernels.write(
            self.store,
            self.table[of, positions // BLOCK],
            positions,
            torch.tensor(self.lengths, device=self.device)[of],
            None if self.rings is None else self.rings[of],
            keys.transpose(1, 2).flatten(0, 1),
            values.transpose(1, 2).flatten(0, 1),
        )

    # -------------------------------------------------------------------- pages of the batch
    def _hold(self, spec: PageSpec, all_pages: Tensor, ring: Tensor | None) -> None:
        """Take these pages and rings for the batch's, and note which are whose."""
        self.store = pages.Storage(spec, self.dtype, all_pages, ring)
        blocks = torch.arange(len(all_pages), device=self.device)
        self.table = blocks.view(-1, self.batch).T  # int64 [B, pages]
        self.rings = None  # int64 [B, 1]
        if ring is not None:
            self.rings = torch.arange(self.batch, device=self.device)[:, None]

    def _grow(self, new: int) -> None:
        """Have room for so many more tokens in every row."""
        have, need = len(self.store.pages) // self.batch, -(-(max(self.lengths) + new) // BLOCK)
        if self.eviction is not None and not any(self.lengths):
            need = min(need, -(-self.eviction.tokens // BLOCK))
        if need <= have:
            return
        # A prompt gets what it needs; single tokens a little more, so that few copies are made.
        more = need - have if new > 1 else max(1, have // 64)
        added = self._zeros(more * self.batch, self.heads, self.store.spec.page_bytes)
        self._hold(self.store.spec, torch.cat([self.store.pages, added]), self.store.ring)

    def _rows(self, order: Tensor) -> None:
        """Make row i what row order[i] was."""
        if not self.is_initialized:
            return
        order = order.to(self.device)
        by_row = torch.unflatten(self.store.pages, 0, (-1, self.batch)).index_select(1, order)
        ring = None if self.store.ring is None else self.store.ring.index_select(0, order)
        chosen = order.tolist()
        self.batch = len(chosen)
        self.lengths, self.written, self.prompt = (
            [x[i] for i in chosen] for x in (self.lengths, self.written, self.prompt)
        )
        self._hold(self.store.spec, by_row.flatten(0, 1), ring)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)


class PrunedCache(Cache):
    """A KV cache for one model under one configuration.

    model_config: of a decoder whose layers all have full attention.
    config: see KVPruneConfig.
    eviction: tokens of the prompt that go before anything else is pruned; none if None.

    Raises InputError for a model whose cache cannot be pruned, masks made for another one, or a
    configuration of another method than the class is for.
    """

    method: ClassVar[str | None] = None  # any

    def __init__(
        self, model_config: Any, config: KVPruneConfig, *, eviction: SnapKV | None = None
    ) -> None:
        if self.method is not None and config.method not in (self.method, "none"):
            raise InputError(
                f"{type(self).__name__} is for method {self.method!r}, got {config.method!r}: use "
                f"the other cache, or the one that enable_kv_pruning makes."
            )
        text = model_config.get_text_config(decoder=True)
        check_attention(text.model_type, text.to_dict())
        size = head_size(text)
        PageSpec.of(config, head_size=size, block_size=BLOCK, itemsize=4)  # refuses a head size
        if eviction is not None and config.method == "think" and config.policy == "causal":
            raise InputError(
                "policy 'causal' chooses a page's channels by the queries up to its end, and "
                "eviction takes tokens out of between: choose policy 'prompt' or 'static'."
            )
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
        """Bytes of all that is stored: pages with their ids, and rings."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, PrunedLayer))


class ThinKCache(PrunedCache):
    """A cache whose keys have fewer channels; see PrunedCache."""

    method = "think"


class MustafarCache(PrunedCache):
    """A cache whose tokens keep their largest entries; see PrunedCache."""

    method = "mustafar"


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


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: attention over whichever cache the keys come from.

    attention_mask: bool [B, 1, T, tokens] as "sdpa" has it; None if there is no padding.
    """
    layer = getattr(key, "prunekit_layer", None)
    if layer is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    if kwargs.get("sliding_window") or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise InputError(
            f"{type(module).__name__} has a sliding window, capped logits or attention sinks, "
            f"which attention over a pruned KV cache does not know."
        )
    real = None
    if attention_mask is not None:
        new, total = query.shape[2], attention_mask.shape[-1]
        seen = attention_mask[:, :, -1:]
        at = torch.arange(total, device=query.device)
        if not torch.equal(attention_mask, seen & (at <= at[total - new :, None])):
            raise InputError(
                "Attention over a pruned KV cache is causal over one sequence a row, and the mask "
                "says otherwise: pass attention_mask as a tokenizer returns it, [batch, tokens]."
            )
        real = seen[:, 0, 0, total - new :]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, scale, real).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
