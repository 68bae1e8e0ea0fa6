"""How much goes from where: shares of zeros by matrix, or units by layer, to an exact total."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_prune.core.structure import removed_count
from model_prune.core.target import UNITS, Dims, Family
from prune_core.errors import InputError

# Of one layer: a score a unit by family, higher ones are kept; "signal" holds one number.
Scored = Mapping[str, NDArray[np.float64]]
Kept = Mapping[Family, NDArray[np.bool_]]
# (scores of every layer, sizes of every layer, weights to remove) -> units that stay in each
Allocate = Callable[[Sequence[Scored], Sequence[Dims], float], Sequence[Kept]]


def check_share(name: str, value: float) -> None:
    """Raise InputError unless a share lies in [0, 1)."""
    if not 0 <= value < 1:
        hint = f": write {value / 100:g} for {value:g} %" if 1 <= value < 100 else ""
        raise InputError(f"{name} is a share in [0, 1), got {value:g}{hint}.")


def check_least(name: str, value: float, least: float) -> None:
    """Raise InputError for a number below the least that is allowed."""
    if not value >= least:
        raise InputError(f"{name} must be at least {least:g}, got {value:g}.")


def erk(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Erdős–Rényi: a matrix's density in proportion to (out + in) / (out · in), exact in total.

    A matrix that would be more than dense is dense, and the others share what is left.
    Source: Mocanu et al., "Scalable training of artificial neural networks" (2018), in the form
    of Evci et al., "Rigging the Lottery" (2020, arXiv:1911.11134), section 3.
    """
    names = list(shapes)
    size = np.array([float(out * width) for out, width in shapes.values()])
    raw = np.array([(out + width) / (out * width) for out, width in shapes.values()])
    return dict(zip(names, 1 - _scaled(raw, size, (1 - sparsity) * size.sum()), strict=True))


def _scaled(raw: NDArray[Any], size: NDArray[Any], kept: float) -> NDArray[Any]:
    """min(1, c · raw) with the c at which Σ size · density = kept."""
    density = np.ones_like(raw)
    free = np.ones(len(raw), dtype=bool)
    while free.any():
        scale = (kept - size[~free].sum()) / (raw * size)[free].sum()
        density[free] = scale * raw[free]
        full = free & (density > 1)
        if not full.any():
            break
        density[full] = 1
        free &= ~full
    return density


def in_one_ranking(
    scores: Callable[[], Iterable[tuple[str, Tensor]]], sparsity: float
) -> dict[str, float]:
    """Each matrix's share of the lowest scores of all; ties go from the first matrix on.

    scores: gives every matrix's name and scores, at least 0, each time it is called; one matrix is
    in memory at a time. As bits, such numbers of float32 stand in their order, so two counts of
    them, by their upper and by their lower half, find the bound exactly.
    """
    names, sizes, uppers = [], [], []
    for name, part in scores():
        names.append(name)
        sizes.append(part.numel())
        uppers.append(_count(_bits(part) >> 16, 1 << 15))
    removed = removed_count(sum(sizes), sparsity)
    if not removed:
        return dict.fromkeys(names, 0.0)
    upper, before = _reached(sum(uppers), removed)
    below = [int(counts[:upper].sum()) for counts in uppers]
    lowers = []
    for _, part in scores():
        bits = _bits(part)
        lowers.append(_count(bits[bits >> 16 == upper] & 0xFFFF, 1 << 16))
    lower, before = _reached(sum(lowers), removed - before)
    left = removed - sum(below) - before
    shares = {}
    for name, size, gone, counts in zip(names, sizes, below, lowers, strict=True):
        tied = min(left, int(counts[lower]))
        left -= tied
        shares[name] = (gone + int(counts[:lower].sum()) + tied) / size
    return shares


def _bits(scores: Tensor) -> NDArray[np.int32]:
    return scores.float().cpu().contiguous().numpy().reshape(-1).view(np.int32)


def _count(values: NDArray[Any], length: int) -> NDArray[np.int64]:
    return np.bincount(values, minlength=length)


def _reached(counts: Any, target: int) -> tuple[int, int]:
    """Where the running total of counts reaches the target, and the total before."""
    total = np.cumsum(counts)
    at = int(np.searchsorted(total, target))
    return at, int(total[at] - counts[at])


def around(signal: Sequence[float], total: float, spread: float) -> NDArray[np.float64]:
    """Shares of layers of one size: more where the signal is low, on average exactly `total`.

    The signal is scaled to [0, 2 · spread] and centred, so shares lie within `spread` or so of
    the total; those that would leave [0, 1) stop there and the others make up for it. Equal
    signals give equal shares.
    Source: Yin et al., "OWL" (2023, arXiv:2310.05175), section 4, and its code.
    """
    s = np.asarray(signal, dtype=np.float64)
    reach = float(np.ptp(s))
    if reach == 0:
        return np.full(len(s), total)
    scaled = (s - s.min()) / reach * 2 * spread
    return bounded(total - (scaled - scaled.mean()), total)


