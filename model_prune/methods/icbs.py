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
from model_prune.core.gradients import BATCH_TOKENS
from model_prune.core.mask import element_masks
from model_prune.core.mode import evaluating
from model_prune.core.plan import LayerPlan, pack, unpack
from model_prune.core.work import Layers, Work
from model_prune.method import Elements
from model_prune.methods.magnitude import Magnitude
from model_prune.methods.wanda import Wanda
from prune_core.errors import InputError

Floats = NDArray[np.float64]
Flips = NDArray[np.bool_]


# ------------------------------------------------------------------------------ a block
@dataclass(frozen=True, eq=False)
class Block:
    """Weights that may be flipped: kept ones, which would go, and removed ones, which would return.

    A set of flips changes the loss by Σ linear_b + ½ |Σ pulls_b|² over it, to second order.

    linear: gradient · change, and what regularises, [weights].
    pulls: of each sample, gradient · change, scaled so that their products are the Hessian's part:
    [samples, weights].
    kept: which of the weights are kept now.
    """

    linear: Floats
    pulls: Floats
    kept: Flips

    def change(self, flips: Flips) -> float:
        """Of the loss, when these are flipped."""
        together = self.pulls[:, flips].sum(1)
        return float(self.linear[flips].sum() + together @ together / 2)

    def best(self, restarts: int, random: np.random.Generator) -> Flips:
        """Flips that lower the loss as far as is found, as many kept weights as removed ones.

        Descent by the best exchange, from no flips at all and from some drawn at random; so the
        change is never above zero.
        """
        products = self.pulls.T @ self.pulls
        found = [self._descend(np.zeros(len(self.kept), dtype=bool), products)]
        sides = [np.flatnonzero(self.kept), np.flatnonzero(~self.kept)]
        for _ in range(restarts):
            flips = np.zeros(len(self.kept), dtype=bool)
            count = random.integers(1, min(map(len, sides)) + 1)
            for side in sides:
                flips[random.choice(side, count, replace=False)] = True
            found.append(self._descend(flips, products))
        return min(found, key=self.change)

    def _descend(self, flips: Flips, products: Floats) -> Flips:
        """Exchange two weights at a time while that helps.

        Flipping one of each side, or turning back one flip of each, or one flip for another of the
        same side, keeps the number of weights.
        """
        flips, sign = flips.copy(), np.where(self.kept, 1, -1)
        while True:
            turn = np.where(flips, -1.0, 1.0)  # what its flip is multiplied by when it changes
            alone = turn * (self.linear + products @ flips) + products.diagonal() / 2
            pairs = alone[:, None] + alone + turn[:, None] * turn * products
            # The number of kept weights changes by −sign · turn of each, which must cancel.
            step = sign * turn
            pairs[step[:, None] == step] = np.inf
            i, j = divmod(int(pairs.argmin()), len(flips))
            if pairs[i, j] >= -1e-12 * (1 + abs(self.linear).max()):
                return flips
            flips[[i, j]] ^= True


