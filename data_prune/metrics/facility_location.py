"""Facility location: rows kept such that every row has one that is much like it."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.neighbours import Neighbours, nearest
from data_prune.vectors import Vectors
from prune_core.errors import check_count


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Metric):
    """Keep the rows S of large Σ_i max_{j ∈ S} cos(i, j): greedily, the largest gain first.

    Source: the submodular function as in Wei, Iyer & Bilmes, "Submodularity in data subset
    selection and active learning" (ICML 2015), greedy within 1 - 1/e of the best (Nemhauser et
    al., 1978), with the lazy evaluation of Minoux (1978); compared with the packages apricot and
    DeepCore, which hold all n² similarities.
    Here a row knows its nearest rows alone, and is never less well served than by the last of
    them: a gain counts only what is above that. Counting from 0, as a sparse matrix would, sends
    the first choices to rows that no one serves yet, and ends lower on the full matrix.
    Budgets far below n / neighbours rows run out of gains, and need more neighbours.
    Cost: an embedding of each row, the nearest neighbours (see `data_prune.neighbours`), and a sum
    over some `neighbours` numbers for each gain that is looked at, a few a row kept.

    neighbours: nearest rows that each row knows.
    """

    name = "facility_location"
    embeds = "text"
    nested = False
    neighbours: int = 128

    def __post_init__(self) -> None:
        check_count("neighbours", self.neighbours)

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric.

        place: of each row in the order, those not chosen last.   chosen: how many are.
        gain: by which a row raised the sum when it was chosen, 0 for the others.
        nearest: the chosen row that is most like it, as numbered in the input, -1 where none is
        among its neighbours; cosine: with that row.
        """
        vectors: Vectors = given.needed("vectors", self.name)
        near = nearest(vectors, self.neighbours, given.draws("k-means"), given.engine, given.seed)
        order, gains = greedy(near, given.keep)
        place = np.empty(len(vectors), dtype=np.int64)
        place[order] = np.arange(len(vectors))
        gain = np.zeros(len(vectors))
        gain[order[: len(gains)]] = gains
        by, cosine = _stands_for(near, place < len(gains))
        return {
            "place": place,
            "chosen": np.array(len(gains)),
            "gain": gain,
            "nearest": np.append(given.rows.positions, -1)[by],
            "cosine": cosine,
        }

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(-columns["place"].astype(np.float64))

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        place, chosen = columns["place"][i], columns["chosen"]
        if place < chosen:
            return f"gain {columns['gain'][i]:.3g} over the {place:,} rows chosen before it"
        if columns["nearest"][i] < 0:
            return f"none of its nearest rows is among the {chosen:,} chosen"
        return (
            f"cosine {columns['cosine'][i]:.3f} to row {columns['nearest'][i]}, the nearest of "
            f"{chosen:,} chosen"
        )


def greedy(near: Neighbours, keep: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n,) all rows, the first `keep` in greedy order and the others by what was last known.

    Also (keep,) the gains. Of equal gains the row that comes first is chosen.
    A gain can only shrink as rows are chosen, so a row whose gain, looked at again, is still above
    what the others had, is the next.
    """
    n = len(near.rows)
    starts, covered, cosines = _covers(near)
    best = np.maximum(near.cosines.min(axis=1, initial=1), 0)  # of each row, with what is chosen

    def gain(j: int) -> float:
        part = slice(starts[j], starts[j + 1])
        return float(np.maximum(cosines[part] - best[covered[part]], 0).sum(dtype=np.float64))

    heap = [(-gain(j), j) for j in range(n)]
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    with tqdm(total=min(keep, n), desc="choosing rows", disable=None, leave=False) as bar:
        while len(chosen) < min(keep, n):
            j = heap[0][1]
            now = (-gain(j), j)
            if now > heap[0]:
                heapq.heapreplace(heap, now)
                continue
            heapq.heappop(heap)
            chosen.append(j)
            gains.append(-now[0])
            part = slice(starts[j], starts[j + 1])
            best[covered[part]] = np.maximum(best[covered[part]], cosines[part])
            bar.update()
    return np.array(chosen + [j for _, j in sorted(heap)]), np.array(gains)


def _covers(
    near: Neighbours,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """The rows that have row j among their nearest, and itself, with the cosines.

    They are at starts[j] to starts[j + 1] of the other two arrays.
    """
    n, k = near.rows.shape
    known = near.rows.ravel() >= 0
    j = np.concatenate([near.rows.ravel()[known], np.arange(n, dtype=np.int32)])
    i = np.concatenate([np.repeat(np.arange(n, dtype=np.int32), k)[known], np.arange(n)])
    cosines = np.concatenate([near.cosines.ravel()[known], np.ones(n, dtype=np.float32)])
    order = np.argsort(j, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(j, minlength=n))])
    return starts, i[order].astype(np.int32), cosines[order]


def _stands_for(
    near: Neighbours, chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n,) of each row the chosen row that is nearest, and the cosine; -1 where it knows none."""
    n = len(chosen)
    rows = np.column_stack([np.arange(n, dtype=np.int32), near.rows])  # each itself first
    cosines = np.column_stack([np.ones(n, dtype=np.float32), near.cosines])
    is_chosen = np.append(chosen, False)[rows]  # the last place answers for -1
    first = is_chosen.argmax(axis=1)
    found = is_chosen[np.arange(n), first]
    by, cosine = rows[np.arange(n), first], cosines[np.arange(n), first]
    return np.where(found, by, -1).astype(np.int64), np.where(found, cosine, -1).astype(np.float64)
