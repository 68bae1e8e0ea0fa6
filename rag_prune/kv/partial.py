"""Attention over some of the tokens, and the log of its sum of exponentials, to be joined later."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """rows: [H, R, D].   keys, values: [H, N, D].   bias: [R, N], added to the logits; −inf hides.

    Returns [H, R, D] and float32 [H, R]. A row that sees none of the tokens gets something finite
    in both.
    """
    way = _by_sdpa if rows.device.type == "cpu" else _by_hand
    return way(rows, keys, values, bias, scale)


def join(one: Tensor, log_one: Tensor, other: Tensor, log_other: Tensor) -> Tensor:
    """Attention over both of two sets of tokens: [H, R, D] and [H, R] of each."""
    share = torch.sigmoid(log_other - log_one)  # of the exponentials' sum that is the other's
    return torch.lerp(one, other.to(one.dtype), share[..., None].to(one.dtype))


def _by_sdpa(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """SDPA's kernel for the CPU, which keeps the sums to itself unless asked by its own name."""
    mask = None if bias is None else bias[None, None]
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows[None], keys[None], values[None], attn_mask=mask, scale=scale
    )
    return out[0], log_sum[0]


def _by_hand(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    logits = (rows @ keys.transpose(1, 2)).float() * scale
    if bias is not None:
        logits += bias
    log_sum = logits.logsumexp(-1).nan_to_num(neginf=0.0)
    weights = (logits - log_sum[..., None]).exp()
    return weights.to(values.dtype) @ values, log_sum
