# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Decode attention over pruned pages in Triton: FlashDecoding's shares and merge, on our pages.

`decode` stands in for `pages.decode`. Each sequence is cut into shares of its tokens; a program of
`_attend` goes over one share for one KV head and all queries of that head, a tile of tokens at a
time with a running softmax, and `_merge` weighs the shares by their sums. Nothing is unpacked into
memory: thin keys are multiplied as they lie by the queries' same channels, and a packed token is
opened in registers, where the entries before each channel are counted from the bitmap and tell
which one to load. The number of shares follows from shapes, and lengths are read by the kernel
alone, so that a CUDA graph can hold a call.

Checked against `pages` in Triton's interpreter, which runs on a CPU, and compiled for a GPU by the
tests; not yet run on one.

Source of the split: Flash-Decoding (Dao et al., 2023) over arXiv:2205.14135's online softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune_core.errors import require
from rag_prune.kv.pages import Storage
from rag_prune.kv.spec import STEP

require("triton", extra="serve", purpose="Attention over pruned pages on a GPU")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

# The interpreter multiplies bfloat16 as if it were whole numbers, so there all is float32.
_INTERPRETED = triton.knobs.runtime.interpret
_LEAST = 16  # rows and columns of a matrix that tl.dot takes
_MOST_SHARES = 64  # of one sequence, which _merge holds at once


