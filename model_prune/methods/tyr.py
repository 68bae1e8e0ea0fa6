"""Týr-the-Pruner: versions of every layer, and a search of which ones go together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from model_prune.core.allocate import check_least, uniform
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.search import Candidate, Evolution, Levels
from model_prune.core.target import UNITS, Dims
from model_prune.core.versions import Divergence, Offers, Removed, Versions
from model_prune.core.work import Layers, Work
from model_prune.method import Units
from prune_core.errors import InputError

LEAST = {"kv_group": 1, "neuron": 32}  # units of a level, at the finest


@dataclass(frozen=True, kw_only=True)
class Tyr(Units):
    """Cut every layer at several levels, and search which level of each makes the best model.

    An iteration cuts every layer's KV groups and neurons at levels around what it is to lose, each
    refitted to the inputs that the layers before it give on average over their levels; then an
    evolutionary search looks for the levels that change the model's predictions least, at the same
    total. The next iteration takes levels half as far apart around what was found.

    Source: Li et al., "Týr-the-Pruner: structural pruning LLMs via global sparsity distribution
    optimization" (2025, arXiv:2503.09657), sections 3.2 to 3.4, and its code.
    Defaults: from the code: 1,024 windows of 4,096 tokens, nine levels an eighth of a layer apart,
    four iterations of 50 generations of 128 candidates, judged by 2,048, 16,384 and 131,072 tokens.
    Differs: one KV group is the least of attention, with its keys and values; all levels of a layer
    come from one order in which its units go, so each contains the next; a mutation swaps levels of
    units of one kind, which the code ensures by the parity of places in a list; a round of
    selection reads whole windows, or a part of one.
    Cost: an iteration is two forward passes over the text, a few factorisations and refits of every
    layer, and the search: a forward pass over each round's tokens for every candidate, but for the
    layers in which candidates begin alike. One layer is in memory at a time.

    score: what a unit costs: "obs" the rise of the layer's squared error; "obs_g" the code's, which
    adds an inner product of weights and gradient.
    levels: of each kind of units in each layer, an odd number.   width: of the first iteration's
    levels, a share of a layer's units; halved in every iteration.
    top: most likely tokens of the dense model over which predictions are compared.
    store: a folder that keeps what was gathered of the layers for other budgets: then the first
    iteration's serves all, and a search under another `remove` reads no text but for judging.
    """

    name = "tyr"
    windows = 1024
    tokens = 4096
    score: Literal["obs", "obs_g"] = "obs"
    levels: int = 9
    width: float = 0.125
    iterations: int = 4
    generations: int = 50
    offspring: int = 128
    survivors: tuple[int, ...] = (16, 4, 1)
    judged_by: tuple[int, ...] = (2048, 16384, 131072)
    top: int = 8192
    seed: int = 0
    store: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("levels", self.levels, 3)
        check_least("iterations", self.iterations, 1)
        check_least("top", self.top, 1)
        if not 0 < self.width <= 0.5:
            raise InputError(
                f"width is a share of a layer's units, above 0 and at most a half, got "
                f"{self.width:g}."
            )
        self.evolution(0)

    def evolution(self, iteration: int) -> Evolution:
        """The search of an iteration."""
        return Evolution(
            self.generations,
            self.offspring,
            tuple(self.survivors),
            tuple(self.judged_by),
            self.seed + iteration,
        )

    def recipe(self, decoder: Decoder) -> _Searched:
        """See Method."""
        return _Searched(self)


@dataclass(frozen=True)
class _Searched:
    """The recipe: make versions, search among them, and again at finer levels."""

    method: Tyr

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        assert calibration is not None, "checked by the caller"
        method = self.method
        removed: Removed = {
            (i, family): count
            for i, gone in enumerate(uniform(decoder.dims, method.remove))
            for family, count in gone.items()
        }
        for number in range(method.iterations):
            offers = self._offers(decoder.dims, removed, number)
            kept, searched = self._places(decoder, calibration, work, number)
            versions = Versions(
                decoder,
                offers,
                kept,
                gradient=method.score == "obs_g",
                lasting=method.store is not None,
            )
            versions.make(calibration, progress)
            judge = Divergence(versions, calibration, method.top)
            removed = self._search(judge, offers, removed, number, searched, progress)
        plans = work.part("plan")
        for i in range(len(decoder.dims)):
            plans[i] = versions.plan(i, removed).tensors()
        return Layers(plans, len(decoder.dims), LayerPlan.from_tensors)

    def _places(
        self, decoder: Decoder, calibration: Calibration, work: Work, number: int
    ) -> tuple[Work, Work]:
        """Where versions are kept, and what was searched."""
        if self.method.store is None:
            place = work.part(f"iteration-{number}")
            return place.part("versions"), place.part("search")
        about = {
            "model": decoder.fingerprint,
            "calibration": calibration.fingerprint,
            "score": self.method.score,
        }
        settings = json.dumps(self.method.settings(), sort_keys=True)
        name = hashlib.sha256(settings.encode()).hexdigest()[:12]
        store = Work(Path(self.method.store), about)
        return store, store.part(f"search-{name}-{number}")

    def _offers(self, dims: Sequence[Dims], removed: Removed, number: int) -> Offers:
        """Levels around what is to be removed."""
        most = {family: max(each.count(family) for each in dims) for family in UNITS}
        apart = {f: max(LEAST[f], round(self.method.width * most[f] / 2**number)) for f in UNITS}
        half = self.method.levels // 2
        return {
            (i, family): [
                count
                for level in range(-half, half + 1)
                if 0 <= (count := base + level * apart[family]) < dims[i].count(family)
            ]
            for (i, family), base in removed.items()
        }

    def _search(
        self,
        judge: Divergence,
        offers: Offers,
        removed: Removed,
        number: int,
        work: Work,
        progress: bool,
    ) -> Removed:
        def counts(candidate: Candidate) -> Removed:
            levels = zip(offers, candidate, strict=True)
            return {part: offers[part][level] for part, level in levels}

        def fitness(
            candidates: Sequence[Candidate], tokens: int, random: np.random.Generator
        ) -> list[float]:
            return judge([counts(candidate) for candidate in candidates], tokens, random)

        levels = Levels(
            kinds=[family for _, family in offers],
            low=[0] * len(offers),
            high=[len(offered) - 1 for offered in offers.values()],
        )
        start = tuple(offered.index(removed[part]) for part, offered in offers.items())
        evolution = self.method.evolution(number)
        return counts(evolution.best(start, levels, fitness, work, progress))
