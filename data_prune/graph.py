"""Clusters of a graph on the rows, which may be curved or long where those of k-means are round.

A walker on the graph steps from a row to one like it. The walk's slowest directions, the low
eigenvectors of the graph's Laplacian, place rows that are soon reached from each other side by
side: a diffusion map, in which clusters are easy to tell apart.

landmark(...)         near-linear: rows are joined through a thousand landmarks, not to each other
dense(...)            every row joined to every other, as PASER published it; for few rows
choose_clusters(...)  how many clusters the graph shows
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import csr_array

from data_prune.clusters import Assign, Clusters, kmeans, lloyd
from data_prune.engine import Engine, one_thread, shards
from data_prune.vectors import Vectors
from prune_core.errors import InputError

DENSE_ROWS = 5_000
"""Rows that `dense` takes: six arrays of as many squared, 1.2 GB."""

_LANDMARKS = 1_000
_ROWS_A_LANDMARK = 4  # at least: a row that is its own landmark is joined to hardly any other
_LANDMARKS_A_CLUSTER = 4  # at least, or nothing of its shape is left
_DRAWN_A_LANDMARK = 8  # rows that the landmarks are spread on
_SPREADING = 3  # iterations of Lloyd's: the landmarks need to be spread, not optimal
_STARTS = 5  # of k-means on the map, where a poor one parts what belongs together
_CHOICE_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Clusters, and the map on which they were told apart.

    labels: (n,) int64, below k.   embedding: (n, k) float32; in a connected graph the first
    column is the same for all rows, and the next two make a picture.   eigenvalues: (k,) float64,
    of the graph's Laplacian, ascending from 0; as many are 0 as the graph has parts, up to k.
    """

    labels: NDArray[np.int64]
    embedding: NDArray[np.float32]
    eigenvalues: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """k: clusters.   stability: how alike two halves of the rows cluster all of them, as the
    adjusted Rand index: 1 for the same clusters, 0 for no more likeness than by chance.
    eigenvalues: (at_most + 1,) float64, ascending; the gap after the k-th is a wide one.
    """

    k: int
    stability: float
    eigenvalues: NDArray[np.float64]


def landmark(
    vectors: Vectors,
    draws: NDArray[np.float64],
    engine: Engine,
    k: int = 10,
    seed: int = 0,
    landmarks: int | None = None,
    neighbours: int = 5,
) -> Diffusion:
    """Clusters by a random walk between the rows and a few landmarks among them.

    Source: Chen & Cai, "Large scale spectral clustering with landmark-based representation"
    (AAAI 2011): row i goes to landmark j with probability Z_ij = K_ij / Σ_j K_ij over its nearest
    landmarks, back with Z_ij / Σ_i Z_ij, and the eigenvectors of the m x m two-step walk give the
    map of the rows. Here the kernel has local scales, K_ij = exp(-d_ij² / (σ_i σ_j)), σ the
    distance to the last neighbour (Zelnik-Manor & Perona, "Self-tuning spectral clustering", NIPS
    2004); landmarks are spread by a few iterations of k-means; the map is clustered by the best of
    five k-means on rows of unit length (Ng, Jordan & Weiss, NIPS 2001). PASER's own scheme is
    `dense`.

    vectors: n unit vectors.   draws: (n,) numbers in [0, 1) that belong to the rows; landmarks are
    those of the lowest.   k: clusters; 10 in PASER's code.   landmarks: m; by default 1,000, at
    most a quarter of the rows, and at least 4 a cluster.   neighbours: landmarks that a row is
    joined to; more hold scattered clusters together, as of text, fewer keep thin ones apart.

    Raises InputError for k that is no whole number from 1 to n, for fewer landmarks than clusters,
    and where fewer landmarks than k differ. Warns where landmarks > n, and takes n.
    Cost: each vector is read once, for n · m · width multiplications; an m x m eigenproblem; memory
    for some n · (12 k + 20 · neighbours) bytes beside the vectors, and m · 16 kB a worker.
    """
    n = len(vectors)
    _check("k", k, 1, n, "rows")
    if landmarks is None:
        landmarks = _enough(n, k)
    elif landmarks > n:
        warnings.warn(
            f"There are {n:,} rows, fewer than the {landmarks:,} landmarks asked for: each row "
            f"is one.",
            stacklevel=2,
        )
        landmarks = n
    _check("landmarks", landmarks, k, n, "rows")
    if neighbours < 1:
        raise InputError(f"neighbours must be a whole number >= 1, got {neighbours!r}: 5 is usual.")
    walk = _walk(vectors, _landmarks(vectors, draws, k, landmarks), engine, neighbours)
    eigenvalues, directions = _slowest(walk, k)
    embedding = (walk @ directions).astype(np.float32)
    clusters = _clusters(Vectors(embedding, np.arange(n)), draws, engine, k, seed)
    return Diffusion(clusters.labels, embedding, eigenvalues)


