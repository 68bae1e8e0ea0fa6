"""Mustafar: each token keeps the largest entries of its key and value (arXiv 2505.22913).

Section 3: per token and head, by magnitude, for keys and values alike. The published format stores
tiles of 64 with padding and offsets; here every token keeps exactly as many entries, so that a
packed token has a fixed size and can lie in a page:

    bitmap   head_size / 8 bytes, channel c in bit c % 8 of byte c // 8
    values   the kept entries in ascending order of channel
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_prune.kv.think import best_channels


def largest(x: Tensor, kept: int) -> Tensor:
    """The channels of the `kept` entries of largest magnitude, ascending; ties to the lower one.

    x: [..., head_size].   Returns int64 [..., kept].

    The published code keeps all entries at least as large as the (head_size · ratio)-th smallest,
    which is one more than the ratio says, and more where entries tie.
    """
    return best_channels(x.abs(), kept)


def pack(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmap, uint8 [..., head_size / 8], and the entries of `channels`, [..., kept].

    x: [..., head_size], which is a multiple of 8.   channels: ascending, [..., kept].
    """
    bits = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, channels, 1)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    bitmap = (torch.unflatten(bits, -1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return bitmap, x.gather(-1, channels)


def channels_of(bitmap: Tensor, kept: int) -> Tensor:
    """The channels that a bitmap names, ascending, int64 [..., kept]."""
    bits = bitmap[..., None] >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
    return best_channels(bits.flatten(-2).to(torch.int8), kept)


def unpack(bitmap: Tensor, values: Tensor) -> Tensor:
    """What `pack` was given, with zeros for the entries it dropped. [..., head_size]."""
    channels = channels_of(bitmap, values.shape[-1])
    whole = values.new_zeros(*bitmap.shape[:-1], bitmap.shape[-1] * 8)
    return whole.scatter_(-1, channels, values)
