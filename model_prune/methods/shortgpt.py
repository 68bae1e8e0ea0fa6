"""ShortGPT: layers of least influence go, wherever they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model_prune.core.blocks import Blocks
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import Cosine
from model_prune.method import Depth


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Depth):
    """Remove the layers of lowest block influence, 1 − mean_t cos(input, output).

    Source: Men et al., "ShortGPT: layers in large language models are more redundant than you
    expect" (2024, arXiv:2403.03853), equation 1.
    Defaults: 64 windows of 1,024 tokens of any text; the paper reads PG19.
    Cost: one forward pass over the calibration text.
    """

    name = "shortgpt"
    windows = 64
    tokens = 1024

    def recipe(self, decoder: Decoder) -> Blocks:
        """See Method."""
        count = self.count(decoder)

        def choose(cosines: Sequence[Tensor]) -> list[int]:
            # Sums over as many tokens in every layer rank as the means do.
            order = np.argsort([-float(total) for total in cosines], kind="stable")
            return sorted(int(i) for i in order[:count])

        return Blocks(Cosine, choose)
