"""Attention of many new tokens at once: those of each query's window whole, older ones pruned.

Which tokens a query reads whole depends on its position alone, so a prompt gives the same result in
one call, in chunks, and computed again after preemption.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_ROWS = 128  # queries at a time, so that logits take memory in proportion to the tokens


def prefill(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    whole_from: Tensor,
    scale: float,
    total: int,
) -> Tensor:
    """Causal attention of the last T of a sequence's S tokens, [heads, T, D].

    queries: [heads, T, D]; heads is a multiple of H, neighbours share a KV head.
    keys, values: [H, F, D], the first F of the S tokens as they are read from afar.
    near_keys, near_values: [H, N, D], the last N of the S tokens, whole.
    whole_from: int64 [T], ascending, the first token that each query reads whole; all are at most
        F and at least S − N.
    total: S.
    """
    if not whole_from.any():
        return dense(queries, near_keys, near_values, scale)
    count, first = queries.shape[1], total - queries.shape[1]
    positions = torch.arange(total, device=queries.device)
    near_start, starts = total - near_keys.shape[1], whole_from.tolist()
    grouped = torch.unflatten(queries, 0, (near_keys.shape[0], -1))  # [H, group, T, D]
    out = torch.empty_like(grouped)
    for low in range(0, count, _ROWS):
        high = min(low + _ROWS, count)
        rows = grouped[:, :, low:high].flatten(1, 2)  # [H, group · rows, D]
        far, near = slice(0, starts[high - 1]), slice(starts[low], first + high)
        at = slice(near.start - near_start, near.stop - near_start)
        begin, now = whole_from[low:high, None], positions[first + low : first + high, None]
        hidden = torch.cat(
            [positions[far] >= begin, (positions[near] < begin) | (positions[near] > now)], -1
        )  # [rows, tokens]
        logits = torch.cat(
            [rows @ keys[:, far].transpose(1, 2), rows @ near_keys[:, at].transpose(1, 2)], -1
        ).float()
        logits = torch.unflatten(logits, 1, (-1, high - low)).mul_(scale)
        weights = logits.masked_fill_(hidden, -math.inf).softmax(-1).to(values.dtype).flatten(1, 2)
        mixed = weights[..., : far.stop] @ values[:, far]
        mixed += weights[..., far.stop :] @ near_values[:, at]
        out[:, :, low:high] = torch.unflatten(mixed, 1, (-1, high - low))
    return out.flatten(0, 1)


def dense(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of N tokens, all whole, [heads, T, D].

    queries: [heads, T, D].   keys, values: [H, N, D].
    """
    count, total, mask = queries.shape[1], keys.shape[1], None
    if count < total:
        mask = torch.ones(count, total, dtype=torch.bool, device=keys.device).tril(total - count)
    out = scaled_dot_product_attention(
        queries[None],  # its fast ways take four dimensions
        keys[None],
        values[None],
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=len(queries) != len(keys),
    )
    return out[0]
