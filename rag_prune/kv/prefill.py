"""Attention of many new tokens at once: those of each query's window whole, older ones pruned.

Which tokens a query reads whole depends on its position alone, so a prompt gives the same result in
one call, in chunks, and computed again after preemption.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_ROWS = 64  # queries at a time; more of them see more tokens that are hidden from some


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
    count, first = queries.shape[1], total - queries.shape[1]
    if not first and not whole_from.any():
        return dense(queries, near_keys, near_values, scale)
    positions = torch.arange(total, device=queries.device)
    near_start, starts = total - near_keys.shape[1], whole_from.tolist()
    grouped = torch.unflatten(queries, 0, (near_keys.shape[0], -1))  # [H, group, T, D]
    out = torch.empty_like(grouped)
    for low in range(0, count, _ROWS):
        high = min(low + _ROWS, count)
        rows = grouped[:, :, low:high].flatten(1, 2)  # [H, group · rows, D]
        near = slice(starts[low], first + high)
        begin, now = whole_from[low:high, None], positions[first + low : first + high, None]
        at = slice(near.start - near_start, near.stop - near_start)
        hidden = (positions[near] < begin) | (positions[near] > now)
        mixed, log_sum = _part(rows, near_keys[:, at], near_values[:, at], hidden, scale)
        if far := starts[high - 1]:
            hidden = positions[:far] >= begin
            afar, log_far = _part(rows, keys[:, :far], values[:, :far], hidden, scale)
            share = torch.sigmoid(log_far - log_sum)  # of the exponentials' sum that is far
            none = (whole_from[low:high] == 0).repeat(grouped.shape[1])
            share = share.masked_fill(none, 0.0)[..., None].to(mixed.dtype)
            mixed = torch.lerp(mixed, afar, share)
        out[:, :, low:high] = torch.unflatten(mixed, 1, (-1, high - low))
    return out.flatten(0, 1)


def _part(
    rows: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over some of the tokens, and the log of its sum of exponentials.

    rows: [H, group · rows, D].   keys, values: [H, N, D].   hidden: bool [rows, N].
    Returns [H, group · rows, D] and float32 [H, group · rows]. A row that sees none of the tokens
    gets something finite in both.
    """
    bias = torch.zeros(hidden.shape, dtype=rows.dtype, device=rows.device)
    bias = bias.masked_fill_(hidden, -math.inf).repeat(rows.shape[1] // len(hidden), 1)
    way = _by_sdpa if rows.device.type == "cpu" else _by_hand
    return way(rows, keys, values, bias, scale)


def _by_sdpa(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """SDPA's kernel for the CPU, which keeps the sums to itself unless asked by its own name."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows[None], keys[None], values[None], attn_mask=bias[None, None], scale=scale
    )
    return out[0], log_sum[0]


def _by_hand(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    logits = (rows @ keys.transpose(1, 2)).float() * scale + bias
    log_sum = logits.logsumexp(-1).nan_to_num(neginf=0.0)
    weights = (logits - log_sum[..., None]).exp()
    return weights.to(values.dtype) @ values, log_sum


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
