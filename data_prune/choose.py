"""From a ranking and a budget to the rows that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prune.budget import allocate
from data_prune.metric import Ranking

Array = NDArray[Any]


def places(order: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) each row's place within its group, from 0, when rows come in this order."""
    by_group = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups)
    place = np.empty(len(groups), dtype=np.int64)
    place[by_group] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place


def in_order(ranking: Ranking, lots: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rows that may be kept, best first; lots, (n,), settle ties."""
    may = np.isfinite(ranking.scores)
    may[list(ranking.barred)] = False
    order = np.lexsort((lots, -ranking.scores))
    return order[may[order]]


def choose(
    ranking: Ranking,
    total: int,
    lots: NDArray[np.float64],
    floors: NDArray[np.int64] | None = None,
    caps: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """(n,) which rows stay: exactly `total`, or all that may if they are fewer.

    With weights the groups share the total (`allocate`), and the best of each stay. Without, the
    sum of the scores is the largest there is between floors and caps: of each group the best rows,
    as many as its floor, and then the best of what is left.

    lots: (n,) settle ties.   floors, caps: (K,) rows of each group, besides the ranking's floors.
    """
    order = in_order(ranking, lots)
    kept = np.zeros(len(ranking.scores), dtype=bool)
    if ranking.groups is None:
        kept[order[:total]] = True
        return kept
    groups = ranking.groups[order]
    place = places(np.arange(len(order)), groups)
    k = int(ranking.groups.max()) + 1
    sizes = np.bincount(groups, minlength=k)
    most = sizes if caps is None else np.minimum(caps, sizes)
    if ranking.weights is not None:
        kept[order[place < allocate(total, ranking.weights, most)[groups]]] = True
        return kept
    least = np.zeros(k, dtype=np.int64)
    for given in (ranking.floors, floors):
        if given is not None:
            least = np.maximum(least, np.minimum(given, most))
    first = place < least[groups]
    kept[order[first]] = True
    then = order[~first & (place < most[groups])]
    kept[then[: max(0, total - int(first.sum()))]] = True
    return kept


def fill(
    ranking: Ranking,
    tokens: int,
    sizes: NDArray[np.int64],
    lots: NDArray[np.float64],
    floors: NDArray[np.int64] | None = None,
    caps: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """(n,) which rows stay under a budget of tokens: the best first, skipping what does not fit.

    The order is `choose`'s: with weights each group first fills its share of the tokens, and what
    is left goes to the best of all; without, floors (rows) come first, and caps (rows) hold.
    """
    order = in_order(ranking, lots)
    groups = np.zeros(len(sizes), np.int64) if ranking.groups is None else ranking.groups
    k = int(groups.max()) + 1
    kept = np.zeros(len(sizes), dtype=bool)
    count = np.zeros(k, dtype=np.int64)
    left = tokens

    def run(rows: NDArray[np.int64], limit: NDArray[np.int64], room: NDArray[np.int64]) -> None:
        """Take from these rows; limit: rows of each group; room: tokens of each group."""
        nonlocal left
        for i, g, size in zip(
            rows.tolist(), groups[rows].tolist(), sizes[rows].tolist(), strict=True
        ):
            if size <= left and size <= room[g] and count[g] < limit[g] and not kept[i]:
                kept[i] = True
                count[g] += 1
                room[g] -= size
                left -= size

    most = np.full(k, len(sizes)) if caps is None else caps
    if ranking.weights is not None:
        held = np.bincount(groups[order], sizes[order], minlength=k).astype(np.int64)
        run(order, most, allocate(tokens, ranking.weights, held))
    else:
        least = np.zeros(k, dtype=np.int64)
        for given in (ranking.floors, floors):
            if given is not None:
                least = np.maximum(least, given)
        run(order, np.minimum(least, most), np.full(k, tokens))
    run(order, most, np.full(k, tokens))
    return kept
