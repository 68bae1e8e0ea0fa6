"""iCBS: a mask improved a block of weights at a time, by what their removal does together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from model_prune.core.allocate import check_least
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.gradients import BATCH_TOKENS, check_memory, differentiable
from model_prune.core.mask import element_masks
from model_prune.core.mode import evaluating
from model_prune.core.plan import LayerPlan, pack, unpack
from model_prune.core.work import Layers, Tensors, Work
from model_prune.method import Elements
from model_prune.methods.magnitude import Magnitude
from model_prune.methods.wanda import Wanda
from prune_core.errors import InputError

Floats = NDArray[np.float64]
Flips = NDArray[np.bool_]
Places = NDArray[np.int64]


# ------------------------------------------------------------------------------ a block
@dataclass(frozen=True, eq=False)
class Block:
    """Weights that may be flipped: kept ones, which would go, and removed ones, which would return.

    A set of flips changes the loss by Σ alone_b + ½ |Σ pulls_b|² over it, to second order.

    alone: what each does without the others, but for its own pulls, [weights].
    pulls: of each sample, gradient · change, scaled so that their products are the Hessian's part:
    [samples, weights].
    kept: which of the weights are kept now.
    matrix: the number of the matrix that each is in; of none the count of kept weights may change.
    """

    alone: Floats
    pulls: Floats
    kept: Flips
    matrix: Places

    def change(self, flips: Flips) -> float:
        """Of the loss, when these are flipped."""
        together = self.pulls[:, flips].sum(1)
        return float(self.alone[flips].sum() + together @ together / 2)

    def products(self) -> Floats:
        """The Hessian's part of every two weights, [weights, weights]."""
        return self.pulls.T @ self.pulls

    def best(self, restarts: int, random: np.random.Generator) -> Flips:
        """Flips that lower the loss as far as is found, as many kept weights as removed ones.

        Descent by the best exchange, from no flips at all and from some drawn at random; so the
        change is never above zero.
        """
        starts = [np.zeros(len(self.kept), dtype=bool)]
        for _ in range(restarts):
            flips = np.zeros(len(self.kept), dtype=bool)
            for number in np.unique(self.matrix):
                sides = [np.flatnonzero((self.matrix == number) & (self.kept == k)) for k in (0, 1)]
                count = random.integers(0, min(map(len, sides)) + 1)
                for side in sides:
                    flips[random.choice(side, count, replace=False)] = True
            starts.append(flips)
        products = self.products()
        pairs = np.nonzero(np.triu(self.matrix[:, None] == self.matrix, 1))
        found = [self._descend(flips, products, *pairs) for flips in starts]
        return min(found, key=self.change)

    def _descend(self, flips: Flips, products: Floats, i: Places, j: Places) -> Flips:
        """Exchange two weights at a time while that helps.

        Flipping one of each side, or turning back one flip of each, or one flip for another of the
        same side, keeps the number of weights.

        i, j: every two weights of one matrix.
        """
        flips, sign = flips.copy(), np.where(self.kept, 1, -1)
        together, least = products[i, j], -1e-12 * (1 + abs(self.alone).max(initial=0))
        while len(i):
            turn = np.where(flips, -1.0, 1.0)  # what its flip is multiplied by when it changes
            one = turn * (self.alone + products @ flips) + products.diagonal() / 2
            # The number of kept weights changes by −sign · turn of each, which must cancel.
            step = sign * turn
            two = one[i] + one[j] + turn[i] * turn[j] * together
            two[step[i] == step[j]] = np.inf
            pair = two.argmin()
            if two[pair] >= least:
                break
            flips[[i[pair], j[pair]]] ^= True
        return flips


# ------------------------------------------------------------------------------ a network
Losses = Callable[[nn.Module, Any], Tensor]
TRIES = 5  # of a step, each with a higher damping


