"""vLLM serves with a pruned cache: an attention backend, and a ring of blocks for each sequence.

The backend tells vLLM that a token costs less, so the same memory holds more blocks, and keeps in
each block what `pages` lays out. The ring that `pages` needs beside them is a second cache of the
kind vLLM has for such: its blocks come from the same pool, are claimed with the first token of a
request, and go with it when it ends or is preempted. All state lies in blocks, so requests may be
scheduled, chunked, preempted and computed again in any way.

Everything that leans on vLLM's insides is here and in `vllm_plugin`, which brings vLLM here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from prune_core.errors import InputError
from rag_prune.kv import kernels, pages
from rag_prune.kv.chunk import Chunk, attend, choose
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.masks import load_masks, model_fingerprint
from rag_prune.kv.spec import STEP, PageSpec
from rag_prune.kv.think import best_channels
from rag_prune.kv.vllm_plugin import KEY, options

CPU_BLOCK = 32  # tokens; vLLM's 128 would round each ring up to more than a short sequence saves
logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, whose handlers print it


# ------------------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class Options:
    """The value of "prunekit_kv": the fields of KVPruneConfig and one of vLLM's own.

    ThinK's policy is "static" unless said otherwise: its pages depend on nothing but their tokens.

    allow_shared_masks: policy "prompt" may be used beside prefix caching.
    """

    config: KVPruneConfig
    allow_shared_masks: bool

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Raises InputError for an object that KVPruneConfig.parse does not read."""
        given = options(vllm_config.additional_config)
        if not isinstance(given, dict):
            raise InputError(
                f'--additional-config must hold {KEY!r} with an object like {{"method": "think"}}, '
                f"got {given!r}."
            )
        given = {"policy": "static", **given}
        allow = given.pop("allow_shared_masks", False)
        if not isinstance(allow, bool):
            raise InputError(f"allow_shared_masks must be true or false, got {allow!r}.")
        return cls(KVPruneConfig.parse(given), allow)


def claim(args: Any) -> None:
    """Choose the backend, and on a CPU the size of blocks unless it is given, of an engine that
    asks for a pruned cache, before it is configured.

    args: vLLM's EngineArgs.   Raises InputError if another backend was asked for.
    """
    custom = AttentionBackendEnum.CUSTOM
    for asked in (args.attention_backend, args.attention_config.backend):
        name = getattr(asked, "name", asked)
        if asked is not None and str(name).upper() != custom.name:
            raise InputError(
                f"{KEY} brings its own attention backend, and {name} was asked for: leave "
                f"--attention-backend out."
            )
    if custom.get_path() != f"{PrunedBackend.__module__}.{PrunedBackend.__qualname__}":
        raise InputError(
            f"Another plugin has taken vLLM's custom attention backend ({custom.get_path()}), "
            f"which {KEY} needs: name the plugins to load in VLLM_PLUGINS."
        )
    args.attention_backend, args.attention_config.backend = None, custom
    if args.block_size is None and current_platform.is_cpu():
        args.block_size = CPU_BLOCK


def check(vllm_config: VllmConfig) -> None:
    """Raise InputError for a model or an option of vLLM that a pruned cache cannot serve."""
    asked = Options.of(vllm_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    refused = {
        "multi-head latent attention": model.use_mla,
        "an encoder beside the decoder": model.is_encoder_decoder,
        "layers with a state in place of a cache": model.is_hybrid,
        "a sliding window": model.get_sliding_window(),
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype
        not in PrunedBackend.supported_kv_cache_dtypes,
        "speculative decoding": vllm_config.speculative_config,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "micro-batches (--enable-dbo)": parallel.enable_dbo,
        "a KV connector": vllm_config.kv_transfer_config,
    }
    for what, there in refused.items():
        if there:
            raise InputError(f"{KEY} does not go with {what} yet: do without one of them.")
    spec = _page_spec(asked.config, model.get_head_size(), cache.block_size, model.dtype)
    if spec.ring_blocks and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise InputError(
            f"{KEY} keeps two kinds of blocks, which needs vLLM's hybrid KV cache manager: leave "
            f"--disable-hybrid-kv-cache-manager out."
        )
    if not spec.thin_keys:
        return
    if asked.config.policy == "static":
        _static_scores(vllm_config, asked.config)
    if asked.config.policy == "prompt" and cache.enable_prefix_caching:
        if asked.allow_shared_masks:
            return
        raise InputError(
            "policy 'prompt' chooses a page's channels by the request that computes it, and prefix "
            "caching gives the page to other requests, whose answers then depend on that one: pass "
            '--no-enable-prefix-caching, choose another policy, or allow it with "allow_shared_'
            'masks": true.'
        )


def _page_spec(
    config: KVPruneConfig, head_size: int, block_size: int, dtype: torch.dtype
) -> PageSpec:
    return PageSpec.of(config, head_size=head_size, block_size=block_size, itemsize=dtype.itemsize)


def _static_scores(vllm_config: VllmConfig, config: KVPruneConfig) -> Tensor:
    """[layers, kv_heads, head_size]."""
    assert config.masks is not None
    return load_masks(config.masks, model_fingerprint(vllm_config.model_config.hf_text_config))


# ------------------------------------------------------------------------------ the ring's blocks
@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):  # type: ignore[misc]
    """A ring's blocks, as big as pages, so that vLLM pads neither. blocks: of each request."""

    blocks: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return int(self.blocks * self.page_size_bytes)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.blocks


