"""FLAP: units whose inputs hardly fluctuate go, and a bias takes the place of their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from model_prune.core.allocate import Kept, Scored, ranked_together, standardised
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import Moments, Statistic
from model_prune.core.structured import Compensation, Gathered, Structured
from model_prune.core.target import UNITS, Dims, Family
from model_prune.core.units import READER
from model_prune.method import Units


@dataclass(frozen=True, kw_only=True)
class FLAP(Units):
    """Cut the KV groups and neurons of lowest fluctuation, ranked over the whole model at once.

    Source: An et al., "Fluctuation-based adaptive structured pruning for large language models"
    (2023, arXiv:2312.11983), equations 3 to 6; the code's metric WIFV and structure AL-AM.
    Defaults: 1,024 windows of 128 tokens, from the authors' README.
    Differs: a head's place is taken by its KV group, so models with grouped queries are cut whole;
    the variance is that of the tokens, which the code's recursion only approximates; a bias that
    is there already is kept; and the best unit of each kind stays in every layer.
    Cost: one forward pass over the calibration text.

    metric: of column j of o and down: "WIFV" var(x_j) · Σ_i W_ij², "IFV" var(x_j), "WIFN" the
    mean over i of |W_ij| · ‖x_j‖.
    compensation: "bias" is the paper's; "least_squares" refits the columns that stay.
    """

    name = "flap"
    windows = 1024
    tokens = 128
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    compensation: Compensation = "bias"

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        scores = Gathered(UNITS, _moments, self._score)
        return Structured(self.remove, scores, _by_rank, self.compensation)

    def _score(
        self, family: Family, layer: Any, statistics: Mapping[str, Any], dims: Dims
    ) -> Tensor:
        """Of columns, [units, columns of one]; standardised when all are known."""
        weight: Tensor = layer.get_submodule(READER[family]).weight.float()
        moments: Moments = statistics["inputs"]
        if self.metric == "WIFN":
            scores = (weight.abs() * moments.norm).mean(0)
        elif self.metric == "IFV":
            scores = moments.variance
        else:
            scores = moments.variance * weight.square().sum(0)
        return scores.view(dims.count(family), -1)


def _moments(family: Family, layer: Any, dims: Dims) -> dict[str, Statistic]:
    return {"inputs": Moments()}


def _by_rank(table: Sequence[Scored], dims: Sequence[Dims], budget: float) -> Sequence[Kept]:
    """Columns are standardised within a layer, and a unit's score is the mean of its columns'.

    Attention's are squared before, as in the authors' code, whose paper does not say so.
    """
    standard: list[Scored] = [
        {
            family: standardised(columns**2 if family == "kv_group" else columns).mean(1)
            for family, columns in scored.items()
        }
        for scored in table
    ]
    return ranked_together(standard, dims, budget)
