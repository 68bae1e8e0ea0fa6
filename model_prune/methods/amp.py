"""AMP: heads and neurons that add little to the residual stream go, alike in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model_prune.core.allocate import everywhere_alike
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import AbsoluteMean, Statistic
from model_prune.core.structured import Compensation, Gathered, Structured
from model_prune.core.target import UNITS, Dims, Family
from model_prune.method import Units


@dataclass(frozen=True, kw_only=True)
class AMP(Units):
    """Cut the units whose output is smallest, the same number in every layer.

    Source: Mugnaini et al., "Efficient LLMs with AMP: attention heads and MLP pruning" (2025,
    arXiv:2504.21174) and its code. A head counts mean_t ‖W_o,h a_t,h‖₁, what it adds to the
    residual stream; a KV group counts the sum of its heads.
    Defaults: the code reads 50 Alpaca prompts; here 50 windows of 512 tokens of any text.
    Differs: rounding to whole KV groups is made up for in weights, where the code trades one head
    for one neuron; a window is read as it is, where the code lets the model generate.
    Cost: one forward pass over the calibration text, and o's multiplication head by head.

    neuron: "projected" mean_t |a_tj| · ‖W_down:j‖₁, as the paper's abstract has it; "activation"
    mean_t |a_tj|, as its code does.
    """

    name = "amp"
    windows = 50
    tokens = 512
    neuron: Literal["projected", "activation"] = "projected"
    compensation: Compensation = "none"

    def recipe(self, decoder: Decoder) -> Structured:
        """See Method."""
        scores = Gathered(UNITS, _statistics, self._score)
        return Structured(self.remove, scores, everywhere_alike(), self.compensation)

    def _score(
        self, family: Family, layer: Any, statistics: Mapping[str, Any], dims: Dims
    ) -> Tensor:
        if family == "kv_group":
            heads: Tensor = statistics["heads"].mean
            return heads.view(dims.kv_groups, dims.group).sum(1)
        size: Tensor = statistics["inputs"].mean
        if self.neuron == "projected":
            size = size * layer.mlp.down_proj.weight.float().abs().sum(0)
        return size


def _statistics(family: Family, layer: Any, dims: Dims) -> dict[str, Statistic]:
    if family == "neuron":
        return {"inputs": AbsoluteMean()}
    return {"heads": _HeadOutputs(layer.self_attn.o_proj.weight, dims)}


class _HeadOutputs:
    """Mean over tokens of ‖W_o,h a_t,h‖₁ of each query head."""

    def __init__(self, weight: Tensor, dims: Dims) -> None:
        self.tokens = 0
        # [heads, head_dim, hidden]
        self._weight = weight.float().T.reshape(dims.heads, dims.head_dim, -1)
        self._sum = torch.zeros(dims.heads, dtype=torch.float64, device=weight.device)

    def update(self, x: Tensor) -> None:
        self.tokens += len(x)
        heads = x.reshape(len(x), *self._weight.shape[:2]).transpose(0, 1)
        for h, inputs in enumerate(heads):  # one at a time, as [heads, tokens, hidden] is large
            self._sum[h] += (inputs @ self._weight[h]).abs().sum()

    def total(self) -> Tensor:
        """float64 [heads]."""
        return self._sum

    @property
    def mean(self) -> Tensor:
        """float64 [heads]."""
        return self._sum / self.tokens
