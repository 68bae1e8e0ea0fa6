"""DSnoT: a mask is repaired by swaps until its outputs' mean is right; nothing trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from model_prune.core.allocate import check_least
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise, Solved, Weights
from model_prune.core.statistics import Moments
from model_prune.core.structure import PerRow
from model_prune.core.target import place_of
from model_prune.method import Elements
from prune_core.errors import InputError

_TOKENS = 2048  # of a window, over which the code adds up the error that it compares


@dataclass(frozen=True, kw_only=True)
class DSnoT(Elements):
    """Prune by another score, then swap kept and removed weights of a row against its mean error.

    The error of a row is ε = Σ W_ij · mean(x_j) over its removed weights. While |ε| is above the
    threshold, the removed weight that lowers it most for its variance comes back, and of the kept
    ones that lower it too the one of smallest |W_ij| · ‖x_j‖ goes.

    Source: Zhang et al., "Dynamic sparse no training" (2023, arXiv:2310.08915), equations 3 to 6
    and its code, whose default repairs attention alone and does not mind if ε changes its sign.
    Defaults: 128 windows of 2,048 tokens, 50 cycles, threshold 0.1.
    Differs: the threshold is that of windows of 2,048 tokens, whatever is read; the variance is
    that of all tokens, not the mean of those of windows; a row that has run out of weights that
    help stops. N:M patterns are not repaired.
    Cost: as Wanda's, and the swaps.

    start: the score of the first mask.   repair: names or globs of the matrices to repair.
    same_sign: stop a row before ε would change its sign.
    """

    name = "dsnot"
    windows = 128
    tokens = 2048
    start: Literal["wanda", "magnitude"] = "wanda"
    repair: tuple[str, ...] = ("self_attn.*",)
    cycles: int = 50
    threshold: float = 0.1
    same_sign: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("cycles", self.cycles, 0)
        check_least("threshold", self.threshold, 0)
        if self.pattern:
            raise InputError(
                "DSnoT repairs masks without a pattern here: leave pattern out, or take N:M with "
                "sparsegpt, which updates weights."
            )

    def recipe(self, decoder: Decoder) -> Elementwise:
        """See Method."""
        return Elementwise(
            self._solve,
            self.shares(decoder),
            watch={"inputs": Moments},
        )

    def _solve(
        self, weights: Weights, statistics: Mapping[str, Any], sparsities: Mapping[str, float]
    ) -> Solved:
        moments: Moments = statistics["inputs"]
        solved: dict[str, tuple[Tensor | None, Tensor]] = {}
        for name, weight in weights.items():
            wanda = weight.abs() * moments.norm
            first = wanda if self.start == "wanda" else weight.abs()
            mask = PerRow().mask(first, sparsities[name])
            _, matrix = place_of(name)
            if any(fnmatchcase(matrix, pattern) for pattern in self.repair):
                mask = self.swapped(weight * moments.mean, moments.variance, wanda, mask)
            solved[name] = (None, mask)
        return solved

    def swapped(self, part: Tensor, variance: Tensor, wanda: Tensor, mask: Tensor) -> Tensor:
        """The mask after its swaps, as many weights a row as before.

        part: W_ij · mean(x_j), what each weight adds to its output on average, [out, in].
        variance: of the inputs, [in].   wanda: |W_ij| · ‖x_j‖, [out, in].
        """
        mask = mask.clone()
        rows = torch.arange(len(mask), device=mask.device)
        error = (part * ~mask).sum(1)
        sign = error.sign()
        # Most positive first and most negative first; who is not removed is at neither end.
        pull = torch.where(mask, 0, part / variance.clamp_min(1e-38))
        regrow = {
            +1: pull.argsort(dim=1, descending=True, stable=True),
            -1: pull.argsort(dim=1, stable=True),
        }
        # To lower a positive error a negative part goes, and the other way round.
        goes = {
            s: wanda.masked_fill(~mask | (part.sign() != -s), torch.inf).argsort(dim=1, stable=True)
            for s in (+1, -1)
        }
        available = {
            s: torch.minimum((pull.sign() == s).sum(1), (mask & (part.sign() == -s)).sum(1))
            for s in (+1, -1)
        }
        used = {s: torch.zeros(len(mask), dtype=torch.int64, device=mask.device) for s in (+1, -1)}
        open_ = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        for _ in range(self.cycles):
            positive = error > 0
            taken = torch.where(positive, used[1], used[-1])
            open_ &= error.abs() > self.threshold / _TOKENS
            open_ &= taken < torch.where(positive, available[1], available[-1])
            at = taken.clamp_max(mask.shape[1] - 1)
            back = torch.where(positive, regrow[1][rows, at], regrow[-1][rows, at])
            out = torch.where(positive, goes[1][rows, at], goes[-1][rows, at])
            after = error + part[rows, out] - part[rows, back]
            if self.same_sign:
                open_ &= after.sign() == sign
            if not open_.any():
                break
            error = torch.where(open_, after, error)
            mask[rows[open_], back[open_]] = True
            mask[rows[open_], out[open_]] = False
            used[1] += open_ & positive
            used[-1] += open_ & ~positive
        return mask
