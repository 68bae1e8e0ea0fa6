"""Which channels the thin keys of new pages hold: ThinK's scores under the three policies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rag_prune.kv.think import best_channels, channel_scores


def by_prompt(queries: Tensor, keys: Tensor, kept: int, window: int) -> Tensor:
    """Those that the last `window` queries of a call need of its keys, [..., H, kept].

    queries: [..., heads, T, D].   keys: [..., H, T, D].
    """
    return best_channels(channel_scores(queries[..., -window:, :], keys), kept)


def causal(
    queries: Tensor,
    keys: Tensor,
    kept: int,
    window: int,
    ends: Sequence[int],
    before: Tensor | None,
) -> Tensor:
    """Those that each page's last `window` queries need of their keys, [pages, ..., H, kept].

    queries: [..., heads, T, D].   keys: [..., H, T, D].
    ends: of each page, in tokens of this call.
    before: [..., H, kept], those of the page before, which a page takes over that has fewer than
        `window` tokens before its end; None if there is none.
    """
    chosen = []
    for end in ends:
        last = slice(max(0, end - window), end)
        if before is None or end >= window:
            scores = channel_scores(queries[..., last, :], keys[..., last, :])
            before = best_channels(scores, kept)
        chosen.append(before)
    return torch.stack(chosen)
