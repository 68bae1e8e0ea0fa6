"""Cutting whole units: a recipe of scores, allocation and compensation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from model_prune.core.allocate import Allocate, Kept, check_kept, units_of
from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, Watched, walk
from model_prune.core.compensate import least_squares, mean_bias
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.statistics import Gram, Moments, Statistic
from model_prune.core.target import Dims, Family
from model_prune.core.units import FAMILY, READER, SITE, places
from model_prune.core.work import Layers, Tensors, Work
from prune_core.errors import InputError

Compensation = Literal["none", "bias", "least_squares"]


class UnitScores(ABC):
    """Where the scores of units come from; by default nothing of the activations is gathered.

    families: the kinds of units that are scored, and may be cut.
    gathers: whether scores come from statistics of the dense model's activations.
    """

    families: tuple[Family, ...]
    gathers: ClassVar[bool] = False

    def watch(self, layer: Any, dims: Dims) -> Watched:
        """The statistics to gather of a layer, by site."""
        return {}

    def solve(self, layer: Any, dims: Dims, site: str, statistics: Mapping[str, Any]) -> Tensors:
        """What comes of a site: scores by family ("neuron"), or "signal"."""
        return {}

    @abstractmethod
    def table(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        solved: Sequence[Tensors],
        progress: bool,
    ) -> Sequence[Tensors]:
        """Scores of every layer: what `solve` gave for each, or found in a way of its own."""


@dataclass(frozen=True)
class Gathered(UnitScores):
    """Scores from statistics of the dense model's activations.

    statistics: what to gather for a family, by name, made for one layer.
    score: (family, layer, statistics, sizes) -> [units], higher ones are kept.
    signal: a statistic of the layer's input and output, and the number it comes down to.
    """

    families: tuple[Family, ...]
    statistics: Callable[[Family, Any, Dims], dict[str, Statistic]]
    score: Callable[[Family, Any, Mapping[str, Any], Dims], Tensor]
    signal: tuple[Callable[[], Statistic], Callable[[Any], float]] | None = None
    gathers = True

    def watch(self, layer: Any, dims: Dims) -> Watched:
        """See UnitScores."""
        watched = {SITE[family]: self.statistics(family, layer, dims) for family in self.families}
        if self.signal:
            watched["block"] = {"signal": self.signal[0]()}
        return watched

    def solve(self, layer: Any, dims: Dims, site: str, statistics: Mapping[str, Any]) -> Tensors:
        """See UnitScores."""
        if self.signal and site == "block":
            return {"signal": torch.tensor([self.signal[1](statistics["signal"])])}
        family = FAMILY[site]
        if family not in self.families:
            return {}
        return {family: self.score(family, layer, statistics, dims)}

    def table(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        solved: Sequence[Tensors],
        progress: bool,
    ) -> Sequence[Tensors]:
        """See UnitScores."""
        return solved


@dataclass(frozen=True)
class FromWeights(UnitScores):
    """Scores from a layer's weights alone.

    score: (family, layer's number, its parameters, sizes) -> [units], higher ones are kept.
    """

    families: tuple[Family, ...]
    score: Callable[[Family, int, Mapping[str, Tensor], Dims], Tensor]

    def table(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        solved: Sequence[Tensors],
        progress: bool,
    ) -> Sequence[Tensors]:
        """See UnitScores."""
        table = []
        for i, dims in enumerate(decoder.dims):
            state = decoder.state(i)
            scores: Tensors = {f: self.score(f, i, state, dims) for f in self.families}
            table.append(scores)
        return table


@dataclass(frozen=True)
class Structured:
    """How units are cut: scored, shared out over the layers, and made up for.

    remove: share of the decoder layers' weights that goes, as near as whole units allow.
    compensation: "bias" adds what the cut columns gave on average; "least_squares" refits the
    columns that stay. Both go by statistics of the dense model.
    """

    remove: float
    scores: UnitScores
    allocate: Allocate
    compensation: Compensation = "none"

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        """What each layer loses; the model is not changed."""
        dims = decoder.dims
        solved: Sequence[Tensors] = [{}] * len(dims)
        if self.scores.gathers or self.compensation != "none":
            assert calibration is not None, "checked by the caller"
            gathered = work.part("statistics")
            step = Step(
                lambda i, layer: self._watch(layer, dims[i]),
                lambda i, layer, site, found: self._solve(layer, dims[i], site, found),
            )
            walk(decoder, calibration, step, order="dense", work=gathered, progress=progress)
            solved = Layers(gathered, len(dims), lambda tensors: tensors)
        table = [
            {
                name: tensor.double().cpu().numpy()
                for name, tensor in tensors.items()
                if name in (*self.scores.families, "signal")
            }
            for tensors in self.scores.table(decoder, calibration, solved, progress)
        ]
        for i, scored in enumerate(table):
            if not all(np.isfinite(scores).all() for scores in scored.values()):
                raise InputError(
                    f"Scores of layer {i} are NaN or infinite: look for such numbers in its "
                    f"weights."
                )
        budget = self.remove * sum(each.weights for each in dims)
        kept = self.allocate(table, dims, budget)
        check_kept(kept)
        plans = work.part("plan")
        shown = None if progress else True
        for i in tqdm(range(len(dims)), desc="planning", unit="layer", disable=shown):
            if i not in plans:
                plans[i] = self._plan(decoder, i, kept[i], solved[i]).tensors()
        return Layers(plans, len(dims), LayerPlan.from_tensors)

    def _watch(self, layer: nn.Module, dims: Dims) -> Watched:
        watched = {site: dict(found) for site, found in self.scores.watch(layer, dims).items()}
        for family in self.scores.families if self.compensation != "none" else ():
            made = Moments() if self.compensation == "bias" else Gram()
            watched.setdefault(SITE[family], {})[self.compensation] = made
        return watched

    def _solve(
        self, layer: nn.Module, dims: Dims, site: str, statistics: Mapping[str, Any]
    ) -> Tensors:
        solved = dict(self.scores.solve(layer, dims, site, statistics))
        found = statistics.get(self.compensation)
        if found is not None:
            name = f"{self.compensation}.{FAMILY[site]}"
            solved[name] = found.mean if self.compensation == "bias" else found.total()
        return solved

    def _plan(self, decoder: Decoder, i: int, kept: Kept, solved: Tensors) -> LayerPlan:
        units = units_of(kept)
        plan = LayerPlan(units=units)
        if self.compensation == "none":
            return plan
        state = decoder.state(i)
        for family, stays in units.items():
            reader = READER[family]
            weight = state[f"{reader}.weight"].float().cpu()
            columns = places(family, reader, decoder.dims[i], stays)
            found = solved[f"{self.compensation}.{family}"].cpu()
            if self.compensation == "bias":
                plan.biases[reader] = mean_bias(weight, found, columns)
            else:
                plan.weights[reader] = least_squares(weight, found, columns)
        return plan
