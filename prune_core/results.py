"""The arithmetic of a cut: which items stay under a budget, each with its reason.

Shared by text (sentences, sizes in characters or tokens) and data (rows). It needs only scores
and sizes, so a result can be cut again at another budget without another model call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prune_core.errors import InputError


@dataclass(frozen=True, eq=False)
class Cut:
    """kept: (n,) bool, read-only.   reasons: one short phrase an item, kept or not."""

    kept: NDArray[np.bool_]
    reasons: tuple[str, ...]


def cut(
    scores: ArrayLike,
    sizes: ArrayLike,
    *,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    max_size: int | None = None,
    unit: str = "characters",
) -> Cut:
    """Decide which items stay; higher scores are kept. Exactly one budget is given.

    scores: (n,) numbers, compared as float64.   sizes: (n,) whole numbers >= 0, in `unit`.
    threshold: in [0, 1]; an item stays when its score >= threshold, whatever its size.
    keep_ratio: in [0, 1]; the sizes of the kept items sum to at most keep_ratio * sizes.sum().
    max_size: whole number >= 0, in `unit`; the sizes of the kept items sum to at most this.

    A size budget is filled from the highest score down, equal scores in the order given. An item
    that does not fit is skipped and smaller ones after it may still enter; an item of size 0
    always fits.

    Raises InputError for no budget or several, for one outside its range, for scores with NaN,
    and for arrays that are not one-dimensional numbers of one length.
    """
    budgets = {"threshold": threshold, "keep_ratio": keep_ratio, "max_size": max_size}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"Exactly one of threshold, keep_ratio and max_size must be given, "
            f"got {' and '.join(given) or 'none'}: choose one."
        )
    scores, sizes = _scores_and_sizes(scores, sizes)
    if threshold is not None:
        return _cut_at(scores, _fraction("threshold", threshold))

    total = int(sizes.sum())
    if keep_ratio is not None:
        keep_ratio = _fraction("keep_ratio", keep_ratio)
        budget = math.floor(keep_ratio * total)
        name = f"budget of {budget} {unit} (keep_ratio {keep_ratio} of {total})"
    else:
        if isinstance(max_size, bool) or not isinstance(max_size, Integral) or max_size < 0:
            raise InputError(
                f"max_size must be a whole number >= 0 (in {unit}), got {max_size!r}: "
                f"give the largest total size that may stay."
            )
        budget = int(max_size)
        name = f"budget of {budget} {unit}"
    return _fill(scores, sizes, budget, name)


def _cut_at(scores: NDArray[np.float64], threshold: float) -> Cut:
    kept = scores >= threshold
    reasons = []
    for score, keep in zip(scores.tolist(), kept.tolist(), strict=True):
        shown = f"{score:.3g}"
        if (float(shown) >= threshold) != keep:  # rounding must not contradict the decision
            shown = repr(score)
        reasons.append(f"score {shown} {'≥' if keep else '<'} threshold {threshold}")
    return _cut(kept, reasons)


def _fill(scores: NDArray[np.float64], sizes: NDArray[np.int64], budget: int, name: str) -> Cut:
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), dtype=bool)
    left = budget
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= left:
            kept[index] = True
            left -= size
    return _cut(kept, [f"{'fits' if keep else 'over'} the {name}" for keep in kept.tolist()])


def _cut(kept: NDArray[np.bool_], reasons: list[str]) -> Cut:
    kept.setflags(write=False)
    return Cut(kept, tuple(reasons))


def _scores_and_sizes(
    scores: ArrayLike, sizes: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    scores = _array("scores", scores, kinds="fiu", allowed="numbers")
    sizes = _array("sizes", sizes, kinds="iu", allowed="whole numbers")
    if len(scores) != len(sizes):
        raise InputError(
            f"scores and sizes must have one entry an item, got {len(scores)} scores and "
            f"{len(sizes)} sizes: give both for the same items."
        )
    if len(bad := np.flatnonzero(np.isnan(scores))):
        raise InputError(
            f"scores must not be NaN, got NaN for {len(bad)} of {len(scores)} items, the first "
            f"at index {bad[0]}: score those items again or leave them out."
        )
    if len(bad := np.flatnonzero(sizes < 0)):
        raise InputError(
            f"sizes must be >= 0, got {sizes[bad[0]]} at index {bad[0]}: give each item's length."
        )
    return scores.astype(np.float64), sizes.astype(np.int64)


def _array(name: str, values: ArrayLike, *, kinds: str, allowed: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise InputError(
            f"{name} must be {allowed} in one dimension, got shape {array.shape} of type "
            f"{array.dtype}: give one number an item."
        )
    return array


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise InputError(f"{name} must be a number in [0, 1], got {value!r}: try 0.5.")
    return float(value)
