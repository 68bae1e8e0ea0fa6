"""iCBS: a mask improved a block of weights at a time, by what their removal does together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from model_prune.core.mode import evaluating
from model_prune.core.plan import LayerPlan
from model_prune.core.target import place_of
from model_prune.core.work import Layers, Tensors, Work
from model_prune.method import Elements
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
Losses = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> loss of each sample


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a network's mask is improved: see `ICBS`."""

    steps: int = 20
    block: int = 256
    restarts: int = 2
    damping: float = 0.001
    seed: int = 0

    def improve(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        batches: Callable[[int], Sequence[Any]],
        losses: Losses,
        work: Work | None = None,
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Masks with as many weights each that lose less, from the ones given.

        model: with its dense weights; it is left as it was.
        masks: by parameter, of linear layers and convolutions; True where a weight stays.
        batches: of a step, by its number.
        losses: of the samples of a batch, in nats or what else is to fall.
        """
        work = work or Work()
        names = sorted(masks)
        modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
        best, best_loss = dict(masks), math.inf
        found, size = dict(masks), self.block
        bar = tqdm(range(self.steps), desc="improving", unit="step", disable=None if progress else True)
        for step in bar:
            ...
        return best
