"""k-centre: each row kept is the one that is farthest from all that are kept already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from data_prune.engine import Local, shards
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.vectors import Vectors

_TOGETHER = 64  # rows whose cosines with all are computed at once


@dataclass(frozen=True, kw_only=True)
class KCenter(Metric):
    """Keep rows such that every row has one near: greedy, farthest first, in cosine distance.

    Source: Sener & Savarese, "Active learning for convolutional neural networks: a core-set
    approach" (ICLR 2018, arXiv:1708.00489), algorithm 1; their second algorithm, which allows for
    outliers by integer programming, is not here. The largest distance that is left is at most
    twice the smallest possible (González, 1985), in Euclid's distance between unit vectors, which
    puts rows in the same order as the cosine's. Outliers are kept first: that is the method.
    The first row is drawn, as in DeepCore's code, where it is from a generator; here by the rows'
    content and the seed.
    Cost: an embedding of each row, and n · (rows kept) · width multiplications, somewhat more: the
    64 farthest rows are compared with all rows together, as most of them are the next ones kept.
    """

    name = "kcenter"
    embeds = "text"
    nested = False

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric.

        place: of each row in the order, those not chosen last.   chosen: how many are.
        distance: of a row chosen, from all before it; of the others, from all chosen.
        centre: the chosen row that distance is to, as numbered in the input; -1 for the first.
        """
        vectors: Vectors = given.needed("vectors", self.name)
        first = int(given.draws("first centre").argmin())
        chosen, cosine, centre = farthest_first(vectors, given.keep, first)
        place = np.empty(len(vectors), dtype=np.int64)
        rest = np.argsort(cosine, kind="stable")
        rest = rest[~np.isin(rest, chosen)]
        place[np.concatenate([chosen, rest])] = np.arange(len(vectors))
        return {
            "place": place,
            "chosen": np.array(len(chosen)),
            "distance": 1 - cosine,
            "centre": np.append(given.rows.positions, -1)[centre],
        }

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(-columns["place"].astype(np.float64))

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        place, centre = columns["place"][i], columns["centre"][i]
        if centre < 0:
            return "drawn as the first centre"
        near = f"cosine distance {columns['distance'][i]:.3f} to row {centre}, the nearest"
        if place < columns["chosen"]:
            return f"{near} of the {place:,} centres before it"
        return f"{near} of {columns['chosen']:,} centres"


def farthest_first(
    vectors: Vectors, keep: int, first: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The greedy order: `keep` rows from `first` on; ties go to the row that comes first.

    Also (n,) of each row the largest cosine to a row chosen before it, and that row; -1 and -1 for
    the first. All engines come here: one round of many is too short to be sent to other machines.
    """
    n, engine = len(vectors), Local()
    keep = min(keep, n)
    cosine, centre = np.full(n, -1.0), np.full(n, -1)
    left = np.full(n, -2.0)  # as `cosine`, but infinite for the rows that are chosen
    left[first] = -3
    chosen: list[int] = []
    with tqdm(total=keep, desc="choosing centres", disable=None, leave=False) as bar:
        while len(chosen) < keep:
            together = np.argsort(left, kind="stable")[:_TOGETHER]
            columns = engine.map(_Cosines(vectors, vectors[together]), shards(n))
            cosines = dict(
                zip(together.tolist(), np.concatenate(list(columns), axis=1), strict=True)
            )
            while len(chosen) < keep and (following := int(left.argmin())) in cosines:
                chosen.append(following)
                left[following] = np.inf
                new = cosines[following]
                nearer = np.flatnonzero(new > left)
                cosine[nearer] = left[nearer] = new[nearer]
                centre[nearer] = following
                bar.update()
    return np.array(chosen), cosine, centre


class _Cosines:
    """Of some vectors with a shard of the rows, one line each."""

    def __init__(self, vectors: Vectors, some: NDArray[np.float32]) -> None:
        self.vectors, self.some = vectors, some

    def __call__(self, rows: slice) -> NDArray[np.float32]:
        cosines: NDArray[np.float32] = self.some @ self.vectors[rows].T
        return np.clip(cosines, -1, 1, out=cosines)