def decode(
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token of each sequence, which is already stored. [R, heads, D].

    Arguments and result are those of `pages.decode`. All tensors are on one device; the last
    dimension of `table`, `rings` and `valid` is contiguous. A sequence of length 0 gets zeros.
    """
    spec = store.spec
    rows, heads = queries.shape[:2]
    kv_heads = store.pages.shape[1]
    # Tokens at a time, a power of two that divides a page. Packed ones take many registers each.
    packed = spec.packed_keys or spec.packed_values
    tile = STEP if packed else min(2 * STEP, spec.block_size & -spec.block_size)
    tiles = table.shape[1] * spec.block_size // tile
    shares = _shares(rows * kv_heads, tiles, queries.device)

    common = torch.promote_types(queries.dtype, store.dtype)
    asked = queries.to(torch.float32 if _INTERPRETED else common)
    entries = store.pages[..., : spec.page_bytes].view(store.dtype)
    tags, rests, slots = None, entries, 0  # without a ring, no rest is read
    if rings is not None and store.ring is not None:
        slots = store.slots_per_block
        ring = store.ring[..., : slots * spec.slot_bytes]
        tags, rests = ring.view(torch.int32), ring.view(store.dtype)

    parts = queries.new_empty(rows, heads, shares, spec.head_size, dtype=torch.float32)
    sums = queries.new_empty(rows, heads, shares, dtype=torch.float32)
    channels = triton.next_power_of_2(spec.head_size)
    _attend[(shares, kv_heads, rows)](
        parts,
        sums,
        asked,
        store.pages,
        entries,
        table,
        lengths,
        tags,
        rests,
        rings,
        valid,
        scale,
        *asked.stride(),
        *store.pages.stride()[:2],
        *entries.stride()[:2],
        *(tags.stride()[:2] if tags is not None else (0, 0)),
        *rests.stride()[:2],
        table.stride(0),
        rings.stride(0) if rings is not None else 0,
        valid.stride(0) if valid is not None else 0,
        GROUP=heads // kv_heads,
        GROUP_PADDED=max(_LEAST, triton.next_power_of_2(heads // kv_heads)),
        HEAD=spec.head_size,
        CHANNELS=channels,
        KEYS=spec.kept_keys,
        KEYS_PADDED=max(_LEAST, triton.next_power_of_2(spec.kept_keys)),
        PACKED_KEYS=spec.packed_keys,
        VALUES=spec.kept_values,
        VALUES_AT=spec.values_offset,
        IDS_AT=spec.ids_offset,
        BLOCK=spec.block_size,
        TILE=tile,
        ITEM=store.dtype.itemsize,
        RECENT=spec.recent,
        STEP=STEP,
        SINKS=spec.sinks,
        WINDOW=spec.window_slots,
        RING=tags is not None,
        SLOTS=slots,
        SLOT=spec.slot_bytes,
    )
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    _merge[(rows * heads,)](out, parts, sums, SHARES=shares, HEAD=spec.head_size, CHANNELS=channels)
    return out


def _shares(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many shares to cut sequences of at most `tiles` tiles, to keep the device busy.

    A power of two, so that few kernels are compiled. Each sequence is cut by its own length, so
    that short ones in a wide table are spread over all shares too.
    """
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(2 * processors, max(1, programs))  # two programs for each processor
    return int(triton.next_power_of_2(max(1, min(wanted, tiles, _MOST_SHARES))))


@triton.jit
def _attend(
    parts,  # [R, heads, shares, D] float32, the output of each share
    sums,  # [R, heads, shares] float32, the log of its sum of exponentials
    queries,  # [R, heads, D]
    pages,  # [blocks, H, bytes]
    entries,  # the same memory as entries
    table,
    lengths,
    tags,  # the ring's memory as int32
    rests,  # the same memory as entries
    rings,
    valid,  # None if there is no padding
    scale,
    query_row,  # strides, in elements
    query_head,
    query_channel,
    page_block,
    page_head,
    entry_block,
    entry_head,
    tag_block,
    tag_head,
    rest_block,
    rest_head,
    table_row,
    ring_row,
    valid_row,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_PADDED: tl.constexpr,
    PACKED_KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_AT: tl.constexpr,  # offsets and sizes in bytes
    IDS_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ITEM: tl.constexpr,
    RECENT: tl.constexpr,
    STEP: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT: tl.constexpr,
):
    """One share of one sequence, for the queries of one KV head."""
    share, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shares = tl.num_programs(0)
    length = tl.load(lengths + row).to(tl.int32)
    cut = tl.maximum(length - RECENT, 0) // STEP * STEP
    tiles = tl.cdiv(length, TILE)
    first = share * tl.cdiv(tiles, shares)
    last = tl.minimum(first + tl.cdiv(tiles, shares), tiles)

    group = tl.arange(0, GROUP_PADDED)
    channel = tl.arange(0, CHANNELS)
    kept = tl.arange(0, KEYS_PADDED)
    query = row * query_row + (head * GROUP + group) * query_head
    asks = (group < GROUP)[:, None]
    q = tl.load(
        queries + query[:, None] + channel[None, :] * query_channel,
        mask=asks & (channel < HEAD)[None, :],
        other=0.0,
    )

    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, CHANNELS], tl.float32)
    for tile in range(first, last):
        start = tile * TILE
        position = start + tl.arange(0, TILE)
        token = position % BLOCK
        seen = position < length
        if valid is not None:
            seen &= tl.load(valid + row * valid_row + position, mask=seen, other=0) != 0
        block = tl.load(table + row * table_row + start // BLOCK).to(tl.int64)
        page = pages + block * page_block + head * page_head
        entry = entries + block * entry_block + head * entry_head

        # Where the ring has the rest of each token, if it has.
        rest, there, near = rests, seen, False
        if RING:
            near = (start + TILE > cut) | (start < SINKS)
            whole = seen & ((position >= cut) | (position < SINKS))
            slot = tl.where(position < SINKS, position, SINKS + (position - SINKS) % WINDOW)
            ring = tl.load(rings + row * ring_row + slot // SLOTS, mask=whole, other=0)
            ring, slot = ring.to(tl.int64), slot % SLOTS
            tag = tags + ring * tag_block + head * tag_head + slot * (SLOT // 4)
            there = whole & (tl.load(tag, mask=whole, other=0) == position + 1)
            rest = rests + ring * rest_block + head * rest_head + slot * (SLOT // ITEM) + 4 // ITEM

        # The logits of the tile.
        if PACKED_KEYS:
            keys = _unpack(
                page, entry, rest, token, seen, there, near, KEYS, HEAD, CHANNELS, BLOCK, ITEM, RING
            ).to(q.dtype)
            logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
        else:
            # No mask by token, which would keep neighbours from being loaded together: what lies
            # behind the last token is hidden below.
            keys = tl.load(
                entry + kept[:, None] * BLOCK + token[None, :],
                mask=(kept < KEYS)[:, None],
                other=0.0,
            ).to(q.dtype)
            if KEYS == HEAD:
                logits = tl.dot(q, keys, input_precision="ieee")
            else:
                ids = tl.load(page + IDS_AT + kept, mask=kept < KEYS, other=0).to(tl.int32)
                picked = tl.load(
                    queries + query[:, None] + ids[None, :] * query_channel,
                    mask=asks & (kept < KEYS)[None, :],
                    other=0.0,
                )
                logits = tl.dot(picked, keys, input_precision="ieee")
                if RING and near:
                    same = (ids[:, None] == channel[None, :]) & (kept < KEYS)[:, None]
                    held = tl.max(same.to(tl.int32), 0)[None, :]
                    lost = _lost(rest, there, held, HEAD, CHANNELS).to(q.dtype)
                    logits += tl.dot(q, tl.trans(lost), input_precision="ieee")

        # The running softmax.
        logits = tl.where(seen[None, :], logits * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # only padding so far
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        top = highest

        # The mix of values.
        if VALUES < HEAD:
            values = _unpack(
                page + VALUES_AT,
                entry + VALUES_AT // ITEM,
                rest + (HEAD - KEYS),
                token,
                seen,
                there,
                near,
                VALUES,
                HEAD,
                CHANNELS,
                BLOCK,
                ITEM,
                RING,
            )
        else:
            values = tl.load(
                entry + VALUES_AT // ITEM + token[:, None] * HEAD + channel[None, :],
                mask=seen[:, None] & (channel < HEAD)[None, :],
                other=0.0,
            )
        mixed *= shrink[:, None]
        mixed += tl.dot(weights.to(q.dtype), values.to(q.dtype), input_precision="ieee")

    total = tl.where(total > 0, total, 1.0)  # an empty share, whose `top` is −inf
    part = (row * tl.num_programs(1) * GROUP + head * GROUP + group) * shares + share
    tl.store(sums + part, top + tl.log(total), mask=group < GROUP)
    tl.store(
        parts + part[:, None] * HEAD + channel[None, :],
        mixed / total[:, None],
        mask=asks & (channel < HEAD)[None, :],
    )


@triton.jit
def _unpack(
    bitmaps,
    entries,
    rest,
    token,
    seen,
    there,
    near,
    KEPT: tl.constexpr,
    HEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ITEM: tl.constexpr,
    RING: tl.constexpr,
):
    """Packed tokens of a page, with their rest where `there`. [tokens, channels].

    bitmaps, entries: the start of the packed part of the page, in both types.
    """
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = seen[:, None] & (channel < HEAD)
    byte = tl.load(bitmaps + token[:, None] * (HEAD // 8) + channel // 8, mask=mask, other=0)
    held = (byte.to(tl.int32) >> channel % 8) & 1
    place = tl.cumsum(held, 1) - held
    entry = entries + BLOCK * HEAD // 8 // ITEM + token[:, None] * KEPT + place
    found = tl.load(entry, mask=held != 0, other=0.0)
    if RING and near:
        found = tl.where(held != 0, found, _lost(rest, there, held, HEAD, CHANNELS))
    return found


@triton.jit
def _lost(rest, there, held, HEAD: tl.constexpr, CHANNELS: tl.constexpr):
    """What the ring has of tokens, 0 where not `there` or the page has it. [tokens, channels].

    rest: [tokens], where the rest of each begins.   held: 1 for the channels the page has, which
    the rest skips, [tokens or 1, channels].
    """
    channel = tl.arange(0, CHANNELS)[None, :]
    place = channel - (tl.cumsum(held, 1) - held)
    mask = there[:, None] & (held == 0) & (channel < HEAD)
    return tl.load(rest[:, None] + place, mask=mask, other=0.0)


@triton.jit
def _merge(
    out,  # [R · heads, D]
    parts,
    sums,
    SHARES: tl.constexpr,
    HEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The output of one query from those of its shares."""
    query = tl.program_id(0)
    part = query * SHARES + tl.arange(0, SHARES)
    channel = tl.arange(0, CHANNELS)
    sizes = tl.load(sums + part)
    top = tl.max(sizes, 0)
    weights = tl.exp(sizes - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    each = tl.load(
        parts + part[:, None] * HEAD + channel[None, :], mask=(channel < HEAD)[None, :], other=0.0
    )
    mixed = tl.sum(each * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + query * HEAD + channel, mixed, mask=channel < HEAD)
