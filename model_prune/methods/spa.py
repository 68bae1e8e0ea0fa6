"""SPA on decoders: units whose weights matter least, by any criterion, over all they consist of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model_prune.core.allocate import Kept, Scored, ranked_together
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.gradients import check_memory, curvature, gradients
from model_prune.core.structured import Compensation, Structured, UnitScores
from model_prune.core.target import UNITS, Dims, Family
from model_prune.core.units import MEMBERS, by_unit
from model_prune.core.work import Tensors
from model_prune.graph.importance import REDUCE, Reduce
from model_prune.method import Units

Criterion = Literal["snip", "grasp", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class SPA(Units):
    """Cut the KV groups and neurons of lowest importance, over all the weights that they hold.

    These are the coupled channels that `graph.network` finds in a decoder; of other networks see
    `graph.importance`.
    Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955), section 3.2;
    scores are divided by the mean of their layer and kind.
    Defaults: 10 windows of 64 tokens, LLM-Pruner's, as the paper prunes no language models.
    Differs: biases of q, k and v play no part.
    Cost: a forward and a backward pass over 640 tokens, with GraSP two more; the whole model and
    its gradients in memory. By magnitude none but reading the weights.

    criterion: "snip" |w·g|, "grasp" w·(H g), "magnitude" |w|; see `graph.importance`.
    reduce: how the scores of a unit's weights become one.
    """

    name = "spa"
    windows = 10
    tokens = 64
    criterion: Criterion = "snip"
    reduce: Reduce = "sum"
    compensation: Compensation = "none"

    @property
    def reads(self) -> int:
        """See Method."""
        by_weights = self.criterion == "magnitude" and self.compensation == "none"
        return 0 if by_weights else self.windows

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        scores = Importance(self.criterion, self.reduce)
        return Structured(self.remove, scores, by_their_mean, self.compensation)


@dataclass(frozen=True)
class Importance(UnitScores):
    """Importance of whole units: see `SPA`. A source of scores for `Structured`."""

    criterion: Criterion
    reduce: Reduce
    families: tuple[Family, ...] = UNITS

    def table(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        solved: Sequence[Tensors],
        progress: bool,
    ) -> Sequence[Tensors]:
        """See UnitScores."""
        if self.criterion == "magnitude":
            return [
                self._of_layer(i, decoder.state(i), {}, dims) for i, dims in enumerate(decoder.dims)
            ]
        assert calibration is not None, "checked by the caller"
        second = self.criterion == "grasp"
        check_memory(decoder, squares=second, progress=progress)
        model: Any = decoder.whole()
        found = gradients(model, calibration, progress=progress).mean
        if second:
            found = curvature(model, calibration, found, progress=progress)
        layers = enumerate(zip(model.model.layers, decoder.dims, strict=True))
        return [
            self._of_layer(i, dict(layer.named_parameters()), found, dims)
            for i, (layer, dims) in layers
        ]

    def _of_layer(
        self, i: int, state: Mapping[str, Tensor], slopes: Mapping[str, Tensor], dims: Dims
    ) -> Tensors:
        scores: Tensors = {}
        for family in self.families:
            parts = []
            for matrix in MEMBERS[family]:
                weight = state[f"{matrix}.weight"].detach().float()
                if slopes:
                    weight = weight * slopes[f"layers.{i}.{matrix}"]
                each = weight if self.criterion == "grasp" else weight.abs()
                parts.append(by_unit(family, matrix, dims, each))
            scores[family] = REDUCE[self.reduce](torch.cat(parts, 1)).cpu()
        return scores


def by_their_mean(table: Sequence[Scored], dims: Sequence[Dims], budget: float) -> Sequence[Kept]:
    """In one ranking, each layer's units of a kind by the mean of their sizes."""
    scaled: list[Scored] = [
        {family: scores / (abs(scores).mean() or 1) for family, scores in scored.items()}
        for scored in table
    ]
    return ranked_together(scaled, dims, budget)
