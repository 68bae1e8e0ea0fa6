"""RIA: a weight counts by its share of its row and column, and by what it meets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from model_prune.core.allocate import check_least
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, by_score
from model_prune.core.statistics import SquaredNorm
from model_prune.core.structure import PerMatrix
from model_prune.method import Elements


@dataclass(frozen=True, kw_only=True)
class RIA(Elements):
    """Zero the weights of smallest (|W_ij|/Σ_i |W_ij| + |W_ij|/Σ_j |W_ij|) · ‖x_j‖^a.

    Source: Zhang et al., "Plug-and-play: an efficient post-training pruning method for large
    language models" (ICLR 2024), equation 4; a = 0.5 and a ranking of the whole matrix are its
    code's. The paper's permutation of channels before N:M is not part of this.
    Defaults: 128 windows of 2,048 tokens.
    Cost: as Wanda's.

    power: a, how much the inputs count, >= 0.
    """

    name = "ria"
    windows = 128
    tokens = 2048
    power: float = 0.5
    order: Literal["layer", "staged"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("power", self.power, 0)

    def recipe(self, decoder: Decoder) -> Elementwise:
        """See Method."""
        return Elementwise(
            by_score(self._score, self.nm or PerMatrix()),
            self.shares(decoder),
            watch={"inputs": SquaredNorm},
            order=self.order,
        )

    def _score(self, name: str, weight: Tensor, statistics: Mapping[str, Any]) -> Tensor:
        size = weight.abs()
        # A row or column of zeros has no shares to give: its weights rank last anyway.
        columns, rows = (size.sum(axis, keepdim=True).clamp_min(1e-38) for axis in (0, 1))
        norm: Tensor = statistics["inputs"].norm
        return (size / columns + size / rows) * norm**self.power