@dataclass(frozen=True, eq=False)
class Candidates:
    """Weights of a matrix that may be flipped.

    places: in the flattened matrix, int64 [weights]; as many kept ones as removed ones.
    rises: of the loss by the curvature of each alone, [weights].
    """

    places: Tensor
    rises: Floats


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How long a network's masks are improved, and how carefully.

    steps: each finds flips of some weights anywhere; more of them take longer and do better.
    block: candidates of a step, half of them kept weights and half removed ones.
    restarts: from flips drawn at random, when those of a block are looked for.
    damping: of what each weight's own curvature costs, at first; steps raise and lower it.
    """

    steps: int = 20
    block: int = 1024
    restarts: int = 0
    damping: float = 10.0
    seed: int = 0

    def improve(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        batches: Callable[[int], Sequence[Any]],
        losses: Losses,
        *,
        work: Work | None = None,
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Masks of as many weights each under which the network loses less than under those given.

        model: with its dense weights; it is left as it was.
        masks: by parameter ("fc1.weight"), of linear layers that are called once a forward pass;
        bool [out, in], True where a weight stays.
        batches: those of a step, by its number, two or more: the first half of them proposes
        candidates and judges, the second finds which of these to flip.
        losses: (model, batch) -> the loss of each sample, [samples].

        Raises InputError for a mask of what is no linear layer, and losses that are not finite.
        """
        for name in masks:
            module = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
                raise InputError(
                    f"iCBS improves masks of weights of linear layers, and '{name}' is one of "
                    f"{type(module).__name__}: leave it out."
                )
        work = work or Work()
        search = _Search(model, dict(masks), losses, self)
        shown = None if progress else True
        with evaluating(model), search.masked():
            for step in tqdm(range(self.steps), desc="improving", unit="step", disable=shown):
                if step not in work:
                    search.step(step, batches(step))
                    work[step] = search.tensors()
                else:
                    search.restore(work[step])
        return search.masks


