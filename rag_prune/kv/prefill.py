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
    valid: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S tokens, [B, heads, T, D].

    queries: [B, heads, T, D]; heads is a multiple of H, neighbours share a KV head.
    keys, values: [B, H, F, D], the first F of the S tokens as they are read from afar.
    near_keys, near_values: [B, H, N, D], the last N of the S tokens, whole.
    whole_from: int64 [T], ascending, the first token that each query reads whole; all are at most
        F and at least S − N.
    total: S.   valid: bool [B, S], False for the padding; a query that sees no token gets zeros.
    """
    count, first = queries.shape[2], total - queries.shape[2]
    positions = torch.arange(total, device=queries.device)
    if not whole_from.any():
        return _dense(queries, near_keys, near_values, positions[first:], scale, valid)
    near_start, starts = total - near_keys.shape[2], whole_from.tolist()
    grouped = torch.unflatten(queries, 1, (near_keys.shape[1], -1))  # [B, H, group, T, D]
    out = torch.empty_like(grouped)
    for low in range(0, count, _ROWS):
        high = min(low + _ROWS, count)
        rows = grouped[:, :, :, low:high].flatten(2, 3)  # [B, H, group · rows, D]
        far, near = slice(0, starts[high - 1]), slice(starts[low], first + high)
        at = slice(near.start - near_start, near.stop - near_start)
        begin, now = whole_from[low:high, None], positions[first + low : first + high, None]
        hidden = torch.cat(
            [positions[far] >= begin, (positions[near] < begin) | (positions[near] > now)], -1
        )  # [rows, tokens]
        if valid is not None:
            seen = torch.cat([valid[:, far], valid[:, near]], -1)
            hidden = (hidden | ~seen[:, None])[:, None, None]  # [B, 1, 1, rows, tokens]
        logits = torch.cat(
            [rows @ keys[:, :, far].transpose(2, 3), rows @ near_keys[:, :, at].transpose(2, 3)], -1
        ).float()
        logits = (
            torch.unflatten(logits, 2, (-1, high - low)).mul_(scale).masked_fill_(hidden, -math.inf)
        )
        weights = logits.softmax(-1)
        if valid is not None:
            weights = weights.nan_to_num(0.0)
        weights = weights.to(values.dtype).flatten(2, 3)
        mixed = weights[..., : far.stop] @ values[:, :, far]
        mixed += weights[..., far.stop :] @ near_values[:, :, at]
        out[:, :, :, low:high] = torch.unflatten(mixed, 2, (-1, high - low))
    return out.flatten(1, 2)


def _dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    valid: Tensor | None,
) -> Tensor:
    total, first = keys.shape[2], int(positions[0])
    mask = None
    if valid is not None or first:
        mask = torch.arange(total, device=keys.device) <= positions[:, None]
        if valid is not None:
            mask = (mask & valid[:, None])[:, None]
    gqa = queries.shape[1] != keys.shape[1]
    out = scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
    )
    return out if valid is None else out.nan_to_num(0.0)
