"""Random pruning: the floor that every informed method must beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_prune.core.allocate import everywhere_alike
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, by_score
from model_prune.core.structure import PerMatrix
from model_prune.core.structured import FromWeights, Structured
from model_prune.core.target import UNITS, Dims, Family
from model_prune.method import Either


@dataclass(frozen=True, kw_only=True)
class Random(Either):
    """Zero weights, or cut units, drawn at random.

    seed: of the draw; each matrix has a stream of its own, so targets do not change the others.
    """

    name = "random"
    seed: int = 0

    def recipe(self, decoder: Decoder) -> Elementwise | Structured:
        """See Method."""
        if self.remove is not None:
            return Structured(self.remove, FromWeights(UNITS, self._units), everywhere_alike())
        return Elementwise(
            by_score(self._score, self.nm or PerMatrix()),
            self.shares(decoder),
        )

    def _score(self, name: str, weight: Tensor, statistics: Mapping[str, Any]) -> Tensor:
        return self._draw(name, *weight.shape).to(weight.device)

    def _units(self, family: Family, i: int, state: Mapping[str, Tensor], dims: Dims) -> Tensor:
        return self._draw(f"layers.{i}.{family}", dims.count(family))

    def _draw(self, name: str, *shape: int) -> Tensor:
        # torch looks at 32 bits of a seed, so both go into them.
        stream = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.rand(shape, generator=stream)
