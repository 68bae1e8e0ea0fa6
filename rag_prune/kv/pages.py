"""Pages of pruned keys and values, in plain torch: written, read and attended to.

This is what the kernels are tested against, what runs where there is none, and what prefill uses
everywhere. `spec` has the layout. Shapes below: R sequences, T tokens, H KV heads, D head size.

    pages   uint8 [blocks, H, bytes]; the last dimension contiguous, bytes >= spec.page_bytes
    ring    uint8 [blocks, H, bytes]; each block holds bytes // spec.slot_bytes slots
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_prune.kv import mustafar, partial
from rag_prune.kv.spec import PageSpec
from rag_prune.kv.think import others

_AT_ONCE = 64  # pages that attention unpacks together


@dataclass(frozen=True)
class Storage:
    """The pages and the ring of one layer.

    dtype: of the entries.   ring: None if the spec drops nothing.
    """

    spec: PageSpec
    dtype: torch.dtype
    pages: Tensor
    ring: Tensor | None

    @property
    def slots_per_block(self) -> int:
        assert self.ring is not None
        return self.ring.shape[-1] // self.spec.slot_bytes


# ------------------------------------------------------------------------------ writing
def write(
    store: Storage,
    blocks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Store tokens: in the pages what is kept, in the ring the rest of those to be read whole.

    blocks: [T], the page of each token.   positions: [T], each in its sequence.
    lengths: [T], of each token's sequence once all tokens of this call are in it.
    rings: [T, n], the blocks of the ring of each token's sequence; None if there is no ring.
    keys, values: [T, H, D].   Thin pages must have their ids before.
    """
    spec, blocks, offsets = store.spec, blocks.long(), positions.long() % store.spec.block_size
    keys, values = keys.to(store.dtype), values.to(store.dtype)
    kept_keys = kept_values = None
    if spec.packed_keys:
        kept_keys = mustafar.largest(keys, spec.kept_keys)
        parts = _packed(store, store.pages, 0, spec.kept_keys)
        for part, new in zip(parts, mustafar.pack(keys, kept_keys), strict=True):
            part[blocks, :, offsets] = new
    else:
        if spec.thin_keys:
            kept_keys = ids(store, blocks)
        channels = keys if kept_keys is None else keys.gather(-1, kept_keys)
        _thin(store, store.pages)[blocks, :, :, offsets] = channels
    if spec.packed_values:
        kept_values = mustafar.largest(values, spec.kept_values)
        parts = _packed(store, store.pages, spec.values_offset, spec.kept_values)
        for part, new in zip(parts, mustafar.pack(values, kept_values), strict=True):
            part[blocks, :, offsets] = new
    else:
        _whole(store, store.pages)[blocks, :, offsets] = values
    if store.ring is not None and rings is not None:
        stays = (positions < spec.sinks) | (positions >= lengths - spec.window_slots)
        rest = [
            x[stays].gather(-1, others(kept[stays], spec.head_size))
            for x, kept in ((keys, kept_keys), (values, kept_values))
            if kept is not None
        ]
        block, offset = _slots(store, rings[stays], positions[stays])
        tags, entries = _ring(store)
        tags[block, :, offset] = (positions[stays] + 1).int()[:, None]
        entries[block, :, offset] = torch.cat(rest, -1)


