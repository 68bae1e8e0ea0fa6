"""Many new tokens of one sequence: which are read whole, ThinK's channels, attention over pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_prune.kv import channels, pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.kernels import Kernels
from rag_prune.kv.pages import Storage
from rag_prune.kv.prefill import prefill
from rag_prune.kv.spec import PageSpec


@dataclass(frozen=True)
class Chunk:
    """What is known of a call before its tensors are, the same for all layers."""

    past: int  # tokens of the sequence before this call
    total: int  # and after it
    table: Tensor  # the sequence's pages, [ceil(total / block_size)] or more
    whole_from: Tensor  # int64 [total − past], see `prefill`
    near: int  # the first token that some query reads whole
    begun: range  # places in `table` of the pages that begin here

    @classmethod
    def of(
        cls, spec: PageSpec, config: KVPruneConfig, table: Tensor, past: int, total: int
    ) -> Chunk:
        """Under policy "prompt" of ThinK a call's own tokens are all whole, as in the paper."""
        starts = [spec.cut(position) if spec.prunes else 0 for position in range(past, total)]
        near = starts[0]
        if config.method == "think" and config.policy == "prompt":
            starts = [min(start, past) for start in starts]
        whole_from = torch.tensor(starts, device=table.device)
        return cls(
            past=past,
            total=total,
            table=table,
            whole_from=whole_from,
            near=near,
            begun=range(-(-past // spec.block_size), -(-total // spec.block_size)),
        )


def choose(
    store: Storage,
    config: KVPruneConfig,
    chunk: Chunk,
    queries: Tensor,
    keys: Tensor,
    static: Tensor | None,
) -> None:
    """Name the channels of the pages that begin with the chunk; thin keys need it before a write.

    queries: [heads, T, D].   keys: [H, T, D].   static: [H, kept] under policy "static".
    """
    begun, kept, window = chunk.begun, store.spec.kept_keys, config.obs_window
    if not begun:
        return
    before = None
    if begun.start:
        before = pages.ids(store, chunk.table[begun.start - 1 : begun.start])[0]
    if static is not None:
        ids = static
    elif config.policy == "causal":
        size = store.spec.block_size
        ends = [min((place + 1) * size - chunk.past, keys.shape[1]) for place in begun]
        ids = channels.causal(queries, keys, kept, window, ends, before)
    elif before is None or keys.shape[1] >= window:
        ids = channels.by_prompt(queries, keys, kept, window)
    else:
        ids = before
    pages.set_ids(store, chunk.table[begun.start : begun.stop], ids)


def attend(
    store: Storage,
    kernels: Kernels,
    chunk: Chunk,
    ring: Tensor | None,
    before: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the chunk's tokens, which are written, [heads, T, D].

    ring: int [n], the blocks of the sequence's ring.
    before: uint8 [n, H, bytes], a copy of them from before the tokens were written, which takes
        slots of tokens that the first queries still read whole.
    queries: [heads, T, D].   keys, values: [H, T, D], whole.
    """
    size, past, near = store.spec.block_size, chunk.past, chunk.near
    first = near // size
    near_keys, near_values = (
        x[:, near - first * size : past - first * size]
        for x in pages.read(store, chunk.table[first : -(-past // size)])
    )
    if before is not None and near < past:
        at = torch.arange(near, past, device=queries.device)
        near_keys, near_values = pages.restore(
            Storage(store.spec, store.dtype, store.pages, before),
            chunk.table[at // size],
            torch.arange(len(before), device=at.device),
            at,
            near_keys,
            near_values,
        )

    def afar(tiles: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.afar(store, tiles, chunk.table, lengths, ring, scale)

    return prefill(
        queries,
        torch.cat([near_keys, keys.to(near_keys.dtype)], 1),
        torch.cat([near_values, values.to(near_values.dtype)], 1),
        chunk.whole_from,
        scale,
        chunk.total,
        afar,
    )