class _Search:
    """The masks as they are, and the weights under them in the model's place."""

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], losses: Losses, how: Descent
    ) -> None:
        self.model, self.masks, self.losses, self.how = model, masks, losses, how
        self.damping = how.damping
        self.weights = {name: model.get_parameter(name) for name in masks}
        self.dense = {name: weight.data for name, weight in self.weights.items()}

    @contextmanager
    def masked(self) -> Iterator[None]:
        """The model with masked weights, gradients of these alone; afterwards as it was."""
        with differentiable(self.model, self.weights.values()):
            try:
                self.take(self.masks)
                yield
            finally:
                for name, weight in self.weights.items():
                    weight.data = self.dense[name]

    def take(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        for name, mask in masks.items():
            self.weights[name].data = self.dense[name] * mask

    def tensors(self) -> Tensors:
        """Where the search is."""
        masks = {name: pack(mask) for name, mask in self.masks.items()}
        return {**masks, "damping": torch.tensor(self.damping, dtype=torch.float64)}

    def restore(self, tensors: Tensors) -> None:
        """What `tensors` gave."""
        self.damping = float(tensors["damping"])
        self.take({name: unpack(tensors[name]) for name in self.masks})

    def step(self, number: int, batches: Sequence[Any]) -> None:
        """Find flips by what two halves of the samples say, and keep them if the loss falls.

        Where it does not, the model of the loss was trusted too far: its damping is raised.
        """
        random = np.random.default_rng([self.how.seed, number])
        half = max(1, len(batches) // 2)
        before, candidates = self._candidates(batches[:half])
        if not candidates:
            return
        pulls = self._pulls(candidates, batches[half:] or batches)
        old = self.masks
        for _ in range(TRIES):
            block = self._block(candidates, pulls)
            flips = block.best(self.how.restarts, random)
            self.take(self._flipped(candidates, flips))
            change = self._loss(batches[:half]) - before
            if change < 0:
                if change < block.change(flips) / 2:  # as foreseen, or nearly: trust it further
                    self.damping /= 2
                return
            self.take(old)
            self.damping *= 4

    def _loss(self, batches: Sequence[Any]) -> float:
        with torch.no_grad():
            found = [self.losses(self.model, batch) for batch in batches]
        return float(torch.cat(found).double().mean())

    def _candidates(self, batches: Sequence[Any]) -> tuple[float, dict[str, Candidates]]:
        """The mean loss of the samples, and the pairs of weights whose exchange lowers it most.

        By gradient and damped curvature, each weight without the others.
        """
        slopes = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        inputs = {name: slope.new_zeros(slope.shape[1]) for name, slope in slopes.items()}
        outputs = {name: slope.new_zeros(slope.shape[0]) for name, slope in slopes.items()}
        total, count, rows = 0.0, 0, dict.fromkeys(self.weights, 0)
        for batch in batches:
            losses, seen = self._backward(batch)
            for name, (x, slope) in seen.items():
                slopes[name] += slope.T @ x
                inputs[name] += x.square().sum(0)
                outputs[name] += slope.square().sum(0)
                rows[name] += len(x)
            total, count = total + float(losses.double().sum()), count + len(losses)
        found, gains = {}, []
        for name, slope in slopes.items():
            dense, mask = self.dense[name], self.masks[name]
            # Of a sample's rows, as if each row's input and slope knew nothing of each other.
            curvature = torch.outer(outputs[name], inputs[name]) / (rows[name] * count)
            rise = (curvature * dense.square() / 2).flatten()
            change = (slope / count * dense * torch.where(mask, -1, 1)).flatten()
            gain = change + self.damping * rise
            sides = []
            for side in (mask.flatten(), ~mask.flatten()):
                most = min(self.how.block // 2, int(mask.sum()), int((~mask).sum()))
                sides.append(gain.masked_fill(~side, torch.inf).topk(most, largest=False))
            places = torch.stack([side.indices for side in sides])
            found[name] = places, rise[places]
            gains.append(sides[0].values + sides[1].values)
        lowest = torch.cat(gains).sort().values[: self.how.block // 2]
        chosen = {}
        for (name, (places, rises)), gain in zip(found.items(), gains, strict=True):
            if len(gain) and gain[0] <= lowest[-1]:
                at, rise = (x[:, gain <= lowest[-1]].flatten() for x in (places, rises))
                chosen[name] = Candidates(at, rise.double().cpu().numpy())
        return total / count, chosen

    def _backward(self, batch: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Losses of the samples, and by weight its rows of inputs and slopes of outputs."""
        with _recorded(self.model, self.weights) as recorded:
            losses = self.losses(self.model, batch)
        if not losses.isfinite().all():
            raise InputError(
                "The loss on the calibration data is not finite: look for NaN or infinity in the "
                "network's weights."
            )
        slopes = torch.autograd.grad(losses.sum(), [output for _, output in recorded.values()])
        return losses.detach(), {
            name: (x.detach().flatten(0, -2), slope.flatten(0, -2))
            for (name, (x, _)), slope in zip(recorded.items(), slopes, strict=True)
        }

    def _pulls(self, candidates: Mapping[str, Candidates], batches: Sequence[Any]) -> Floats:
        """Changes of single samples' losses when a candidate flips: [samples, candidates]."""
        found = []
        for batch in batches:
            losses, seen = self._backward(batch)
            parts = []
            for name, chosen in candidates.items():
                x, slope = (t.view(len(losses), -1, t.shape[-1]) for t in seen[name])
                width = self.dense[name].shape[1]
                at = chosen.places
                parts.append((slope[..., at // width] * x[..., at % width]).sum(1))
            found.append(torch.cat(parts, 1))
        return torch.cat(found).double().cpu().numpy() * self._moves(candidates)

    def _moves(self, candidates: Mapping[str, Candidates]) -> Floats:
        """By what weights change when they flip."""
        return np.concatenate(
            [
                self.dense[name].flatten()[chosen.places].double().cpu().numpy()
                for name, chosen in candidates.items()
            ]
        ) * np.where(self._kept(candidates), -1, 1)

    def _kept(self, candidates: Mapping[str, Candidates]) -> Flips:
        masks = [self.masks[name].flatten()[c.places] for name, c in candidates.items()]
        kept: Flips = torch.cat(masks).cpu().numpy()
        return kept

    def _block(self, candidates: Mapping[str, Candidates], pulls: Floats) -> Block:
        rises = np.concatenate([chosen.rises for chosen in candidates.values()])
        return Block(
            pulls.mean(0) + self.damping * rises,
            (pulls - pulls.mean(0)) / math.sqrt(len(pulls)),
            self._kept(candidates),
            np.repeat(np.arange(len(candidates)), [len(c.places) for c in candidates.values()]),
        )

    def _flipped(self, candidates: Mapping[str, Candidates], flips: Flips) -> dict[str, Tensor]:
        """The masks with these flips."""
        masks, ends = dict(self.masks), np.cumsum([len(c.places) for c in candidates.values()])
        for (name, chosen), own in zip(candidates.items(), np.split(flips, ends[:-1]), strict=True):
            mask = masks[name].flatten().clone()
            mask[chosen.places] ^= torch.from_numpy(own).to(mask.device)
            masks[name] = mask.view_as(masks[name])
        return masks


@contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the modules whose weights are named, of the block's forward."""
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: recorded.__setitem__(name, (inputs[0], output))

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(record(name))
        for name in names
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------ decoders
@dataclass(frozen=True, kw_only=True)
class ICBS(Elements, Descent):
    """Begin with another method's mask, and flip blocks of weights where that lowers the loss.

    A step lists kept weights and removed ones whose exchange would lower the loss most, each taken
    alone, and finds which of these to flip together: they minimise the loss to second order, with
    the samples' gradients for a Hessian. Weights that return have their dense values, and every
    matrix keeps as many as before. A step that does not lower the loss of samples that had no say
    in which flips were made is made smaller, or left out.

    Source: Rosenberg et al., "Scalable iterative pruning of large language and vision models using
    block coordinate descent" (iCBS, 2024, arXiv:2411.17796), sections 3 and 4.
    Defaults: from experiments on a model of 135 million weights, as are the samples and windows;
    the published notebook takes other ones for other steps.
    Differs: couplings between weights that make up for each other are kept (the code deletes those
    below zero, and then flips as if each were alone); a block is of the whole network, not of one
    matrix; each weight's own curvature is damped by more or less, as steps fail or succeed, where
    the paper adds a constant; one half of the samples proposes and judges, the other decides; and
    the exchange is found by descent, where solvers that know no constraint were no better.
    Cost: a step is three to seven passes over half of its samples, two of them backward, and sums
    of all matrices; the whole model is in memory.

    start: the method whose mask is improved.   samples: windows that a step draws.
    """

    name = "icbs"
    windows = 128
    tokens = 512
    start: Literal["wanda", "magnitude"] = "wanda"
    samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("steps", self.steps, 0)
        check_least("block", self.block, 2)
        check_least("restarts", self.restarts, 0)
        check_least("samples", self.samples, 2)
        if self.pattern:
            raise InputError("iCBS flips weights wherever they are: leave pattern out.")
        if not self.damping > 0:
            raise InputError(f"damping must be above 0, got {self.damping:g}.")

    def recipe(self, decoder: Decoder) -> _Improved:
        """See Method."""
        return _Improved(self)


@dataclass(frozen=True)
class _Improved:
    """The recipe: another method's mask, then the steps."""

    method: ICBS

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        assert calibration is not None, "checked by the caller"
        method = self.method
        first = {"wanda": Wanda, "magnitude": Magnitude}[method.start](
            sparsity=method.sparsity, targets=method.targets, sparsities=method.sparsities
        )
        check_memory(decoder, squares=False, progress=progress)
        begun = first.recipe(decoder).layers(decoder, calibration, work.part("start"), progress)
        model: Any = decoder.whole()

        def batches(step: int) -> Sequence[Tensor]:
            random = np.random.default_rng([method.seed, step])
            count, tokens = calibration.windows.shape
            drawn = torch.from_numpy(random.permutation(count)[: method.samples])
            size = min(-(-len(drawn) // 2), max(1, BATCH_TOKENS // tokens))
            return torch.split(calibration.windows[drawn].to(model.device), size)

        masks = method.improve(
            model,
            {name: mask.to(model.device) for name, mask in element_masks(begun).items()},
            batches,
            _window_losses,
            work=work.part("steps"),
            progress=progress,
        )
        plans = work.part("plan")
        for i, layer in enumerate(begun):
            own = {matrix: masks[f"model.layers.{i}.{matrix}.weight"] for matrix in layer.masks}
            plans[i] = LayerPlan(masks=own).tensors()
        return Layers(plans, len(begun), LayerPlan.from_tensors)


def _window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The negative log-likelihood of each window, in nats: [windows]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).sum(1)
