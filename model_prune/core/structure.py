"""Which weights of a matrix go, by score: exact counts, equal scores by position.

Scores are float [out, in] and higher ones are kept; masks are bool, True where a weight stays.
A structure says among which weights the lowest are sought: a matrix, a row, every M of a row.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prune_core.errors import InputError


def removed_count(total: int, share: float) -> int:
    """⌊total · share⌋, whatever floating point makes of 10 · (1 − 0.9)."""
    return math.floor(total * share + 1e-6)


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Mask of the last dimension without the `removed` lowest of each row; ties go first to last.

    Raises InputError for scores that are NaN.
    """
    _check_rankable(scores)
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    bound = _lowest(scores, removed)
    kept = scores > bound
    missing = scores.shape[-1] - removed - kept.sum(-1, keepdim=True)
    tied = (missing > 0).squeeze(-1)
    if tied.any():  # only then is there more than one as low as the bound
        equal = scores[tied] == bound[tied]
        last = equal.flip(-1).cumsum(-1).flip(-1) <= missing[tied]
        kept[tied] |= equal & last
    return kept


def _check_rankable(scores: Tensor) -> None:
    if scores.isnan().any():
        raise InputError(
            "Scores are NaN, so weights cannot be ranked: look for NaN in the model's weights "
            "and in the calibration's activations."
        )


def _lowest(scores: Tensor, rank: int) -> Tensor:
    """The rank-th lowest of each row, kept as a dimension of one."""
    if scores.device.type == "cpu":  # where numpy's selection takes a tenth of the time
        found = np.partition(scores.numpy(), rank - 1, axis=-1)[..., rank - 1 : rank]
        return torch.from_numpy(found)
    return scores.kthvalue(rank, dim=-1, keepdim=True).values


class Structure(Protocol):
    """Among which weights of a matrix the lowest scores are sought."""

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """bool [out, in], True where the weight stays; higher scores stay."""


@dataclass(frozen=True)
class PerMatrix:
    """The lowest scores of a whole matrix go."""

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        count = removed_count(scores.numel(), sparsity)
        return keep_highest(scores.flatten(), count).view_as(scores)


@dataclass(frozen=True)
class PerRow:
    """The lowest scores of every row go: each output keeps as many inputs, the first rows one less.

    That is where the matrix's exact count is no multiple of its rows.
    """

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        each, rest = divmod(removed_count(scores.numel(), sparsity), len(scores))
        if not rest:
            return keep_highest(scores, each)
        return torch.cat([keep_highest(scores[:rest], each + 1), keep_highest(scores[rest:], each)])


@dataclass(frozen=True)
class Rows:
    """Whole rows go, those with the lowest sums of scores."""

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        kept = keep_highest(scores.sum(1), removed_count(len(scores), sparsity))
        return kept[:, None].expand_as(scores).clone()


@dataclass(frozen=True)
class Columns:
    """Whole columns go, those with the lowest sums of scores."""

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        kept = keep_highest(scores.sum(0), removed_count(scores.shape[1], sparsity))
        return kept.expand_as(scores).clone()


@dataclass(frozen=True)
class NM:
    """Of every `block` neighbours in a row, `keep` stay: NM(2, 4) is what GPUs multiply faster.

    Papers' codes write N:M and some mean N removed; here the first number is what stays.
    """

    keep: int
    block: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.block:
            raise InputError(
                f"N:M keeps N of every M weights with 0 < N < M, got {self.keep}:{self.block}: "
                f"write 2:4."
            )

    @classmethod
    def parse(cls, text: str) -> NM:
        """From "2:4"; raises InputError for anything of another form."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise InputError(f"N:M is written like 2:4, got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.keep / self.block

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """bool [out, in], whatever the sparsity; raises InputError for a short block and NaN."""
        if scores.shape[-1] % self.block:
            raise InputError(
                f"{self.keep}:{self.block} needs rows of a multiple of {self.block} weights, and "
                f"these have {scores.shape[-1]}: leave the matrix out with targets."
            )
        _check_rankable(scores)
        # One tensor for each place in a group: a weight's rank is how many of its group come before
        # it, and pairs are few, so nothing is sorted.
        places = scores.reshape(*scores.shape[:-1], -1, self.block).movedim(-1, 0).contiguous()
        count = torch.int8 if self.block <= 128 else torch.int16
        ahead = torch.zeros_like(places, dtype=count)
        for j in range(self.block):
            for i in range(j):
                second = places[j] >= places[i]  # of equal ones the later stays
                ahead[i] += second
                ahead[j] += ~second
        return (ahead < self.keep).movedim(0, -1).flatten(-2)
