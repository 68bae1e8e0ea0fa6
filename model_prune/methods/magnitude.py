"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model_prune.core.allocate import erk, everywhere_alike, in_one_ranking
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, by_score
from model_prune.core.structure import PerMatrix
from model_prune.core.structured import FromWeights, Structured
from model_prune.core.target import UNITS, Dims, Family, place_of
from model_prune.core.units import MEMBERS, by_unit
from model_prune.method import Either
from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Magnitude(Either):
    """Zero the weights of smallest absolute value, or cut the units of smallest norm.

    Source: Han et al., "Learning both weights and connections for efficient neural networks"
    (2015, arXiv:1506.02626), section 3.1, without retraining; units by the norm of all their
    weights, after Li et al., "Pruning filters for efficient convnets" (2016, arXiv:1608.08710).
    Cost: none but reading the weights.

    allocation: of single weights: "uniform", the same share of every matrix; "global", the lowest
    of all in one ranking; "erk", more of large matrices.
    """

    name = "magnitude"
    allocation: Literal["uniform", "global", "erk"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation != "uniform" and (self.pattern or self.sparsities):
            raise InputError(
                f"allocation='{self.allocation}' finds each matrix's share, so pattern and "
                f"sparsities cannot say it too: leave them out."
            )

    def recipe(self, decoder: Decoder) -> Elementwise | Structured:
        """See Method."""
        if self.remove is not None:
            return Structured(self.remove, FromWeights(UNITS, _norm), everywhere_alike())
        shares = self.shares(decoder)
        if self.allocation == "erk":
            shares = erk({name: _shape(decoder, name) for name in shares}, self.share)
        elif self.allocation == "global":
            shares = in_one_ranking(lambda: _scores(decoder, list(shares)), self.share)
        return Elementwise(by_score(_score, self.nm or PerMatrix()), shares)


def _shape(decoder: Decoder, name: str) -> tuple[int, int]:
    layer, matrix = place_of(name)
    return decoder.dims[layer].shape(matrix)


def _scores(decoder: Decoder, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        layer, matrix = place_of(name)
        yield name, decoder.state(layer)[f"{matrix}.weight"].abs()


def _score(name: str, weight: Tensor, statistics: Mapping[str, Any]) -> Tensor:
    return weight.abs()


def _norm(family: Family, i: int, state: Mapping[str, Tensor], dims: Dims) -> Tensor:
    parts = [
        by_unit(family, matrix, dims, state[f"{matrix}.weight"].float())
        for matrix in MEMBERS[family]
    ]
    return torch.cat(parts, 1).square().sum(1).sqrt()
