"""Adapt-Pruner: many small steps, each taking more from layers that change their input less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from model_prune.core.allocate import check_least, spread_out, units_of, without_lowest
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.gradients import BATCH_TOKENS, check_memory
from model_prune.core.mask import units_masked
from model_prune.core.mode import evaluating
from model_prune.core.plan import LayerPlan
from model_prune.core.schedule import linear
from model_prune.core.statistics import Cosine
from model_prune.core.structure import removed_count
from model_prune.core.target import UNITS, Dims, Family
from model_prune.core.work import Work
from model_prune.method import Units
from model_prune.methods.llm_pruner import Taylor
from model_prune.plan import Plan
from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AdaptPruner(Units):
    """Cut units in small steps, measuring layers and units anew on what is left after each.

    A step adds Δ − A · I_l to the share that layer l loses, where I_l is minus the mean cosine of
    its input and output, centred and scaled to [−1, 1]; within a layer the units of lowest
    first-order Taylor importance go.

    Source: Pan et al., "Adapt-Pruner: adaptive structural pruning for efficient small language
    model training" (2025, arXiv:2502.03460), section 3.1 and its code.
    Defaults: 512 windows of 64 tokens, Δ = 1/50, A = 0.02.
    Differs: the last step is cut short so that the total is met; a share never falls, as what is
    cut cannot come back; a layer keeps one unit of each kind.
    Cost: for each step a forward and a backward pass; the whole model and its gradients in memory.

    steps: 1/Δ, the number of steps that would remove everything.   amplitude: A.
    """

    name = "adapt_pruner"
    windows = 512
    tokens = 64
    steps: int = 50
    amplitude: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("steps", self.steps, 1)
        check_least("amplitude", self.amplitude, 0)

    def recipe(self, decoder: Decoder) -> _Adaptive:
        """See Method."""
        return _Adaptive(self)


@dataclass(frozen=True)
class _Adaptive:
    method: AdaptPruner

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        assert calibration is not None, "checked by the caller"
        check_memory(decoder, squares=False, progress=progress)
        model, dims, method = decoder.whole(), decoder.dims, self.method
        taylor = Taylor()
        budget = method.remove * sum(each.weights for each in dims)
        state = _State(dims, [{f: np.ones(d.count(f), dtype=bool) for f in UNITS} for d in dims])
        bar = tqdm(
            total=100, desc="pruning", unit="%", disable=None if progress else True, leave=False
        )
        while budget - state.removed() > min(each.cost("neuron") for each in dims) / 2:
            with units_masked(model, dims, state.plans()):
                importance = layer_importance(cosines(model, calibration))
                table = taylor.of(model, dims, calibration, progress=False)
            before, shares = state.removed(), state.shares
            state.step(1 / method.steps - method.amplitude * importance, table, budget)
            if state.removed() == before and (state.shares == shares).all():
                raise InputError(
                    f"remove={method.remove:g} is more than layers give at amplitude "
                    f"{method.amplitude:g}: remove less, or take a smaller amplitude."
                )
            bar.update(100 * state.removed() / budget - bar.n)
        bar.close()
        return state.plans()


_MOST = 0.99  # the share that a layer may lose, as in the authors' code


class _State:
    """What is cut so far, and the shares that steps have added up to, which units round down."""

    def __init__(self, dims: Sequence[Dims], kept: list[dict[Family, NDArray[np.bool_]]]) -> None:
        self.dims = dims
        self.kept = kept
        self.shares = np.zeros(len(dims))

    def plans(self) -> list[LayerPlan]:
        return [LayerPlan(units=units_of(kept)) for kept in self.kept]

    def removed(self) -> int:
        """Weights that are gone."""
        return _weights(self.dims, [{f: int((~k[f]).sum()) for f in k} for k in self.kept])

    def step(
        self, increments: NDArray[np.float64], table: Sequence[dict[str, Tensor]], budget: float
    ) -> None:
        """Add increments to the shares, as much of them as the budget has room for, and cut."""
        increments = np.maximum(increments, 0)
        whole = _counts(self.dims, self._after(increments, 1.0))
        fraction = 1.0
        if _weights(self.dims, whole) > budget:
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                over = _weights(self.dims, _counts(self.dims, self._after(increments, middle)))
                low, high = (low, middle) if over > budget else (middle, high)
            fraction = low
        self.shares = self._after(increments, fraction)
        counts = _counts(self.dims, self.shares)
        if fraction < 1:
            # What is left is less than one more unit of some kind: neurons fill it.
            left = (budget - _weights(self.dims, counts)) / self.dims[0].cost("neuron")
            room = [d.neurons - 1 - c["neuron"] for d, c in zip(self.dims, counts, strict=True)]
            for count, extra in zip(counts, spread_out(left, room), strict=True):
                count["neuron"] += extra
        for kept, count, scores in zip(self.kept, counts, table, strict=True):
            for family in UNITS:
                ranked = scores[family].double().numpy().copy()
                ranked[~kept[family]] = -np.inf  # what is gone stays gone
                kept[family] = without_lowest(
                    ranked, max(count[family], int((~kept[family]).sum()))
                )

    def _after(self, increments: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
        return np.minimum(self.shares + fraction * increments, _MOST)


def _counts(dims: Sequence[Dims], shares: NDArray[np.float64]) -> list[dict[Family, int]]:
    return [
        {f: min(removed_count(each.count(f), share), each.count(f) - 1) for f in UNITS}
        for each, share in zip(dims, shares, strict=True)
    ]


def _weights(dims: Sequence[Dims], counts: Sequence[dict[Family, int]]) -> int:
    pairs = zip(dims, counts, strict=True)
    return sum(count[f] * each.cost(f) for each, count in pairs for f in UNITS)


def layer_importance(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """−cos, centred and scaled to [−1, 1]; zero for layers that are all alike."""
    centred = -cosine + cosine.mean()
    largest = np.abs(centred).max()
    scaled: NDArray[np.float64] = centred / largest if largest > 0 else centred
    return scaled


@torch.no_grad()
def cosines(model: Any, calibration: Calibration) -> NDArray[np.float64]:
    """Mean over tokens of cos(input, output) of every layer, as the model is now."""
    statistics = [Cosine() for _ in model.model.layers]

    def watch(statistic: Cosine) -> Any:
        return lambda module, args, output: statistic.update(
            torch.cat([args[0], output], -1).float()
        )

    handles = [
        layer.register_forward_hook(watch(statistic))
        for layer, statistic in zip(model.model.layers, statistics, strict=True)
    ]
    try:
        tokens = calibration.windows.shape[1]
        with evaluating(model):
            for ids in torch.split(calibration.windows, max(1, BATCH_TOKENS // tokens)):
                model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return np.array([statistic.mean for statistic in statistics])


def prune_and_train(
    model: nn.Module,
    method: AdaptPruner,
    calibration: Calibration,
    train: Callable[[nn.Module], None],
    *,
    stages: int = 5,
    progress: bool = True,
) -> list[Plan]:
    """Interleave: cut a part, train on what is left, and so on; the plans that were applied.

    The model is pruned in place to `method.remove` of the weights that it has now, in `stages`
    equal parts, each followed by `train(model)`, which must leave its shapes alone. Source: as
    AdaptPruner's, section 3.2, five stages.
    """
    config: Any = model.config
    total = sum(Dims.of(config, i).weights for i in range(config.num_hidden_layers))
    plans = []
    for gone in linear(method.remove, stages):
        config = model.config
        now = sum(Dims.of(config, i).weights for i in range(config.num_hidden_layers))
        # A stage of less than a neuron may have been rounded up, and leave nothing to the next.
        share = max(0.0, 1 - (1 - gone) * total / now)
        plan = replace(method, remove=share).plan(model, calibration, progress=progress)
        plan.apply(model)
        plans.append(plan)
        train(model)
    return plans