def bounded(shares: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """Shares moved by one common amount and clipped, so that their mean is `total`.

    They are clipped to 0 and 0.99, or the total where that is more.
    """
    most = max(0.99, total)
    reach = float(np.abs(shares).max()) + 1
    low, high = -reach, reach
    for _ in range(100):  # the mean grows with the amount, so halving finds it
        middle = (low + high) / 2
        mean = np.clip(shares + middle, 0, most).mean()
        low, high = (middle, high) if mean < total else (low, middle)
    return np.clip(shares + high, 0, most)


def standardised(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(s − mean) / std, std over n − 1; all zero where every score is the same."""
    deviation = scores.std(ddof=1) if scores.size > 1 else 0.0
    return (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)


def check_kept(kept: Sequence[Kept]) -> None:
    """Raise InputError where a layer would lose all of its units of one kind."""
    for i, families in enumerate(kept):
        for family, stays in families.items():
            if not stays.any():
                raise InputError(
                    f"Layer {i} would lose every {family}: remove less, or remove whole layers "
                    f"with a method that does, such as angle."
                )


def units_of(kept: Kept) -> dict[Family, Tensor]:
    """As a LayerPlan has them: numbers of the units that stay, of families that lose any."""
    return {
        family: torch.from_numpy(np.flatnonzero(stays))
        for family, stays in kept.items()
        if not stays.all()
    }


def everywhere_alike(skip_first: int = 0, skip_last: int = 0) -> Allocate:
    """The same share in every layer but those at the ends; KV groups first, rounded down.

    Neurons make up for the rounding in weights, so the total is met within one neuron. Where they
    are too few for that, more groups go.
    """

    def allocate(table: Sequence[Scored], dims: Sequence[Dims], budget: float) -> Sequence[Kept]:
        inner = range(skip_first, len(dims) - skip_last)
        if not inner:
            raise InputError(
                f"Of {len(dims)} layers the first {skip_first} and the last {skip_last} are to "
                f"stay whole, which leaves none to prune: leave fewer out."
            )
        share = budget / sum(dims[i].weights for i in inner)

        def groups_of(i: int) -> int:
            if "kv_group" not in table[i]:
                return 0
            neurons = (dims[i].neurons - 1) * dims[i].cost("neuron")
            least = math.ceil((share * dims[i].weights - neurons) / dims[i].cost("kv_group"))
            return max(removed_count(len(table[i]["kv_group"]), share), least)

        groups = [groups_of(i) for i in inner]
        left = budget - sum(
            count * dims[i].cost("kv_group") for count, i in zip(groups, inner, strict=True)
        )
        neurons = spread_out(left / dims[0].cost("neuron"), [dims[i].neurons for i in inner])
        gone = {i: (g, n) for i, g, n in zip(inner, groups, neurons, strict=True)}
        return [
            {
                family: without_lowest(scored[family], gone.get(i, (0, 0))[UNITS.index(family)])
                for family in UNITS
                if family in scored
            }
            for i, scored in enumerate(table)
        ]

    return allocate


def uniform(
    dims: Sequence[Dims], remove: float, families: Sequence[Family] = UNITS
) -> list[dict[Family, int]]:
    """How many units go from each layer, see `everywhere_alike`; raises InputError for all of one.

    remove: share of all layers' weights.
    """
    nothing: list[Scored] = [{f: np.zeros(each.count(f)) for f in families} for each in dims]
    kept = everywhere_alike()(nothing, dims, remove * sum(each.weights for each in dims))
    check_kept(kept)
    return [{f: int((~stays).sum()) for f, stays in each.items()} for each in kept]


def spread_out(total: float, sizes: Sequence[float]) -> list[int]:
    """`total`, rounded, in whole numbers in proportion to sizes; remainders to the largest."""
    whole = round(total)
    exact = np.array(sizes) * (whole / (sum(sizes) or 1))
    counts = np.floor(exact + 1e-9).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: whole - counts.sum()]
    counts[largest] += 1
    return [int(count) for count in counts]


def without_lowest(scores: NDArray[np.float64], removed: int) -> NDArray[np.bool_]:
    """Which units stay when the `removed` lowest go; ties by index."""
    kept = np.ones(len(scores), dtype=bool)
    kept[np.argsort(scores, kind="stable")[:removed]] = False
    return kept


def ranked_together(table: Sequence[Scored], dims: Sequence[Dims], budget: float) -> Sequence[Kept]:
    """All units of all layers in one ranking, each at its cost in weights.

    The lowest go until their cost is nearest to the budget. The best unit of each kind stays in
    every layer, as a layer cannot be without.
    """
    keys = [(i, family) for i, scored in enumerate(table) for family in UNITS if family in scored]
    scores = []
    for i, family in keys:
        own = table[i][family].copy()
        own[own.argmax()] = np.inf
        scores.append(own)
    costs = [np.full(len(own), dims[i].cost(f)) for (i, f), own in zip(keys, scores, strict=True)]
    flat = np.concatenate(scores)
    order = np.argsort(flat, kind="stable")
    spent = np.concatenate([[0], np.cumsum(np.concatenate(costs)[order])])
    count = int(np.abs(spent - budget).argmin())
    if count and np.isinf(flat[order[count - 1]]):
        raise InputError("So much would empty whole layers: remove less.")
    kept = np.ones(len(flat), dtype=bool)
    kept[order[:count]] = False
    parts = iter(np.split(kept, np.cumsum([len(own) for own in scores])[:-1]))
    return [{f: next(parts) for f in UNITS if f in scored} for scored in table]
