"""SemDeDup: of rows that say nearly the same, one stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.clusters import kmeans
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.neighbours import Piece, cells, cells_for, pieces
from data_prune.vectors import Vectors
from prune_core.errors import InputError, check_count

_CELLS = 4  # in which a row is found by those it is like


@dataclass(frozen=True, kw_only=True)
class SemDeDup(Metric):
    """Drop the rows that are most like a row before them; the order is far from the centroid first.

    Source: Abbas et al., "SemDeDup: data-efficient learning at web-scale through semantic
    deduplication" (2023, arXiv:2303.09540), section 3, and the authors' code: in each cluster of
    a k-means, rows far from the centroid come first, and a row is dropped when its cosine to an
    earlier one exceeds 1 - ε.
    Here that cosine is the score, so that every budget is met exactly, and what a smaller one
    keeps a larger one keeps too. A row is also compared with rows of other clusters that have the
    centroid of its own among their 4 nearest: else copies that a border divides both stay. With
    one cluster the rows dropped for an ε are the paper's.
    The paper's rule may drop a row for one that is itself dropped, and so does this; the reason
    then names the one that stays for both.
    Cost: an embedding of each row, k-means, and 4 n² / clusters · width multiplications.

    threshold: cosine in (0, 1) above which a row is a duplicate and never stays, whatever room
    there is; the paper's 1 - ε. The budget is then spent on the others, so a budget of "100%"
    drops duplicates and nothing else. None leaves it to the budget.
    clusters: k; by default one for 500 rows, at most √n.
    """

    name = "semdedup"
    embeds = "text"
    threshold: float | None = None
    clusters: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError(
                f"threshold must be a cosine above 0 and below 1, like 0.95, got "
                f"{self.threshold!r}: leave it out to drop as many rows as the budget says."
            )
        if self.clusters is not None:
            check_count("clusters", self.clusters)

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric.

        cosine: the largest to an earlier row, -1 where there is none; neighbour: that row, as
        numbered in the input, or -1.
        """
        vectors: Vectors = given.needed("vectors", self.name)
        neighbour, cosine = nearest_earlier(vectors, given, self.clusters)
        return {"cosine": cosine, "neighbour": np.append(given.rows.positions, -1)[neighbour]}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        cosine, barred = columns["cosine"], {}
        if self.threshold is not None:
            why = f"a duplicate, by a cosine above {self.threshold:g} to an earlier row"
            barred = {int(i): why for i in np.flatnonzero(cosine > self.threshold)}
        return Ranking(-cosine, barred=barred, instead=columns["neighbour"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        neighbour = columns["neighbour"][i]
        if neighbour < 0:
            return "no earlier row in its cluster"
        return f"cosine {columns['cosine'][i]:.3f} to row {neighbour}"


def nearest_earlier(
    vectors: Vectors, given: Given, clusters: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n,) of each row the earlier one that is most like it, and the cosine; -1 where none is."""
    n = len(vectors)
    k = min(n, clusters or cells_for(n))
    found = kmeans(vectors, k, given.draws("k-means"), given.engine, given.seed)
    place = np.empty(n, dtype=np.int64)
    place[np.argsort(-found.distances, kind="stable")] = np.arange(n)
    members = cells(vectors, found, _CELLS, given.engine)
    todo = pieces(found.labels, members)
    work = _Earlier(vectors, members, place)
    neighbour, cosine = np.full(n, -1), np.full(n, -1.0)
    results = given.engine.map(work, todo, "finding duplicates")
    for (_, rows), (near, cosines) in zip(todo, results, strict=True):
        neighbour[rows], cosine[rows] = near, cosines
    return neighbour, cosine


class _Earlier:
    """Of a piece of rows, the row of their cell with an earlier place that is most like each."""

    def __init__(
        self, vectors: Vectors, members: list[NDArray[np.int64]], place: NDArray[np.int64]
    ) -> None:
        self.vectors, self.members, self.place = vectors, members, place

    def __call__(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        cell, rows = piece
        stored = self.members[cell]
        cosines = self.vectors[rows] @ self.vectors[stored].T
        cosines[self.place[stored] >= self.place[rows][:, None]] = -2
        best = cosines.argmax(axis=1)
        most = cosines[np.arange(len(rows)), best]
        return np.where(most == -2, -1, stored[best]), np.clip(most, -1, 1)
