"""Wanda: weights that meet small inputs go, however large they are themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, by_score
from model_prune.core.statistics import SquaredNorm
from model_prune.core.structure import PerRow
from model_prune.method import Elements


@dataclass(frozen=True, kw_only=True)
class Wanda(Elements):
    """Of each output's weights, zero those of smallest |W_ij| · ‖x_j‖.

    Source: Sun et al., "A simple and effective pruning approach for large language models"
    (2023, arXiv:2306.11695), equation 1 and algorithm 1. Weights keep their values.
    Defaults: 128 windows of 2,048 tokens, from the authors' code.
    Cost: two forward passes over the calibration text, one when `order` is "staged".

    order: "layer" is the paper's. "staged" gathers o's inputs after q, k and v are pruned, and so
    on: a variant that takes half the time and sees what the pruned model will see.
    """

    name = "wanda"
    windows = 128
    tokens = 2048
    order: Literal["layer", "staged"] = "layer"

    def recipe(self, decoder: Decoder) -> Elementwise:
        """See Method."""
        structure = self.nm or PerRow()
        return Elementwise(
            by_score(score, structure),
            self.shares(decoder),
            watch={"inputs": SquaredNorm},
            order=self.order,
        )


def score(name: str, weight: Tensor, statistics: Mapping[str, Any]) -> Tensor:
    """|W_ij| · ‖x_j‖, [out, in]; statistics["inputs"] holds the norms."""
    norm: Tensor = statistics["inputs"].norm
    return weight.abs() * norm
