"""Every layer cut at several levels, and how far a model made of some of them is from the dense.

A version of a layer's units of one kind is the ones that stay and the matrix that reads them,
refitted to what the whole layer gave. Versions are found layer by layer, and each layer sees the
inputs that the layers before it give on average over their versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, attend, middle, walk
from model_prune.core.compensate import least_squares, removal_order
from model_prune.core.decoder import Decoder
from model_prune.core.linear import multiply
from model_prune.core.plan import LayerPlan
from model_prune.core.statistics import Gram
from model_prune.core.target import UNITS, Family
from model_prune.core.units import FAMILY, READER, SITE, places
from model_prune.core.work import Tensors, Work

Part = tuple[int, Family]  # of a network: the units of one kind in one layer
Removed = Mapping[Part, int]  # how many of them go
Offers = Mapping[Part, Sequence[int]]  # how many may go: the levels at which versions are made

STATES = 1 << 30  # bytes of hidden states at once
HEAD_TOKENS = 1024  # whose logits are computed at once


class Versions:
    """Versions of all layers of a model, in a folder; one that is there is not made again.

    offers: the levels.
    gradient: how units are ordered, see `removal_order`.
    lasting: keep the second moments too, so that other levels can be made later from what was
    gathered once.
    """

    def __init__(
        self, decoder: Decoder, offers: Offers, work: Work, *, gradient: bool, lasting: bool
    ) -> None:
        self.decoder, self.offers = decoder, offers
        self._gradient, self._lasting = gradient, lasting
        self._gathered, self._refitted = work.part("gathered"), work.part("refitted")

    def make(self, calibration: Calibration, progress: bool) -> None:
        """Take the calibration text through the layers, as far as that was not done."""
        step = Step(
            lambda i, layer: {SITE[family]: {"inputs": Gram()} for family in UNITS},
            lambda i, layer, site, found: self._solve(i, layer, site, found["inputs"].total()),
            lambda i, layer, tensors: self._expect(layer, tensors),
        )
        walk(self.decoder, calibration, step, order="layer", work=self._gathered, progress=progress)
        for i in range(len(self.decoder.dims)):
            self._complete(i)

    def _solve(self, i: int, layer: Any, site: str, gram: Tensor) -> Tensors:
        family = FAMILY[site]
        weight = layer.get_submodule(READER[family]).weight
        count = self.decoder.dims[i].count(family)
        order = removal_order(
            weight, gram, count, at_once=max(1, count // 32), gradient=self._gradient
        )
        solved = {f"{family}.order": order}
        if self._lasting:
            solved[f"{family}.gram"] = gram
        mean, total = torch.zeros_like(weight), 0.0
        for removed in self.offers[i, family]:
            columns = self._columns(i, family, order, removed)
            version = refitted(weight, gram, columns) if removed else weight
            if removed:
                solved[_key(family, removed)] = version
            mean[:, columns] += (1 - removed / count) * version
            total += 1 - removed / count
        return {**solved, f"{family}.expected": mean / total}

    def _expect(self, layer: Any, tensors: Tensors) -> None:
        """Change a layer to the average of its versions, weighed by the share that stays."""
        for family in UNITS:
            layer.get_submodule(READER[family]).weight.copy_(tensors[f"{family}.expected"])

    def _complete(self, i: int) -> None:
        """Make the versions that were not asked for when the text was read."""
        found = self._tensors(i)
        missing = [
            (family, removed)
            for family in UNITS
            for removed in self.offers[i, family]
            if removed and _key(family, removed) not in found
        ]
        if missing:
            made = self._refitted.get(i)
            state = self.decoder.state(i)
            for family, removed in missing:
                weight = state[f"{READER[family]}.weight"].float().cpu()
                columns = self._columns(i, family, found[f"{family}.order"], removed)
                made[_key(family, removed)] = refitted(weight, found[f"{family}.gram"], columns)
            self._refitted[i] = made

    def _tensors(self, i: int) -> Tensors:
        return self._gathered[i] | self._refitted.get(i)

    def _columns(self, i: int, family: Family, order: Tensor, removed: int) -> Tensor:
        """Of the matrix that reads the units which stay."""
        kept = order[removed:].sort().values
        return places(family, READER[family], self.decoder.dims[i], kept)

    def readers(self, i: int, layer: Any) -> Callable[[Family, int, Tensor], Tensor]:
        """(family, removed, outputs of all units) -> [..., hidden], by versions of the layer."""
        found = self._tensors(i)

        def read(family: Family, removed: int, x: Tensor) -> Tensor:
            reader = layer.get_submodule(READER[family])
            if not removed:
                result: Tensor = reader(x)
                return result
            columns = self._columns(i, family, found[f"{family}.order"], removed).to(x.device)
            weight = found[_key(family, removed)].to(x.device, x.dtype)
            return multiply(x[..., columns], weight, reader.bias)

        return read

    def plan(self, i: int, removed: Removed) -> LayerPlan:
        """What layer `i` loses."""
        found, dims = self._tensors(i), self.decoder.dims[i]
        plan = LayerPlan()
        for family in UNITS:
            if count := removed[i, family]:
                order = found[f"{family}.order"]
                columns = self._columns(i, family, order, count)
                weight = torch.zeros(dims.shape(READER[family]))
                weight[:, columns] = found[_key(family, count)]
                plan.weights[READER[family]] = weight
                plan.units[family] = order[count:].sort().values
        return plan


def refitted(weight: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The columns that stay, [out, len(columns)], see `least_squares`."""
    return least_squares(weight, gram, columns)[:, columns].contiguous()