# ------------------------------------------------------------------------------ a network
Losses = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> loss of each sample, [samples]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How long a network's masks are improved, and how carefully: see `ICBS`."""

    steps: int = 20
    block: int = 256
    blocks: int = 8
    restarts: int = 0
    damping: float = 0.001
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
        masks: by parameter, of linear layers; True where a weight stays.
        batches: those of a step, by its number; half of them choose weights, and half judge them.
        """
        work = work or Work()
        search = _Search(model, dict(masks), losses, self)
        shown = None if progress else True
        with evaluating(model), search.masked():
            for step in tqdm(range(self.steps), desc="improving", unit="step", disable=shown):
                if step not in work:
                    search.step(step, batches(step))
                    work[step] = {name: pack(mask) for name, mask in search.masks.items()}
                else:
                    search.take({name: unpack(mask) for name, mask in work[step].items()})
        return search.masks


class _Search:
    """The masks as they are, and the weights under them in the model's place."""

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], losses: Losses, how: Descent
    ) -> None:
        self.model, self.masks, self.losses, self.how = model, masks, losses, how
        self.weights = {name: model.get_parameter(name) for name in masks}
        self.dense = {name: weight.data for name, weight in self.weights.items()}

    @contextmanager
    def masked(self) -> Iterator[None]:
        """The model with masked weights, gradients of these alone; afterwards as it was."""
        asked = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        try:
            self.model.requires_grad_(False)
            self.take(self.masks)
            for weight in self.weights.values():
                weight.requires_grad_(True)
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data = self.dense[name]
            for parameter, was, gradient in asked:
                parameter.requires_grad_(was)
                parameter.grad = gradient

    def take(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        for name, mask in masks.items():
            self.weights[name].data = self.dense[name] * mask

    def step(self, number: int, batches: Sequence[Any]) -> None:
        """Find flips by what two halves of the samples say, and keep them if the loss falls."""
        random = np.random.default_rng([self.how.seed, number])
        half = max(1, len(batches) // 2)
        before, slopes = self._slopes(batches[:half])
        places = {name: self._candidates(name, slopes.pop(name), random) for name in self.masks}
        samples = self._samples(places, batches[half:] or batches)
        masks = dict(self.masks)
        for name, rows in places.items():
            masks[name] = self._flipped(name, rows, samples.pop(name), random)
        old = self.masks
        self.take(masks)
        after = self._loss(batches[:half])
        if not after < before:
            self.take(old)

    def _loss(self, batches: Sequence[Any]) -> float:
        with torch.no_grad():
            found = [self.losses(self.model, batch) for batch in batches]
        return float(torch.cat(found).double().mean())

    def _slopes(self, batches: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of the samples and its gradient."""
        weights = list(self.weights.values())
        total, count = 0.0, 0
        sums = [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            losses = self.losses(self.model, batch)
            if not losses.isfinite().all():
                raise InputError(
                    "The loss on the calibration data is not finite: look for NaN or infinity in "
                    "the network's weights."
                )
            for own, slope in zip(sums, torch.autograd.grad(losses.sum(), weights), strict=True):
                own += slope
            total, count = total + float(losses.detach().double().sum()), count + len(losses)
        return total / count, {n: own / count for n, own in zip(self.weights, sums, strict=True)}

    def _candidates(self, name: str, slope: Tensor, random: np.random.Generator) -> list[Tensor]:
        """Weights whose flips lower the loss most, to first order: int64 [block] of each block.

        The first half of each block is kept now, the second removed.
        """
        dense, mask = self.dense[name].flatten(), self.masks[name].flatten()
        change = slope.flatten() * dense * torch.where(mask, -1, 1)
        half = self.how.block // 2
        sides = []
        for side in (mask, ~mask):
            count = min(half * self.how.blocks, int(mask.sum()), int((~mask).sum()))
            lowest = change.masked_fill(~side, torch.inf).topk(count, largest=False).indices
            order = torch.from_numpy(random.permutation(count))
            sides.append(torch.split(lowest[order], half))
        return [torch.cat(pair) for pair in zip(*sides, strict=True)]

    def _samples(
        self, places: Mapping[str, Sequence[Tensor]], batches: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Gradients of single samples at the places of each weight: [samples, places]."""
        found: dict[str, list[Tensor]] = {name: [] for name in places}
        for batch in batches:
            with _recorded(self.model, places) as recorded:
                losses = self.losses(self.model, batch)
            outputs = [recorded[name][1] for name in places]
            slopes = torch.autograd.grad(losses.sum(), outputs)
            for (name, rows), slope in zip(places.items(), slopes, strict=True):
                flat = torch.cat(list(rows))
                x, width = recorded[name][0].detach(), self.dense[name].shape[1]
                x, slope = (t.reshape(len(losses), -1, t.shape[-1]) for t in (x, slope))
                found[name].append((slope[..., flat // width] * x[..., flat % width]).sum(1))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _flipped(
        self, name: str, rows: Sequence[Tensor], samples: Tensor, random: np.random.Generator
    ) -> Tensor:
        """The mask after the best flips of each block."""
        mask = self.masks[name].flatten().clone()
        for places, slopes in zip(
            rows, torch.split(samples, [len(r) for r in rows], 1), strict=True
        ):
            kept = mask[places].numpy()
            moves = self.dense[name].flatten()[places].double().numpy() * np.where(kept, -1, 1)
            pulls = slopes.double().numpy() * moves
            linear = pulls.mean(0) + self.how.damping * moves**2
            block = Block(linear, (pulls - pulls.mean(0)) / math.sqrt(len(pulls)), kept)
            flips = block.best(self.how.restarts, random)
            mask[places] = torch.from_numpy(kept ^ flips)
        return mask.view_as(self.masks[name])


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
    """Begin with another method's mask, and flip weights in blocks where that lowers the loss.

    A step takes from every matrix kept weights and removed ones whose flips would lower the loss
    most to first order, by half of its samples, and finds by the other half which flips of a block
    do so together: the loss to second order, with the samples' gradients for a Hessian. Weights
    that return have their dense values, and every matrix keeps as many as before. A step after
    which the first half's loss is not lower is taken back.

    Source: Rosenberg et al., "Scalable iterative pruning of large language and vision models using
    block coordinate descent" (2024, arXiv:2411.17796), and its notebook.
    """

    name = "icbs"
    windows = 128
    tokens = 2048
    start: Literal["wanda", "magnitude"] = "wanda"
    samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("steps", self.steps, 0)
        check_least("block", self.block, 2)
        check_least("blocks", self.blocks, 1)
        check_least("restarts", self.restarts, 0)
        check_least("samples", self.samples, 4)
        if self.pattern:
            raise InputError("iCBS flips weights wherever they are: leave pattern out.")

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
        begun = first.recipe(decoder).layers(decoder, calibration, work.part("start"), progress)
        model: Any = decoder.whole()

        def batches(step: int) -> Sequence[Tensor]:
            random = np.random.default_rng([method.seed, step])
            count, tokens = calibration.windows.shape
            drawn = random.permutation(count)[: method.samples]
            chosen = calibration.windows[torch.from_numpy(drawn)].to(model.device)
            return torch.split(chosen, max(1, BATCH_TOKENS // tokens))

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
