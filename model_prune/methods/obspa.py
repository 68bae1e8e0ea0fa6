"""OBSPA on decoders: units that cost least when the others make up for them, which they then do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_prune.core.compensate import inverse_factor, rise
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import Gram, Statistic
from model_prune.core.structured import Gathered, Structured
from model_prune.core.target import UNITS, Dims, Family
from model_prune.core.units import READER
from model_prune.method import Units
from model_prune.methods.spa import by_their_mean


@dataclass(frozen=True, kw_only=True)
class OBSPA(Units):
    """Cut the KV groups and neurons whose loss costs their readers least, and refit the readers.

    These are the coupled channels that `graph.network` finds in a decoder; of other networks see
    `graph.readers.obspa`.
    Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955), section 3.3; scores
    are divided by the mean of their layer and kind, section 3.2.
    Defaults: 128 windows of 2,048 tokens, SparseGPT's, as the paper prunes no language models.
    Differs: columns that stay are refitted at once, which is where one update after another ends.
    Cost: one forward pass over the calibration text, and a factorisation for each reader.
    """

    name = "obspa"
    windows = 128
    tokens = 2048

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        scores = Gathered(UNITS, _moments, _score)
        return Structured(self.remove, scores, by_their_mean, "least_squares")


def _moments(family: Family, layer: Any, dims: Dims) -> dict[str, Statistic]:
    return {"least_squares": Gram()}  # under the compensation's name, which is of the same


def _score(family: Family, layer: Any, statistics: Mapping[str, Any], dims: Dims) -> Tensor:
    weight = layer.get_submodule(READER[family]).weight
    factor = inverse_factor(statistics["least_squares"].total())
    columns = torch.arange(weight.shape[1], device=weight.device)
    return rise(weight, factor.T @ factor, columns.view(dims.count(family), -1))