def _enough(n: int, k: int) -> int:
    """Landmarks for n rows and k clusters."""
    return min(n, max(_LANDMARKS_A_CLUSTER * k, min(_LANDMARKS, n // _ROWS_A_LANDMARK)))


def _landmarks(vectors: Vectors, draws: NDArray[np.float64], k: int, m: int) -> NDArray[np.float32]:
    """(at most m, width) different ones: rows of the lowest draws, spread by k-means."""
    drawn = np.argsort(draws, kind="stable")
    start = np.unique(vectors[drawn[:m]], axis=0)
    if len(start) < k:
        raise InputError(
            f"Only {len(start):,} of the {m:,} landmarks drawn differ, too few for {k:,} clusters: "
            f"ask for fewer clusters, or for more landmarks if more rows differ."
        )
    return lloyd(vectors[np.sort(drawn[: _DRAWN_A_LANDMARK * m])], start, _SPREADING)


def _walk(
    vectors: Vectors, landmarks: NDArray[np.float32], engine: Engine, neighbours: int
) -> csr_array:
    """(n, m) probabilities of going from a row to a landmark; Z of Chen & Cai."""
    n, work = len(vectors), _Joined(vectors, landmarks, neighbours)
    parts = list(engine.map(work, shards(n), "joining rows to landmarks"))
    starts = np.arange(n + 1) * work.neighbours
    joined, steps = (np.concatenate(arrays).ravel() for arrays in zip(*parts, strict=True))
    return csr_array((steps.astype(np.float64), joined, starts), shape=(n, len(landmarks)))


class _Joined:
    """Of a shard of rows, the nearest landmarks and the probabilities of going there."""

    def __init__(self, vectors: Vectors, landmarks: NDArray[np.float32], neighbours: int) -> None:
        self.vectors, self.landmarks = vectors, landmarks
        self.neighbours = min(neighbours, len(landmarks))
        # One more, as a landmark is the nearest to itself.
        _, squares = _nearest(landmarks, landmarks, min(neighbours + 1, len(landmarks)))
        self.scales = np.sqrt(squares[:, -1])

    def __call__(self, rows: slice) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        joined, squares = _nearest(self.vectors[rows], self.landmarks, self.neighbours)
        kernel = np.exp(-squares / (np.sqrt(squares[:, -1:]) * self.scales[joined]))
        return joined, kernel / kernel.sum(axis=1, keepdims=True)


def _nearest(
    block: NDArray[np.float32], landmarks: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(b, count) the nearest landmarks, nearest first, and the squared distances, above 0."""
    squares = block @ (-2 * landmarks.T)
    squares += (block**2).sum(axis=1)[:, None]
    squares += (landmarks**2).sum(axis=1)
    joined = np.empty((len(block), count), np.int32)
    found = np.empty((len(block), count), np.float32)
    every = np.arange(len(block))
    for j in range(count):  # a few passes are faster than a partial sort, and ties go to the first
        joined[:, j] = squares.argmin(axis=1)
        found[:, j] = squares[every, joined[:, j]]
        squares[every, joined[:, j]] = np.inf
    return joined, np.maximum(found, 1e-6)  # below are rounding errors


def _slowest(walk: csr_array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest eigenvalues of the Laplacian I - D^-½ ZᵀZ D^-½ between landmarks, D the sums of
    Z's columns, and (m, count) its eigenvectors times D^-½, those of the walk.
    """
    between = (walk.T @ walk).toarray()
    # A landmark that no row goes to has an empty row, and stays a point of its own.
    roots = np.sqrt(np.maximum(between.sum(axis=1), 1e-300))
    m = len(between)
    with one_thread():  # several threads add in another order
        found, u = eigh(between / roots / roots[:, None], subset_by_index=[m - count, m - 1])
    u = u[:, ::-1]
    u *= np.sign(u[np.abs(u).argmax(axis=0), np.arange(count)])  # the sign is anyone's choice
    return 1 - found[::-1], u / roots[:, None]


def _clusters(
    rows: Vectors, draws: NDArray[np.float64], engine: Engine, k: int, seed: int
) -> Clusters:
    """The best of several k-means: its rows are nearest to their centroids."""
    tries = (kmeans(rows, k, draws, engine, _STARTS * seed + start) for start in range(_STARTS))
    return min(tries, key=lambda found: float(found.distances.sum(dtype=np.float64)))


def dense(vectors: Vectors, k: int = 10, seed: int = 0, time: float = 1.0) -> Diffusion:
    """Clusters as PASER published them: a kernel between all rows, a diffusion map, and NMF.

    Source: He et al., "PASER: post-training data selection for efficient pruned large language
    model recovery" (ICLR 2026, arXiv:2502.12594), clustering stage, and its code: A_ij =
    exp(-d_ij² / 2σ²), σ the median of all distances; the k lowest eigenvectors φ_l of I - D⁻¹A,
    weighted by the heat kernel exp(-time · λ_l); affinity |E Eᵀ| of that embedding E, factorised
    into W H >= 0 from a random start (scikit-learn's NMF, 200 iterations at most); a row's cluster
    is the largest entry of its row of W.
    Differs from the code: it gives I - D⁻¹A, which is not symmetric, to a solver for symmetric
    matrices, and the lowest eigenvalue does not come out as 0. Here I - D^-½ A D^-½, which is
    symmetric and has the same eigenvalues, is solved, and D^-½ takes its eigenvectors back. The
    code has no weights: time=0. Some clusters may stay empty, as there.

    vectors: n unit vectors.   k: clusters; 10 in the code.
    Raises InputError for k that is no whole number from 1 to n, for more than 5,000 rows, and
    where half of all distances are 0.
    Cost: n² · width + n³ multiplications, and six n x n arrays of float64 at once. On text, with
    the median for σ, the kernel is nearly constant; `landmark` has local scales.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    n = len(vectors)
    _check("k", k, 1, n, "rows")
    if n > DENSE_ROWS:
        raise InputError(
            f"The dense graph takes at most {DENSE_ROWS:,} rows, got {n:,}: it would need "
            f"{6 * 8 * n**2 / 1e9:,.1f} GB. Use landmarks."
        )
    rows = vectors[slice(0, n)].astype(np.float64)
    lengths = (rows**2).sum(axis=1)
    squares = np.maximum(lengths + lengths[:, None] - 2 * rows @ rows.T, 0)
    np.fill_diagonal(squares, 0)
    sigma = np.median(np.sqrt(squares))
    if not sigma > 1e-6:
        raise InputError(
            f"At least half of the distances between the {n:,} rows are 0, so they give no scale: "
            f"leave out rows that are the same, or use landmarks."
        )
    kernel = np.exp(-squares / (2 * sigma**2))
    roots = np.sqrt(kernel.sum(axis=1))
    laplacian = np.eye(n) - kernel / roots / roots[:, None]
    eigenvalues, u = eigh(laplacian, subset_by_index=[0, k - 1], overwrite_a=True)
    u *= np.sign(u[np.abs(u).argmax(axis=0), np.arange(k)])
    embedding = np.exp(-time * eigenvalues) * u / roots[:, None]
    affinity = np.abs(embedding @ embedding.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 iterations are the published ones
        factors = NMF(n_components=k, init="random", random_state=seed).fit_transform(affinity)
    return Diffusion(
        factors.argmax(axis=1).astype(np.int64), embedding.astype(np.float32), eigenvalues
    )


def choose_clusters(
    vectors: Vectors,
    draws: NDArray[np.float64],
    engine: Engine,
    seed: int = 0,
    at_most: int = 50,
    neighbours: int = 5,
) -> Choice:
    """The number of clusters that shows in the landmark graph's spectrum and in both halves.

    The three widest of the gaps λ_k+1 - λ_k, k from 2 to at_most, propose (the eigengap: von
    Luxburg, "A tutorial on spectral clustering", 2007, section 8.3), and the most stable of the
    three is taken. Stability: two halves of the rows are clustered apart, each clusters all rows by
    its own landmarks, map and centroids, and the two are compared. PASER takes the k of the lowest
    NMF error, which only falls as k grows.

    Where there are no clusters, one of the three is still the most stable: look at `stability`.
    At most 20,000 rows, those of the lowest draws, are looked at; at_most is lowered to a 32nd of
    them. Raises InputError for at_most < 2, for fewer than 64 rows, and where they do not differ.
    Cost: `landmark` on these rows three times, whatever their number.
    """
    from sklearn.metrics import adjusted_rand_score

    few = np.sort(np.argsort(draws, kind="stable")[:_CHOICE_ROWS])
    sample, draws, n = vectors.subset(few), draws[few], len(few)
    if n < 64 or at_most < 2:
        raise InputError(
            f"Choosing a number of clusters takes at least 64 rows and at_most >= 2, got {n:,} "
            f"rows and {at_most!r}: say how many clusters you want."
        )
    count = min(at_most, n // 32) + 1

    def mapped(some: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The spectrum of some rows' graph, and all rows on its map."""
        m = _enough(len(some), count)
        landmarks = _landmarks(sample.subset(some), draws[some], count, m)
        walk = _walk(sample, landmarks, engine, neighbours)
        eigenvalues, directions = _slowest(walk[some], count)
        return eigenvalues, walk @ directions

    eigenvalues, _ = mapped(np.arange(n))
    proposed = 2 + np.argsort(-np.diff(eigenvalues[1:]), kind="stable")[:3]
    order = np.argsort(draws, kind="stable")
    halves = [np.sort(order[start::2]) for start in (0, 1)]
    maps = [mapped(half)[1].astype(np.float32) for half in halves]
    best = Choice(0, -np.inf, eigenvalues)
    for k in proposed.tolist():
        found = []
        for half, whole in zip(halves, maps, strict=True):
            rows = Vectors(whole[:, :k], np.arange(n))
            clusters = _clusters(rows.subset(half), draws[half], engine, k, seed)
            found.append(Assign(rows, clusters.centroids)(slice(0, n))[0])
        stability = float(adjusted_rand_score(*found))
        if stability > best.stability:
            best = Choice(k, stability, eigenvalues)
    return best


def _check(name: str, value: int, low: int, high: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(
            f"{name} must be a whole number from {low:,} to the {high:,} {what}, got {value!r}."
        )
