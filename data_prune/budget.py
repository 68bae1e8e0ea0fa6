"""How many rows stay, and from which groups: budgets that are spent exactly."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prune_core.errors import InputError

Count = int | float | Mapping[str, int | float]
"""Rows (an int) or a share of the budget (a float), for every group or by its name."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may stay: exactly one of `rows`, `share` and `tokens`.

    rows: whole number >= 1.   share: of all rows, in (0, 1].   tokens: of the rows kept, together.
    group_by: a column whose values are groups.   min_per_group, max_per_group: rows of each, as a
    whole number or as a share of the budget in [0, 1], for all groups or by name.

    Raises InputError for none or several of the three, and for numbers out of range.
    """

    rows: int | None = None
    share: float | None = None
    tokens: int | None = None
    group_by: str | None = None
    min_per_group: Count = 0
    max_per_group: Count | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rows", "share", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"A budget must be exactly one of rows, share and tokens, got "
                f"{' and '.join(given) or 'none'}: choose one."
            )
        for name in ("rows", "tokens"):
            value = getattr(self, name)
            if value is not None and not (_whole(value) and value >= 1):
                raise InputError(f"{name} must be a whole number >= 1, got {value!r}.")
        share = self.share
        if share is not None and not (_number(share) and 0 < share <= 1):
            raise InputError(
                f"A share must be above 0 and at most 1 (the part of the rows that stays), "
                f"got {share!r}: say 0.2 or '20%', and whole numbers for rows."
            )
        for name in ("min_per_group", "max_per_group"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if self.group_by is None and bound != 0:
                raise InputError(f"{name} needs group_by=, the column whose values are groups.")
            for value in bound.values() if isinstance(bound, Mapping) else [bound]:
                if not ((_whole(value) and value >= 0) or (_number(value) and 0 <= value <= 1)):
                    raise InputError(
                        f"{name} must be rows (a whole number >= 0) or a share of the budget "
                        f"in [0.0, 1.0], got {value!r}."
                    )

    @classmethod
    def of(cls, given: int | float | str | Budget) -> Budget:
        """500 rows, a share of 0.2, "500", "0.2", "20%", or a Budget as it is."""
        if isinstance(given, Budget):
            return given
        if isinstance(given, str):
            text = given.strip()
            try:
                if text.endswith("%"):
                    return cls(share=float(text[:-1]) / 100)
                return cls(rows=int(text)) if text.isdecimal() else cls(share=float(text))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"A budget must be rows like 500, or a share like 0.2 or 20%, got {given!r}."
                ) from error
        if _whole(given):
            return cls(rows=int(given))
        if _number(given):
            return cls(share=float(given))
        raise InputError(
            f"A budget must be rows (500), a share (0.2 or '20%') or a Budget, got {given!r}."
        )

    def count(self, n: int, fit: int) -> int:
        """How many of n rows stay, of which `fit` can be scored. Not for a budget of tokens.

        A share is of all rows, rounded to the nearest, but never to none.
        Raises InputError for more rows than can be scored.
        """
        if self.rows is not None:
            if self.rows > fit:
                raise InputError(
                    f"The budget is {self.rows:,} rows, but only {fit:,} of {n:,} can be scored: "
                    f"ask for at most {fit:,}, or for '100%'."
                )
            return self.rows
        assert self.share is not None
        return min(max(1, math.floor(self.share * n + 0.5)), fit)

    def __str__(self) -> str:
        if self.rows is not None:
            return f"{self.rows:,} rows"
        return f"{100 * self.share:.4g} % of the rows" if self.share else f"{self.tokens:,} tokens"


def bounds(count: Count | None, names: list[str], total: int, default: int) -> NDArray[np.int64]:
    """(K,) rows for each group of these names; shares are of `total`, rounded down."""
    if count is None:
        return np.full(len(names), default, dtype=np.int64)
    if isinstance(count, Mapping):
        if unknown := set(count) - set(names):
            raise InputError(
                f"There is no group {sorted(unknown)[0]!r}: the groups are {', '.join(names)}."
            )
        values = [count.get(name, default) for name in names]
    else:
        values = [count] * len(names)
    rows = [int(v) if _whole(v) else math.floor(v * total + 1e-9) for v in values]
    return np.array(rows, dtype=np.int64)


def allocate(
    total: int, weights: ArrayLike, caps: ArrayLike, floors: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Share `total` among groups by weight, within bounds: exactly min(total, sum of the caps).

    Water-filling finds the level t at which the shares clip(t · weight, floor, cap) add up to the
    total; the largest remainders then get the rows that rounding down leaves, ties to the first.
    Groups of weight 0 get their floor, and more only when all others are full.

    weights: (K,) >= 0.   caps, floors: (K,) whole numbers, floors <= caps.   Gives (K,) int64.
    Raises InputError for weights that are negative or not finite, and for floors that add up to
    more than the total or exceed their caps.
    """
    weights = np.asarray(weights, dtype=np.float64)
    caps = np.asarray(caps, dtype=np.int64)
    floors = np.zeros_like(caps) if floors is None else np.asarray(floors, dtype=np.int64)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"The weights of groups must be finite and >= 0, got {weights.tolist()}.")
    if (floors > caps).any() or floors.sum() > total:
        raise InputError(
            f"The groups' floors ask for {floors.sum()} rows, with {total} to share and "
            f"{caps.tolist()} in the groups: lower the floors or raise the budget."
        )
    total = min(total, int(caps.sum()))
    filled = _level(total, weights, caps, floors)
    if filled.sum() < total - 0.5:  # all that have weight are full
        rest = weights == 0
        filled[rest] = _level(
            total - round(filled[~rest].sum()), np.ones(rest.sum()), caps[rest], floors[rest]
        )
    whole = np.clip(np.floor(filled + 1e-9).astype(np.int64), floors, caps)
    remainder = np.where(whole < caps, filled - whole, -1.0)
    left = total - int(whole.sum())
    whole[np.argsort(-remainder, kind="stable")[:left]] += 1
    return whole


def _level(
    total: int, weights: NDArray[Any], caps: NDArray[Any], floors: NDArray[Any]
) -> NDArray[np.float64]:
    """clip(t · weight, floor, cap) that add up to the total, or to less if all are full.

    The sum is piecewise linear in t and bends where a group leaves its floor or meets its cap.
    """

    def at(t: float) -> NDArray[np.float64]:
        return np.clip(t * weights, floors, caps).astype(np.float64)

    some = weights > 0
    bends = np.unique(np.concatenate([floors[some] / weights[some], caps[some] / weights[some]]))
    above = bisect.bisect_left(bends, total, key=lambda t: at(t).sum())
    if above == len(bends):
        return at(bends[-1]) if len(bends) else floors.astype(np.float64)
    if above == 0:
        return at(bends[0])
    low, high = bends[above - 1], bends[above]
    below, reached = at(low).sum(), at(high).sum()
    return at(low + (high - low) * (total - below) / (reached - below))


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
