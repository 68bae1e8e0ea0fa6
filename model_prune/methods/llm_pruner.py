"""LLM-Pruner: coupled units whose loss the gradient says would change least go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model_prune.core.allocate import everywhere_alike
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.gradients import check_memory, gradients
from model_prune.core.structured import Compensation, Structured, UnitScores
from model_prune.core.target import UNITS, Dims, Family
from model_prune.core.units import MEMBERS, by_unit
from model_prune.core.work import Tensors
from model_prune.method import Units
from prune_core.errors import InputError

Order = Literal["first", "second", "mixed", "vector"]


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Units):
    """Cut the KV groups and neurons of lowest Taylor importance, none of them at the ends.

    Source: Ma et al., "LLM-Pruner: on the structural pruning of large language models" (2023,
    arXiv:2305.11627), equations 3 to 5, block-wise: first-order element importance, summed over
    the rows or columns that a unit holds in each matrix and over matrices.
    Defaults: 10 windows of 64 tokens; of 32 layers the first 4 and the last 2 stay whole.
    Differs: `remove` is the share of all layers' weights, not of units in the pruned layers; KV
    groups are whole, and their rows are added up by group.
    Cost: a forward and a backward pass over 640 tokens; the whole model and its gradients in
    memory.

    order: "first" |w·g|, "second" |w²·f|, "mixed" |w·g − ½w²·f|, with f the mean squared gradient
    of single windows; "vector" |Σ w·g| over a row.
    skip_first, skip_last: layers that stay whole, as shares of all.
    """

    name = "llm_pruner"
    windows = 10
    tokens = 64
    order: Order = "first"
    skip_first: float = 4 / 32
    skip_last: float = 2 / 32
    compensation: Compensation = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_first < 0 or self.skip_last < 0 or self.skip_first + self.skip_last >= 1:
            raise InputError(
                f"skip_first and skip_last are shares of the layers that stay whole, below 1 "
                f"together, got {self.skip_first:g} and {self.skip_last:g}."
            )

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        layers = len(decoder.dims)
        ends = (int(self.skip_first * layers + 0.5), int(self.skip_last * layers + 0.5))
        return Structured(
            self.remove, Taylor(self.order), everywhere_alike(*ends), self.compensation
        )


@dataclass(frozen=True)
class Taylor(UnitScores):
    """Taylor importance of whole units: see `LLMPruner`. A source of scores for `Structured`."""

    order: Order = "first"
    families: tuple[Family, ...] = UNITS

    def table(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        solved: Sequence[Tensors],
        progress: bool,
    ) -> Sequence[Tensors]:
        """See UnitScores."""
        assert calibration is not None, "checked by the caller"
        check_memory(decoder, squares=self._squares, progress=progress)
        return self.of(decoder.whole(), decoder.dims, calibration, progress)

    @property
    def _squares(self) -> bool:
        return self.order in ("second", "mixed")

    def of(
        self, model: Any, dims: Sequence[Dims], calibration: Calibration, progress: bool
    ) -> list[Tensors]:
        """Scores of every layer of a model in memory, by family."""
        found = gradients(model, calibration, squares=self._squares, progress=progress)
        table: list[Tensors] = []
        for i, (layer, sizes) in enumerate(zip(model.model.layers, dims, strict=True)):
            scores: Tensors = {}
            for family in self.families:
                units = torch.zeros(sizes.count(family))
                for matrix in MEMBERS[family]:
                    name = f"layers.{i}.{matrix}"
                    weight = layer.get_submodule(matrix).weight.detach().float()
                    change = weight * found.mean[name]
                    if self._squares:
                        second = weight.square() * found.squares[name]
                        change = second if self.order == "second" else change - second / 2
                    units += self._reduce(family, matrix, sizes, change).cpu()
                scores[family] = units
            table.append(scores)
        return table

    def _reduce(self, family: Family, matrix: str, dims: Dims, change: Tensor) -> Tensor:
        """[out, in] -> [units]: absolute values added up, or those of whole rows or columns."""
        if self.order == "vector":
            lines = change.sum(1 - MEMBERS[family][matrix]).abs()
            return lines.view(dims.count(family), -1).sum(1)
        return by_unit(family, matrix, dims, change.abs()).sum(1)
