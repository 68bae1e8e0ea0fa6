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


def choose(
    ranking: Ranking, total: int, caps: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """(n,) which rows stay: exactly `total`, or all that may if they are fewer.

    With weights the groups share the total (`allocate`), and the best of each stay. With floors
    the sum of the scores is the largest there is between floors and caps: each group's best rows
    first, as many as its floor, then the best of what is left.

    caps: (K,) rows that a group keeps at most.
    """
    may = np.isfinite(ranking.scores)
    may[list(ranking.barred)] = False
    order = np.argsort(-ranking.scores, kind="stable")  # NaN sorts last
    order = order[may[order]]
    kept = np.zeros(len(may), dtype=bool)
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
    floors = np.minimum(0 if ranking.floors is None else ranking.floors, most)
    first = place < np.broadcast_to(floors, k)[groups]
    kept[order[first]] = True
    then = order[~first & (place < most[groups])]
    kept[then[: max(0, total - int(first.sum()))]] = True
    return kept
