"""ThinK: which channels of the keys the newest queries need (arXiv 2407.21018).

Section 3.2: dropping channel i changes the attention logits by the outer product of the queries'
and the keys' column i, whose Frobenius norm is ‖Q[:, i]‖ · ‖K[:, i]‖. The channels with the
smallest are dropped. Queries and keys are taken after RoPE; under grouped-query attention the heads
that share a key are averaged, so that there is one set of channels for each KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_scores(queries: Tensor, keys: Tensor, valid: Tensor | None = None) -> Tensor:
    """The score of each channel, [..., kv_heads, head_size]; higher ones matter more.

    queries: [..., heads, window, head_size], the newest ones, after RoPE.
    keys: [..., kv_heads, tokens, head_size], after RoPE.   heads is a multiple of kv_heads.
    valid: bool [..., n], of the n tokens up to the last key, which is the last query's too, n no
        less than window and tokens; False for the padding, whose queries and keys say nothing.

    The mean of squares, as in the published code: the square of the norms above over two counts,
    so the order is the same.
    """
    of_heads, norms = _mean_squares(queries, valid), _mean_squares(keys, valid)
    groups = norms.shape[-2], of_heads.shape[-2] // norms.shape[-2]
    return torch.unflatten(of_heads, -2, groups).mean(-2) * norms


def _mean_squares(x: Tensor, valid: Tensor | None) -> Tensor:
    """[..., heads, head_size], over the tokens of x, [..., heads, tokens, head_size]."""
    squares = x.float().square()
    if valid is None:
        return squares.mean(-2)
    seen = valid[..., None, -x.shape[-2] :, None]
    return squares.masked_fill(~seen, 0).sum(-2) / seen.sum(-2).clamp(min=1)


def best_channels(scores: Tensor, kept: int) -> Tensor:
    """The ids of the `kept` highest scores, ascending; ties go to the lower id. [..., kept] int64.

    scores: [..., head_size].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def others(ids: Tensor, head_size: int) -> Tensor:
    """The ids in [0, head_size) that are not among `ids`, ascending. [..., head_size - kept]."""
    absent = torch.ones(*ids.shape[:-1], head_size, dtype=torch.int8, device=ids.device)
    absent.scatter_(-1, ids, 0)
    order = absent.argsort(dim=-1, descending=True, stable=True)
    return order[..., : head_size - ids.shape[-1]]
