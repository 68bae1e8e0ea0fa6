"""k-means whose centroids depend on the rows alone: not on their order, nor on the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import Engine, Local, one_thread, shards
from data_prune.vectors import Vectors

_PER_CENTROID = 256  # rows to fit on: more do not move the centroids much (faiss's own default)


@dataclass(frozen=True, eq=False)
class Clusters:
    """centroids: (k, width), float32.   labels: (n,) int64.   distances: (n,) cosine, float32."""

    centroids: NDArray[np.float32]
    labels: NDArray[np.int64]
    distances: NDArray[np.float32]


def kmeans(
    vectors: Vectors, k: int, draws: NDArray[np.float64], engine: Engine, seed: int = 0
) -> Clusters:
    """Lloyd's k-means from a k-means++ start, and each row's cosine distance to its centroid.

    vectors: n unit vectors.   k: clusters, at most n.   draws: (n,) numbers in [0, 1) that belong
    to the rows: where there are more than 256 rows a centroid, those of the lowest are fitted on,
    and all are then assigned.
    Cost: 25 times 256 · k² · width multiplications to fit, n · k · width to assign.
    """
    chosen = np.sort(np.argsort(draws, kind="stable")[: _PER_CENTROID * k])
    centroids = _fit(vectors[chosen], k, seed)
    work = Assign(vectors, centroids)
    parts = list(engine.map(work, shards(len(vectors)), "clustering"))
    return Clusters(
        centroids,
        np.concatenate([labels for labels, _ in parts]),
        np.concatenate([distances for _, distances in parts]),
    )


class Assign:
    """Of a shard of rows, the nearest centroid (in Euclid's distance) and the cosine to it."""

    def __init__(self, vectors: Vectors, centroids: NDArray[np.float32]) -> None:
        self.vectors, self.centroids = vectors, centroids
        self.half = (centroids**2).sum(axis=1) / 2
        self.norms = np.maximum(np.sqrt(2 * self.half), 1e-12)

    def __call__(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        dots = self.vectors[rows] @ self.centroids.T
        labels = (dots - self.half).argmax(axis=1)
        cosines = dots[np.arange(len(labels)), labels] / self.norms[labels]
        return labels, 1 - cosines


def _fit(sample: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    from sklearn.cluster import kmeans_plusplus

    # The start needs no more than a look at the data.
    few = sample[:: max(1, len(sample) // (16 * k))]
    with one_thread():  # several add in another order, and spin where cores are few
        start, _ = kmeans_plusplus(few, k, random_state=seed)
    return lloyd(sample, np.ascontiguousarray(start, dtype=np.float32))


def lloyd(
    sample: NDArray[np.float32], centroids: NDArray[np.float32], iterations: int = 25
) -> NDArray[np.float32]:
    """(k, width) centroids after as many of Lloyd's iterations, or fewer once they gain little."""
    engine, parts = Local(), shards(len(sample))
    last = None
    for _ in range(iterations):
        sums = engine.reduce(_Sums(sample, centroids), parts)
        filled = sums["counts"] > 0  # an empty cluster stays where it is
        centroids = centroids.copy()
        centroids[filled] = sums["sums"][filled] / sums["counts"][filled, None]
        if last is not None and last - sums["inertia"] <= 1e-4 * last:
            break
        last = sums["inertia"]
    return centroids


class _Sums:
    def __init__(self, sample: NDArray[np.float32], centroids: NDArray[np.float32]) -> None:
        self.sample, self.centroids = sample, centroids
        self.half = (centroids**2).sum(axis=1) / 2

    def __call__(self, rows: slice) -> dict[str, NDArray[np.float64]]:
        block, k = self.sample[rows], len(self.centroids)
        near = block @ self.centroids.T - self.half
        labels = near.argmax(axis=1)
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(k))
        counts = np.bincount(labels, minlength=k).astype(np.float64)
        sums = np.zeros((k, block.shape[1]))
        some = counts > 0
        sums[some] = np.add.reduceat(block[order].astype(np.float64), starts[some], axis=0)
        inertia = len(block) - 2 * near[np.arange(len(block)), labels].astype(np.float64).sum()
        return {"sums": sums, "counts": counts, "inertia": np.array(inertia)}