def _slots(store: Storage, rings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which block of its ring, and which slot of the block, holds each position. [T], [T]."""
    spec = store.spec
    window = spec.sinks + (positions - spec.sinks) % spec.window_slots
    slot = torch.where(positions < spec.sinks, positions, window).long()
    per_block = store.slots_per_block
    return rings.gather(1, (slot // per_block)[:, None])[:, 0].long(), slot % per_block


# ------------------------------------------------------------------------------ reading
def read(store: Storage, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages, [H, len(blocks) · block_size, D]; what was dropped is 0."""
    spec, pages = store.spec, store.pages[blocks.long()]
    if spec.packed_keys:
        keys = mustafar.unpack(*_packed(store, pages, 0, spec.kept_keys))
    else:
        keys = _thin(store, pages).transpose(-1, -2)
        if spec.thin_keys:
            channels = ids(store, blocks.long())[:, :, None].expand(keys.shape)
            keys = keys.new_zeros(*keys.shape[:-1], spec.head_size).scatter_(-1, channels, keys)
    if spec.packed_values:
        parts = _packed(store, pages, spec.values_offset, spec.kept_values)
        values = mustafar.unpack(*parts)
    else:
        values = _whole(store, pages)
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def restore(
    store: Storage, blocks: Tensor, ring: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Make tokens of one sequence whole again, as far as its ring holds their rest.

    blocks: [T], the page of each token.   ring: [n], the ring's blocks.   positions: [T].
    keys, values: [H, T, D], as `read` gave them; copies with the rest put in are returned.
    A token whose rest was overwritten, or never written because its page came from another
    sequence's prefix, stays pruned.
    """
    spec = store.spec
    block, offset = _slots(store, ring.expand(len(positions), -1), positions)
    tags, entries = _ring(store)
    there = (tags[block, 0, offset] == positions + 1)[None, :, None]
    rest = entries[block, :, offset].transpose(0, 1) * there  # [H, T, rest]
    split = spec.head_size - spec.kept_keys
    page, at = store.pages[blocks.long()], positions.long() % spec.block_size
    each = torch.arange(len(positions), device=at.device)

    def of(start: int, kept: int) -> Tensor:
        bitmap = _packed(store, page, start, kept)[0][each, :, at]
        return mustafar.channels_of(bitmap, kept)

    if split:
        kept = of(0, spec.kept_keys) if spec.packed_keys else ids(store, blocks.long())
        lost = others(kept, spec.head_size).transpose(0, 1)
        keys = keys.scatter_add(-1, lost, rest[..., :split])
    if spec.packed_values:
        lost = others(of(spec.values_offset, spec.kept_values), spec.head_size).transpose(0, 1)
        values = values.scatter_add(-1, lost, rest[..., split:])
    return keys, values


# ------------------------------------------------------------------------------ parts of a page
def ids(store: Storage, blocks: Tensor) -> Tensor:
    """The channels that thin keys of `blocks` hold, ascending, int64 [len(blocks), H, kept]."""
    start = store.spec.ids_offset
    return store.pages[blocks, :, start : start + store.spec.kept_keys].long()


def set_ids(store: Storage, blocks: Tensor, channels: Tensor) -> None:
    """Name the channels that thin keys of `blocks` will hold, before they are written.

    channels: ascending, [H, kept] for all of them, or [len(blocks), H, kept].
    """
    start = store.spec.ids_offset
    store.pages[blocks, :, start : start + store.spec.kept_keys] = channels.to(torch.uint8)


def _entries(store: Storage, pages: Tensor, start: int, count: int) -> Tensor:
    return pages[..., start : start + count * store.dtype.itemsize].view(store.dtype)


def _thin(store: Storage, pages: Tensor) -> Tensor:
    """[blocks, H, kept, block_size]."""
    count = store.spec.kept_keys * store.spec.block_size
    return torch.unflatten(_entries(store, pages, 0, count), -1, (store.spec.kept_keys, -1))


def _whole(store: Storage, pages: Tensor) -> Tensor:
    """[blocks, H, block_size, D]."""
    spec = store.spec
    count = spec.block_size * spec.head_size
    entries = _entries(store, pages, spec.values_offset, count)
    return torch.unflatten(entries, -1, (spec.block_size, -1))


def _packed(store: Storage, pages: Tensor, start: int, kept: int) -> tuple[Tensor, Tensor]:
    """Bitmaps [blocks, H, block_size, D / 8] and values [blocks, H, block_size, kept]."""
    tokens = store.spec.block_size
    middle = start + tokens * store.spec.head_size // 8
    values = _entries(store, pages, middle, tokens * kept)
    bitmaps = torch.unflatten(pages[..., start:middle], -1, (tokens, -1))
    return bitmaps, torch.unflatten(values, -1, (tokens, -1))


def _ring(store: Storage) -> tuple[Tensor, Tensor]:
    """Tags int32 [blocks, H, slots] and entries [blocks, H, slots, rest]."""
    assert store.ring is not None
    spec, per_block = store.spec, store.slots_per_block
    slots = torch.unflatten(store.ring[..., : per_block * spec.slot_bytes], -1, (per_block, -1))
    rest = 2 * spec.head_size - spec.kept_keys - spec.kept_values
    end = 4 + rest * store.dtype.itemsize
    return slots[..., :4].view(torch.int32)[..., 0], slots[..., 4:end].view(store.dtype)


# ------------------------------------------------------------------------------ attention
def decode(
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of the newest token of each sequence, which is already stored. [R, heads, D].

    queries: [R, heads, D]; heads is a multiple of H, neighbours share a KV head.
    table: int [R, pages], anything after a sequence's last page.
    lengths: int [R], tokens of each sequence, at least 1.
    rings: int [R, n].

    Tokens from spec.cut(length − 1) on, and the sinks, are read whole as far as the ring has their
    rest. A few pages are unpacked at a time, never the sequence.
    """
    out = torch.empty_like(queries)
    for row, length in enumerate(lengths.tolist()):
        ring = None if rings is None else rings[row]
        out[row] = _decode_one(store, queries[row], table[row], length, ring, scale)
    return out


def _decode_one(
    store: Storage,
    query: Tensor,
    table: Tensor,
    length: int,
    ring: Tensor | None,
    scale: float,
) -> Tensor:
    spec, cut = store.spec, store.spec.cut(length - 1)
    q = torch.unflatten(query.float(), 0, (store.pages.shape[1], -1)) * scale  # [H, group, D]
    total = q.new_full((*q.shape[:2], 1), -math.inf)  # log of the sum of exponentials so far
    out = torch.zeros_like(q)
    table = table[: -(-length // spec.block_size)]  # what follows may be no page of the sequence's
    for first in range(0, len(table), _AT_ONCE):
        blocks = table[first : first + _AT_ONCE]
        start = first * spec.block_size
        keys, values = read(store, blocks)
        positions = torch.arange(start, min(start + keys.shape[1], length), device=keys.device)
        keys, values = keys[:, : len(positions)], values[:, : len(positions)]
        if ring is not None:
            near = (positions >= cut) | (positions < spec.sinks)
            at = positions[near]
            page = table[at // spec.block_size]
            keys, values = keys.clone(), values.clone()
            keys[:, near], values[:, near] = restore(
                store, page, ring, at, keys[:, near], values[:, near]
            )
        logits = q @ keys.float().transpose(1, 2)
        new = torch.logaddexp(total, logits.logsumexp(-1, keepdim=True))
        out = out * (total - new).exp() + (logits - new).exp() @ values.float()
        total = new
    return out.flatten(0, 1).to(query.dtype)


def afar(
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    ring: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention to the first tokens of one sequence as they are read from afar: sinks alone whole.

    queries: [R, heads, n, D], which all see the first lengths[r] tokens and no others.
    table: int [pages], of the sequence.   lengths: int [R], 0 or more.
    ring: int [n], of the sequence.

    Returns [R, heads, n, D], and the log of the sum of exponentials, float32 [R, heads, n], which
    is −inf where there are no tokens.
    """
    spec, kv_heads = store.spec, store.pages.shape[1]
    most = int(lengths.max())
    keys, values = read(store, table[: -(-most // spec.block_size)])
    sinks = torch.arange(min(spec.sinks, most), device=keys.device)
    if ring is not None and len(sinks):
        pages = table[sinks // spec.block_size]
        keys[:, sinks], values[:, sinks] = restore(
            store, pages, ring, sinks, keys[:, sinks], values[:, sinks]
        )
    out = torch.zeros_like(queries)
    log_sums = torch.full(queries.shape[:-1], -math.inf, device=queries.device)
    for r, length in enumerate(lengths.tolist()):
        if length:
            rows = torch.unflatten(queries[r], 0, (kv_heads, -1)).flatten(1, 2)
            part, log_sum = partial.attend(
                rows,
                keys[:, :length].to(rows.dtype),
                values[:, :length].to(rows.dtype),
                None,
                scale,
            )
            out[r] = part.reshape(queries[r].shape)
            log_sums[r] = log_sum.reshape(log_sums[r].shape)
    return out, log_sums
