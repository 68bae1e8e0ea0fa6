"""CFSP: neurons with large inputs stay, and layers that turn the hidden states more keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model_prune.core.allocate import Kept, Scored, spread_out, without_lowest
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import Cosine, SquaredNorm, Statistic, angle
from model_prune.core.structured import Compensation, Gathered, Structured
from model_prune.core.target import Dims, Family
from model_prune.method import Units
from prune_core.errors import InputError

_SLOPE = 13.1  # of the mean angle: what the code's sum of angles / 10⁴ is with 128 × 1,024 tokens


@dataclass(frozen=True, kw_only=True)
class CFSP(Units):
    """Cut neurons only; how many of each layer by how far it turns its input.

    Source: Wang et al., "CFSP: an efficient structured pruning framework for LLMs with
    coarse-to-fine activation information" (2024, arXiv:2409.13199) and its code. A layer keeps
    in proportion to sigmoid(slope · (its mean angle − the mean over layers)).
    Defaults: 128 windows of 1,024 tokens.
    Differs: the code sums angles over tokens, so that its slope depends on how many there are;
    here it is that of its own default, whatever is read.
    Cost: one forward pass over the calibration text.

    slope: of the coarse part, as a multiple of the code's; 0 keeps the same of every layer.
    score: the code adds up shares of |W_down| · ‖x_j‖, |W_up| and |W_gate| that each add up to one
    over what they are averaged over, so that its score is the norm of the input j alone: "norm".
    "row" takes the shares over the neurons, so that weights count.
    """

    name = "cfsp"
    windows = 128
    tokens = 1024
    slope: float = 1.0
    score: Literal["norm", "row"] = "norm"
    compensation: Compensation = "none"

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        scores = Gathered(
            ("neuron",),
            _statistics,
            self._score,
            signal=(lambda: Cosine(angle), lambda found: float(found.mean)),
        )
        return Structured(self.remove, scores, self._allocate, self.compensation)

    def _score(
        self, family: Family, layer: Any, statistics: Mapping[str, Any], dims: Dims
    ) -> Tensor:
        norm: Tensor = statistics["inputs"].norm
        if self.score == "norm":
            return norm
        down, up, gate = (
            layer.mlp.down_proj.weight.float().abs() * norm,
            layer.mlp.up_proj.weight.float().abs().T,
            layer.mlp.gate_proj.weight.float().abs().T,
        )
        shares = torch.stack([part / part.sum(1, keepdim=True) for part in (down, up, gate)])
        return shares.sum(0).mean(0) * norm

    def _allocate(
        self, table: Sequence[Scored], dims: Sequence[Dims], budget: float
    ) -> Sequence[Kept]:
        """More of the layers that turn their input less."""
        neurons = [each.neurons for each in dims]
        share = budget / sum(each.neurons * each.cost("neuron") for each in dims)
        if share >= 1:
            raise InputError(
                f"CFSP cuts neurons only, and remove asks for {share:.0%} of them: remove less."
            )
        angles = np.array([scored["signal"][0] for scored in table])
        gates = 1 / (1 + np.exp(-self.slope * _SLOPE * (angles - angles.mean())))
        most = gates.max() / gates.mean() * (1 - share)
        if most >= 1:  # a layer would keep more than it has: all are drawn towards their mean
            room = (1 / (1 - share) - 1) * gates.mean() / (gates.max() - gates.mean()) / 1.05
            gates = gates.mean() + room * (gates - gates.mean())
        gone = 1 - gates / gates.mean() * (1 - share)
        counts = spread_out(share * sum(neurons), (gone * neurons).tolist())
        return [
            {"neuron": without_lowest(scored["neuron"], count)}
            for scored, count in zip(table, counts, strict=True)
        ]


def _statistics(family: Family, layer: Any, dims: Dims) -> dict[str, Statistic]:
    return {"inputs": SquaredNorm()}
