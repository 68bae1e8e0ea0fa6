"""Attention of many new tokens at once: those of each query's window whole, older ones pruned.

Which tokens a query reads whole depends on its position alone, so a prompt gives the same result in
one call, in chunks, and computed again after preemption.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_prune.kv import partial
from rag_prune.kv.spec import STEP

_ROWS = 64  # queries at a time; more of them see more tokens that are hidden from some

Afar = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def prefill(
    queries: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    whole_from: Tensor,
    scale: float,
    total: int,
    afar: Afar,
) -> Tensor:
    """Causal attention of the last T of a sequence's S tokens, [heads, T, D].

    queries: [heads, T, D]; heads is a multiple of H, neighbours share a KV head.
    near_keys, near_values: [H, N, D], the last N of the S tokens, whole.
    whole_from: int64 [T], ascending, the first token that each query reads whole; at least S − N.
        It grows with the position, by STEP at a time.
    total: S.
    afar: (queries [R, heads, STEP, D], lengths int32 [R]) to the attention of each R's queries to
        the first tokens, and the log of its sums, [R, heads, STEP, D] and [R, heads, STEP].
    """
    count, first = queries.shape[1], total - queries.shape[1]
    starts = whole_from.tolist()
    if not first and not starts[-1]:
        return dense(queries, near_keys, near_values, scale)
    positions = torch.arange(total, device=queries.device)
    near_start = total - near_keys.shape[1]
    grouped = torch.unflatten(queries, 0, (near_keys.shape[0], -1))  # [H, group, T, D]
    out = torch.empty_like(grouped)
    if starts[-1]:
        far, log_far = (x.view(*grouped.shape[:3], -1) for x in _far(queries, starts, afar))
    for low in range(0, count, _ROWS):
        high = min(low + _ROWS, count)
        rows = grouped[:, :, low:high].flatten(1, 2)  # [H, group · rows, D]
        near = slice(starts[low], first + high)
        begin, now = whole_from[low:high, None], positions[first + low : first + high, None]
        at = slice(near.start - near_start, near.stop - near_start)
        hidden = (positions[near] < begin) | (positions[near] > now)
        bias = torch.zeros(hidden.shape, dtype=rows.dtype, device=rows.device)
        bias = bias.masked_fill_(hidden, -math.inf).repeat(grouped.shape[1], 1)
        mixed, log_sum = partial.attend(rows, near_keys[:, at], near_values[:, at], bias, scale)
        if starts[high - 1]:
            part = slice(low, high)
            afar_too = far[:, :, part].flatten(1, 2), log_far[:, :, part, 0].flatten(1, 2)
            mixed = partial.join(mixed, log_sum, *afar_too)
        out[:, :, low:high] = torch.unflatten(mixed, 1, (-1, high - low))
    return out.flatten(0, 1)


def _far(queries: Tensor, starts: list[int], afar: Afar) -> tuple[Tensor, Tensor]:
    """[heads, T, D] and [heads, T]; queries that read whole from the same token on go together."""
    count = len(starts)
    # Where whole_from first grows, a step begins; the first step may be cut short by the call.
    steps = next((i for i in range(1, count) if starts[i] != starts[i - 1]), count)
    before = -steps % STEP
    after = -(before + count) % STEP
    padded = torch.nn.functional.pad(queries, (0, 0, before, after))
    tiles = torch.unflatten(padded, 1, (-1, STEP)).transpose(0, 1)
    last = [min(i * STEP + STEP - before, count) - 1 for i in range(len(tiles))]
    lengths = torch.tensor([starts[i] for i in last], dtype=torch.int32, device=queries.device)
    out, log_sums = (x.transpose(0, 1).flatten(1, 2) for x in afar(tiles, lengths))
    return out[:, before : before + count], log_sums[:, before : before + count]


def dense(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of tokens over themselves, all whole, [heads, T, D].

    queries: [heads, T, D].   keys, values: [H, T, D].
    """
    out = scaled_dot_product_attention(
        queries[None],  # its fast ways take four dimensions
        keys[None],
        values[None],
        is_causal=True,
        scale=scale,
        enable_gqa=len(queries) != len(keys),
    )
    return out[0]
