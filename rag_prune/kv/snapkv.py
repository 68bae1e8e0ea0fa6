"""SnapKV: which tokens of the prompt the newest queries attend to (arXiv 2404.14469).

Evicting tokens first and pruning channels of those that stay is how ThinK's paper combines the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Keep `tokens` of the prompt for each KV head, the last `window` of them whatever their score.

    tokens: kept of a longer prompt; a shorter one stays as it is.
    window: newest queries whose attention scores the tokens before them.
    kernel: scores are max-pooled over this many tokens, so that neighbours stay together; odd.

    The defaults are those of ThinK's experiments. Raises InputError for counts that fit no prompt.
    """

    tokens: int
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        if self.window < 1 or self.tokens <= self.window:
            raise InputError(
                f"SnapKV needs a window of at least one token and tokens above it, got "
                f"window={self.window} and tokens={self.tokens}."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"SnapKV's kernel must be odd and positive, got {self.kernel}.")

    def select(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor | None:
        """The tokens that stay, ascending, int64 [B, H, tokens]; None if all of them do.

        queries: [B, heads, T, D] and keys: [B, H, T, D], of the whole prompt, after RoPE.

        A token's score is the attention it gets, summed over the window's queries (section 4.2),
        and averaged over the heads that share its key.
        """
        count = keys.shape[2]
        if count <= self.tokens:
            return None
        grouped = torch.unflatten(queries[:, :, -self.window :], 1, (keys.shape[1], -1)).float()
        logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped, keys.float()) * scale
        last = torch.arange(count - self.window, count, device=keys.device)
        hidden = torch.arange(count, device=keys.device) > last[:, None]
        weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
        attention = weights.sum(-2).mean(2)[..., : -self.window]
        scores = max_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        scores = pad(scores, (0, self.window), value=math.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return order[..., : self.tokens].sort(dim=-1).values
