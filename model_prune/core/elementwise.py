"""One-shot pruning of single weights: a recipe of score, structure, allocation and compensation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from model_prune.core.calibration import Calibration
from model_prune.core.collect import Order, Step, walk
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.statistics import Statistic
from model_prune.core.structure import Structure
from model_prune.core.target import SITES
from model_prune.core.work import Layers, Tensors, Work, trim

Weights = Mapping[str, Tensor]
Solved = Mapping[str, tuple[Tensor | None, Tensor]]
# (name, weight [out, in], statistics of its inputs) -> scores [out, in], higher ones are kept
Score = Callable[[str, Tensor, Mapping[str, Any]], Tensor]
# (weights by name, statistics, sparsity by name) -> new weights, or None, and mask of each
Solve = Callable[[Weights, Mapping[str, Any], Mapping[str, float]], Solved]


def by_score(score: Score, structure: Structure) -> Solve:
    """Each matrix for itself: the lowest scores go, the weights that stay keep their values."""

    def solve(
        weights: Weights, statistics: Mapping[str, Any], sparsities: Mapping[str, float]
    ) -> Solved:
        return {
            name: (None, structure.mask(score(name, weight, statistics), sparsities[name]))
            for name, weight in weights.items()
        }

    return solve


@dataclass(frozen=True)
class Elementwise:
    """How single weights are pruned, an input site at a time.

    solve: see `Solve`; it gets the targeted matrices of one site, which share their inputs.
    sparsities: share of zeros by "layers.3.mlp.down_proj"; a matrix that is absent stays dense.
    watch: what to gather of the inputs, by the name under which `solve` finds it; with nothing to
    gather no calibration text is read.
    order: which inputs a layer sees, see `collect`.
    """

    solve: Solve
    sparsities: Mapping[str, float]
    watch: Mapping[str, Callable[[], Statistic]] = field(default_factory=dict)
    order: Order = "layer"

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        """What each layer loses; the model is not changed."""
        if self.watch:
            assert calibration is not None, "checked by the caller"
            step = Step(self._watch, self._solve, _apply)
            walk(decoder, calibration, step, order=self.order, work=work, progress=progress)
        else:
            layers = range(len(decoder.dims))
            for i in tqdm(layers, desc="pruning", unit="layer", disable=None if progress else True):
                if i not in work:
                    layer = decoder.layer(i)
                    result: Tensors = {}
                    for site in SITES:
                        result |= self._solve(i, layer, site, {})
                    work[i] = result
                    del layer  # before the next is made, so that there is never more than one
                    trim()
        return Layers(work, len(decoder.dims), LayerPlan.from_tensors)

    def _targets(self, i: int, site: str) -> dict[str, str]:
        names = {matrix: f"layers.{i}.{matrix}" for matrix in SITES[site]}
        return {matrix: name for matrix, name in names.items() if name in self.sparsities}

    def _watch(self, i: int, layer: nn.Module) -> dict[str, dict[str, Statistic]]:
        return {
            site: {name: make() for name, make in self.watch.items()}
            for site in SITES
            if self._targets(i, site)
        }

    def _solve(self, i: int, layer: nn.Module, site: str, statistics: Mapping[str, Any]) -> Tensors:
        targets = self._targets(i, site)
        weights = {name: _weight(layer, matrix).float() for matrix, name in targets.items()}
        solved = self.solve(weights, statistics, self.sparsities) if targets else {}
        plan = LayerPlan(
            masks={matrix: solved[name][1] for matrix, name in targets.items()},
            weights={
                matrix: new
                for matrix, name in targets.items()
                if (new := solved[name][0]) is not None
            },
        )
        return plan.tensors()


def _apply(i: int, layer: nn.Module, tensors: Tensors) -> None:
    plan = LayerPlan.from_tensors(tensors)
    for matrix, weight in plan.weights.items():
        _weight(layer, matrix).copy_(weight)
    for matrix, mask in plan.masks.items():
        weight = _weight(layer, matrix)
        weight.mul_(mask.to(weight.device))


def _weight(layer: nn.Module, matrix: str) -> Tensor:
    weight = layer.get_submodule(matrix).weight
    assert isinstance(weight, Tensor)
    return weight