def _key(family: Family, removed: int) -> str:
    return f"{family}.{removed}"


class Divergence:
    """How far the predictions of models made of versions are from the dense model's.

    The mean over tokens of KL(dense ‖ model) over the tokens that the dense model finds the `top`
    most likely, each model's probabilities being made to add up to one over them.
    Source: Li et al., "Týr-the-Pruner" (2025, arXiv:2503.09657), section 3.3 and its code.

    All models go through a layer before the next is read, and those that begin alike go as one.
    """

    def __init__(self, versions: Versions, calibration: Calibration, top: int) -> None:
        self._versions, self._decoder = versions, versions.decoder
        self._windows, self._top = calibration.windows, top

    def __call__(
        self, models: Sequence[Removed], tokens: int, random: np.random.Generator
    ) -> list[float]:
        """Of each model, on windows drawn at random, whole ones or a part of one: [models]."""
        if not models:
            return []
        count, length = self._windows.shape
        drawn = random.permutation(count)[: max(1, tokens // length)]
        ids = self._windows[torch.from_numpy(np.sort(drawn))][:, :tokens]
        a_window = (len(models) + 1) * ids.shape[1] * self._decoder.config.hidden_size * 4
        total = np.zeros(len(models))
        for part in torch.split(ids, max(1, STATES // a_window)):
            total += self._sum(models, part)
        return [float(x) for x in total / ids.numel()]

    @torch.no_grad()
    def _sum(self, models: Sequence[Removed], ids: Tensor) -> NDArray[np.float64]:
        decoder, rotary = self._decoder, self._decoder.rotary(ids.shape[1])
        layers = range(len(decoder.dims))
        dense: Removed = dict.fromkeys(((i, f) for i in layers for f in UNITS), 0)
        paths = [
            tuple(tuple(model[i, family] for family in UNITS) for i in layers)
            for model in (dense, *models)
        ]
        hidden: dict[Any, Tensor] = {(): decoder.embed(ids)}
        for i in layers:
            layer: Any = decoder.layer(i)
            read = self._versions.readers(i, layer)
            after: dict[Any, Tensor] = {}
            for stem, state in hidden.items():
                # A dict for a set that keeps its order.
                taken = dict.fromkeys(path[i] for path in paths if path[:i] == stem)
                heads = attend(layer, layer.input_layernorm(state), rotary)
                for groups in dict.fromkeys(groups for groups, _ in taken):
                    between = state + read("kv_group", groups, heads)
                    neurons = middle(layer, layer.post_attention_layernorm(between))
                    for step in taken:
                        if step[0] == groups:
                            after[*stem, step] = between + read("neuron", step[1], neurons)
            hidden = after
        return self._compared([hidden[path].flatten(0, 1) for path in paths])

    def _compared(self, states: Sequence[Tensor]) -> NDArray[np.float64]:
        """Of last hidden states [tokens, hidden], those of the dense model first: the others'."""
        head = self._decoder.head()
        sums = np.zeros(len(states) - 1)
        for dense, *others in zip(
            *(torch.split(state, HEAD_TOKENS) for state in states), strict=True
        ):
            likely = head(dense).topk(min(self._top, self._decoder.config.vocab_size))
            expected = likely.values.float().log_softmax(-1)
            for k, state in enumerate(others):
                found = head(state).gather(-1, likely.indices).float().log_softmax(-1)
                sums[k] += float((expected.exp() * (expected - found)).sum())
        return sums
