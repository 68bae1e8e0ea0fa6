"""SparseGPT: the weights that stay make up for those that go, column by column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model_prune.core.allocate import check_least
from model_prune.core.compensate import Sweep, inverse_factor
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, Solved, Weights
from model_prune.core.statistics import Gram
from model_prune.method import Elements


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Elements):
    """Zero what raises a layer's squared error least, and update the other weights at once.

    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in
    one-shot" (2023, arXiv:2301.00774), algorithm 1.
    Defaults: 128 windows of 2,048 tokens, blocks of 128 columns, damping 0.01, from the authors'
    code. Counts are exact, where that removes one weight more a block, and all that tie with it.
    Differs: matrices that share their inputs share one Gram matrix, one factor and one sweep;
    more damping is tried where that one fails, and an always-zero input's weights rank last in
    place of being zeroed besides.
    Cost: two forward passes over the calibration text, one when `order` is "staged", and a Gram
    matrix of every input.

    order: "layer", or "staged", the code's true-sequential.
    """

    name = "sparsegpt"
    windows = 128
    tokens = 2048
    block: int = 128
    damping: float = 0.01
    order: Literal["layer", "staged"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("block", self.block, 1)
        check_least("damping", self.damping, 0)

    def recipe(self, decoder: Decoder) -> Elementwise:
        """See Method."""
        return Elementwise(
            self._solve,
            self.shares(decoder),
            watch={"inputs": Gram},
            order=self.order,
        )

    def _solve(
        self, weights: Weights, statistics: Mapping[str, Any], sparsities: Mapping[str, float]
    ) -> Solved:
        gram = statistics["inputs"].total()
        factor = inverse_factor(gram, [self.damping * scale for scale in (1, 10, 100)])
        sweep = Sweep(self.block, self.nm)
        new, masks = sweep(list(weights.values()), factor, [sparsities[n] for n in weights])
        return {
            name: (weight, mask) for name, weight, mask in zip(weights, new, masks, strict=True)
        }
