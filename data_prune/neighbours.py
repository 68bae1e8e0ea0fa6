"""Nearest neighbours by cosine: among all rows where they are few, within near cells where many."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.clusters import Clusters, kmeans
from data_prune.engine import Engine, shards
from data_prune.vectors import Vectors

_ALL = 20_000  # rows up to which each is compared with all
_CELLS = 8  # in which a row is found, where there are more
_AT_ONCE = 2**24  # cosines that a worker holds, 64 MiB

Piece = tuple[int, NDArray[np.int64]]
"""A cell, and rows that look for others in it."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """rows: (n, k) int32, nearest first, never the row itself; -1 where its cell holds no more.

    cosines: (n, k) float32, falling; -1 where there is no row.
    """

    rows: NDArray[np.int32]
    cosines: NDArray[np.float32]


def nearest(
    vectors: Vectors, k: int, draws: NDArray[np.float64], engine: Engine, seed: int = 0
) -> Neighbours:
    """The k nearest rows of each row: exact up to 20,000 rows, nearly so above.

    Above, rows are clustered (`cells_for`), and a row looks in its own cell for the rows that have
    the cell's centroid among their 8 nearest; benchmarks/data/facility.py measures the share found.

    vectors: n unit vectors.   k: at most n - 1 are found.   draws: (n,) numbers in [0, 1) that
    belong to the rows.
    Cost: n² · width multiplications up to 20,000 rows; above, 8 n² / (number of cells) · width,
    and k-means.
    """
    n = len(vectors)
    k = min(k, n - 1)
    own, members = np.zeros(n, dtype=np.int64), [np.arange(n)]
    if n > _ALL:
        found = kmeans(vectors, cells_for(n), draws, engine, seed)
        own, members = found.labels, cells(vectors, found, _CELLS, engine)
    todo = pieces(own, members)
    near = Neighbours(np.full((n, k), -1, dtype=np.int32), np.full((n, k), -1, dtype=np.float32))
    results = engine.map(_Search(vectors, members, k), todo, "finding neighbours")
    for (_, queries), (rows, cosines) in zip(todo, results, strict=True):
        near.rows[queries, : rows.shape[1]] = rows
        near.cosines[queries, : rows.shape[1]] = cosines
    return near


def cells_for(n: int) -> int:
    """How many clusters to cut n rows into: of some 500 rows, but at most √n.

    Beyond that clustering would cost more than it saves.
    """
    return max(1, round(min(n / 500, math.sqrt(n))))


def cells(vectors: Vectors, found: Clusters, count: int, engine: Engine) -> list[NDArray[np.int64]]:
    """Of each cluster, the rows that have its centroid among their `count` nearest, ascending.

    A pair that a border divides is so together in a cell.
    """
    count = min(count, len(found.centroids))
    work = _Closest(vectors, found, count)
    flat = np.concatenate(list(engine.map(work, shards(len(vectors))))).ravel()
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat, minlength=len(found.centroids)))
    return np.split(order // count, ends[:-1])


def pieces(own: NDArray[np.int64], members: list[NDArray[np.int64]]) -> list[Piece]:
    """Every row with its own cell, cut so that each piece's cosines with the cell fit in memory."""
    order = np.argsort(own, kind="stable")
    ends = np.cumsum(np.bincount(own, minlength=len(members)))
    out = []
    for cell, rows in enumerate(np.split(order, ends[:-1])):
        size = max(1, _AT_ONCE // max(1, len(members[cell])))
        out += [(cell, rows[part]) for part in shards(len(rows), size)]
    return out


class _Closest:
    """Of a shard of rows, the numbers of the `count` nearest centroids, in no order."""

    def __init__(self, vectors: Vectors, found: Clusters, count: int) -> None:
        self.vectors, self.found, self.count = vectors, found, count
        self.half = (found.centroids**2).sum(axis=1) / 2

    def __call__(self, rows: slice) -> NDArray[np.int64]:
        near = self.vectors[rows] @ self.found.centroids.T - self.half
        own = self.found.labels[rows]
        near[np.arange(len(own)), own] = np.inf  # also where centroids coincide
        return np.argpartition(near, -self.count, axis=1)[:, -self.count :]


class _Search:
    def __init__(self, vectors: Vectors, members: list[NDArray[np.int64]], k: int) -> None:
        self.vectors, self.members, self.k = vectors, members, k

    def __call__(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        cell, queries = piece
        stored = self.members[cell]
        k = min(self.k, len(stored) - 1)
        cosines = self.vectors[queries] @ self.vectors[stored].T
        cosines[np.arange(len(queries)), np.searchsorted(stored, queries)] = -np.inf  # itself
        best = np.argpartition(cosines, len(stored) - 1 - k, axis=1)[:, len(stored) - k :]
        best.sort(axis=1)  # so that ties are settled by the rows' order
        found = np.take_along_axis(cosines, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        return stored[best], np.take_along_axis(found, order, axis=1)
