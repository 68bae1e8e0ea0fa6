"""Removing a run of layers that hardly turn the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_prune.core.blocks import Blocks
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import LastTokens, angle
from model_prune.method import Depth


@dataclass(frozen=True, kw_only=True)
class Angle(Depth):
    """Remove the run of layers whose input and output are closest in angle.

    Source: Gromov et al., "The unreasonable ineffectiveness of the deeper layers" (2024,
    arXiv:2403.17887), section 3.2; the pruning half of Thangarasa et al., "Self-data distillation
    for recovering quality in pruned large language models" (2024, arXiv:2410.09982). The distance
    is the mean over windows of arccos(cos(h_l, h_l+n)) / π at the last token.
    Defaults: 64 windows of 1,024 tokens of any text; the papers leave it to the user.
    Differs: the first layer always stays, as in the public code, and states are those before the
    final norm.
    Cost: one forward pass over the calibration text.
    """

    name = "angle"
    windows = 64
    tokens = 1024

    def recipe(self, decoder: Decoder) -> Blocks:
        """See Method."""
        count = self.count(decoder)
        return Blocks(LastTokens, lambda states: _closest(states, count))


def _closest(states: Sequence[Tensor], count: int) -> list[int]:
    """states: of every layer its input and output at last tokens, [windows, 2 · hidden]."""
    hidden = [*(state.chunk(2, -1)[0] for state in states), states[-1].chunk(2, -1)[1]]

    def distance(first: int) -> float:
        cosine = torch.cosine_similarity(hidden[first], hidden[first + count], dim=-1)
        return float(angle(cosine.clamp(-1, 1)).mean())

    start = min(range(1, len(states) - count + 1), key=distance)
    return list(range(start, start + count))