class RingManager(CircularBufferManager):  # type: ignore[misc]
    """Claims all blocks of a ring at once, and has them zeroed: in an empty slot the tag is 0."""

    def __init__(self, kv_cache_spec: RingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        if not kwargs.get("needs_kv_cache_zeroing"):
            raise RuntimeError("vLLM does not zero new blocks, which the pruned cache relies on.")
        self._record_new_block_ids = True  # which its own rings do without

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[Any]:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        new: list[Any] = self.block_pool.get_new_blocks(self.kv_cache_spec.blocks)
        held.extend(new)
        self.new_block_ids.extend(block.block_id for block in new)
        return new


# vLLM fills this table when it is first read, and only if it is empty.
KVCacheSpecRegistry.get_uniform_type_base_spec(
    CircularBufferSpec(block_size=1, num_kv_heads=1, head_size=1, dtype=torch.uint8)
)
KVCacheSpecRegistry.register(RingSpec, RingManager)


class Ring(AttentionLayerBase):  # type: ignore[misc]
    """Makes vLLM keep a ring beside the pages of an attention layer."""

    def __init__(self, heads: int, spec: Callable[[int], PageSpec]) -> None:
        """spec: the pages, given the block size, which vLLM may still change."""
        self.heads, self.spec = heads, spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return RingBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RingSpec:
        spec = self.spec(vllm_config.cache_config.block_size)
        return RingSpec(
            block_size=spec.block_size,
            num_kv_heads=self.heads,
            head_size=spec.head_size,
            dtype=torch.uint8,  # other than the pages', so that vLLM zeroes new blocks
            state_content_bytes=spec.served_token_bytes,
            blocks=spec.ring_blocks,
        )


# ------------------------------------------------------------------------------ a step's batch
@dataclass(frozen=True)
class Rings(AttentionMetadata):  # type: ignore[misc]
    """The ring's blocks of each sequence, int [R, n], and of each token's sequence, [T, n]."""

    table: Tensor
    of_tokens: Tensor


@dataclass(frozen=True)
class Batch(AttentionMetadata):  # type: ignore[misc]
    """What a step does, the same for all layers: decode steps first, then chunks."""

    decodes: int
    table: Tensor  # int [R, pages]
    lengths: Tensor  # int [R]
    chunks: list[tuple[int, slice, Chunk]]  # the row, its tokens of the batch
    blocks: Tensor  # [T], the page of each token
    positions: Tensor  # [T]
    totals: Tensor  # [T], the length of each token's sequence after this step
    begun: Tensor  # pages that begin in this step
    heirs: tuple[Tensor, Tensor]  # those of decode steps, and the pages before them


class Builder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Reads vLLM's description of a step once, for all layers."""

    reorder_batch_threshold = 1  # decode steps come first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = Options.of(vllm_config).config
        self.spec = _page_spec(
            self.config, kv_cache_spec.head_size, kv_cache_spec.block_size, kv_cache_spec.dtype
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        common, size = common_attn_metadata, self.spec.block_size
        table = common.block_table_tensor
        starts, pasts, totals, row_of = _rows(common)
        decodes = 0
        for past, total in zip(pasts, totals, strict=True):
            if total - past != 1 or not past:  # a first token has no page to inherit from
                break
            decodes += 1
        chunks = [
            (
                row,
                slice(starts[row], starts[row + 1]),
                Chunk.of(self.spec, self.config, table[row], pasts[row], totals[row]),
            )
            for row in range(decodes, len(totals))
        ]
        positions = np.concatenate(
            [np.arange(p, t, dtype=np.int32) for p, t in zip(pasts, totals, strict=True)]
        )
        begun_rows = [row for row in range(decodes) if pasts[row] % size == 0]
        begun_at = [pasts[row] // size for row in begun_rows]
        new, before = (
            table[begun_rows, [at - back for at in begun_at]] if begun_rows else table[0, :0]
            for back in (0, 1)
        )
        begun = [new, *(c.table[c.begun.start : c.begun.stop] for _, _, c in chunks)]
        placed = torch.from_numpy(positions).to(table.device, non_blocking=True)
        return Batch(
            decodes=decodes,
            table=table,
            lengths=common.seq_lens[: len(totals)],
            chunks=chunks,
            blocks=table[row_of, placed // size],
            positions=placed,
            totals=common.seq_lens[row_of],
            begun=torch.cat(begun),
            heirs=(new, before),
        )


class RingBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Only the table is of interest."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)  # abstract there

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Rings:
        common = common_attn_metadata
        _, _, totals, row_of = _rows(common)
        table = common.block_table_tensor[: len(totals), : self.kv_cache_spec.blocks]
        return Rings(table, table[row_of])


def _rows(common: CommonAttentionMetadata) -> tuple[list[int], list[int], list[int], Tensor]:
    """Of each sequence: its first token in the batch, its tokens before and after this step; and
    the row of each token's sequence, [T].

    From what lies on the host; the bound is exact without speculative decoding. Rows that only pad
    the batch come last and are left out.
    """
    starts = common.query_start_loc_cpu.tolist()
    bounds = common.seq_lens_cpu_upper_bound
    assert bounds is not None
    counts = [end - start for start, end in pairwise(starts)]
    while counts and not counts[-1]:
        counts.pop()
    totals = bounds[: len(counts)].tolist()
    pasts = [total - n for total, n in zip(totals, counts, strict=True)]
    row_of = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    table = common.block_table_tensor
    return starts, pasts, totals, row_of.to(table.device, non_blocking=True)


# ------------------------------------------------------------------------------ attention
class PrunedAttention(AttentionImpl):  # type: ignore[misc]
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        refused = {
            f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
            "a sliding window": sliding_window,
            "ALiBi": alibi_slopes,
            "a soft cap of the logits": logits_soft_cap,
            "learned attention sinks": sinks is not None,
            "layers that share a cache": kv_sharing_target_layer_name,
        }
        refused |= {name: value is not None for name, value in others.items()}
        for what, there in refused.items():
            if there:
                raise InputError(
                    f"This model's attention has {what}, which {KEY} cannot serve yet: leave "
                    f"{KEY!r} out of --additional-config."
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.vllm_config = get_current_vllm_config()
        self.config = PrunedBackend.config = Options.of(self.vllm_config).config
        self.ring: Ring | None = None
        self.ring_name = ""
        self.channels: Tensor | None = None  # of policy "static", [H, kept]
        self.cache: Tensor | None = None
        self.store: pages.Storage

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model stands: lay a ring beside this layer, and look up its channels."""
        layers = self.vllm_config.compilation_config.static_forward_context
        ours = {
            name: layer
            for name, layer in layers.items()
            if isinstance(getattr(layer, "impl", None), PrunedAttention)
        }
        name, layer = next(item for item in ours.items() if item[1].impl is self)
        dtype = layer.kv_cache_torch_dtype

        def spec(block_size: int) -> PageSpec:
            return _page_spec(self.config, self.head_size, block_size, dtype)

        pruned = spec(self.vllm_config.cache_config.block_size)
        if not pruned.prunes:
            return
        if len(shapes := {(x.impl.num_kv_heads, x.impl.head_size) for x in ours.values()}) > 1:
            raise InputError(
                f"The layers of this model differ in their KV heads {sorted(shapes)}, and {KEY} "
                f"needs pages of one size: leave {KEY!r} out of --additional-config."
            )
        self.ring_name = f"{name}.ring"
        self.ring = layers[self.ring_name] = Ring(self.num_kv_heads, spec)
        if pruned.thin_keys and self.config.policy == "static":
            scores = _static_scores(self.vllm_config, self.config)[extract_layer_index(name)]
            # Ranks share the heads out; where there are more ranks, some hold the same head.
            ranks = self.vllm_config.parallel_config.tensor_parallel_size
            first = get_tensor_model_parallel_rank() * len(scores) // ranks
            mine = scores[first : first + self.num_kv_heads]
            self.channels = best_channels(mine, pruned.kept_keys)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [T, heads, D]; key, value: [T, H, D]; output: [T, heads, D], written."""
        batch = attn_metadata
        if batch is None:  # a rehearsal, to see what memory is left
            return output.zero_()
        if self.cache is not kv_cache:
            self._bind(kv_cache)
        store, tokens = self.store, len(batch.positions)
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        queries, keys, values = (x.transpose(0, 1) for x in (query, key, value))
        rings: Rings | None = None
        if self.ring is not None:
            rings = get_forward_context().attn_metadata[self.ring_name]
            if store.spec.thin_keys and len(batch.begun):
                self._choose(batch, queries, keys)
        before = [self._ring_of(row, chunk, rings) for row, _, chunk in batch.chunks]
        of_tokens = None if rings is None else rings.of_tokens
        self.ops.write(store, batch.blocks, batch.positions, batch.totals, of_tokens, key, value)
        for (row, at, chunk), was in zip(batch.chunks, before, strict=True):
            ring = None if rings is None else rings.table[row]
            new = queries[:, at], keys[:, at], values[:, at]
            attended = attend(store, self.ops, chunk, ring, was, *new, self.scale)
            output[at] = attended.transpose(0, 1)
        if rows := batch.decodes:
            table = None if rings is None else rings.table[:rows]
            output[:rows] = self.ops.decode(
                store, query[:rows], batch.table[:rows], batch.lengths[:rows], table, self.scale
            )
        return output

    def _bind(self, kv_cache: Tensor) -> None:
        """Take vLLM's blocks, [blocks, H, block_size, entries], as bytes of pages."""
        spec = _page_spec(self.config, self.head_size, kv_cache.shape[2], kv_cache.dtype)
        ring = None if self.ring is None else _as_bytes(self.ring.kv_cache)
        self.store = pages.Storage(spec, kv_cache.dtype, _as_bytes(kv_cache), ring)
        if self.channels is not None:
            self.channels = self.channels.to(kv_cache.device)
        self.ops = kernels.choose(kv_cache.device)
        self.cache = kv_cache

    def _ring_of(self, row: int, chunk: Chunk, rings: Rings | None) -> Tensor | None:
        """A copy of the sequence's ring, see `attend`; None if the chunk needs none."""
        if rings is None or self.store.ring is None or chunk.near == chunk.past:
            return None
        return self.store.ring[rings.table[row].long()]

    def _choose(self, batch: Batch, query: Tensor, key: Tensor) -> None:
        """Name the channels of the pages that begin in this step.

        query: [heads, T, D].   key: [H, T, D].
        """
        if self.channels is not None:
            pages.set_ids(self.store, batch.begun, self.channels)
            return
        new, before = batch.heirs
        if len(new):
            pages.set_ids(self.store, new, pages.ids(self.store, before))
        for _, at, chunk in batch.chunks:
            choose(self.store, self.config, chunk, query[:, at], key[:, at], None)


def _as_bytes(cache: Tensor) -> Tensor:
    """[blocks, H, N, C] of any type to uint8 [blocks, H, bytes]; a view."""
    cache = cache.view(torch.uint8)
    return cache.view(*cache.shape[:2], -1)


# ------------------------------------------------------------------------------ what vLLM asks for
class RingBackend(AttentionBackend):  # type: ignore[misc]
    """Of the rings: nothing attends to them by themselves."""

    @staticmethod
    def get_name() -> str:
        return str(AttentionBackendEnum.CUSTOM.name)

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return PrunedAttention

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return RingBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        return [MultipleOf(STEP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # the bytes of a block and head lie together


class PrunedBackend(RingBackend):
    """Of the attention layers."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32"]
    config: ClassVar[KVPruneConfig]  # of the engine that is being built; its layers put it here

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return Builder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Make a token cost what its share of a page does."""
        pruned = _page_spec(cls.config, spec.head_size, spec.block_size, spec.dtype)
        smaller = replace(spec, state_content_bytes=pruned.served_token_bytes)
        if spec.state_content_bytes is None:
            _announce(cls.config, pruned, spec.page_size_bytes, smaller.page_size_bytes)
        return smaller


def _announce(config: KVPruneConfig, spec: PageSpec, stock: int, pruned: int) -> None:
    policy = f", policy {config.policy}" if spec.thin_keys else ""
    logger.info_once(
        "prunekit KV: %s%s, page %d → %d bytes, ×%.2f tokens; ring %d block%s a sequence",
        config.method,
        policy,
        stock,
        pruned,
        stock / pruned,
        spec.ring_blocks,
        "s" * (spec.ring_blocks != 1),
        scope="global",
    )
