"""Clusters of a graph: what k-means cuts through, the walk's arithmetic, order, workers, errors."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from sklearn.datasets import make_circles, make_moons
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from data_prune.clusters import kmeans
from data_prune.engine import Local
from data_prune.graph import DENSE_ROWS, choose_clusters, dense, landmark
from data_prune.rows import Columns, draws, read, rows_of
from data_prune.vectors import Vectors
from prune_core.errors import InputError

ENGINE = Local(1)


def lifted(points, width=24, noise=0.01, seed=0):
    """Points of a plane as unit vectors: on a patch of a sphere in some three dimensions."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((width, 3)))[0]
    space = np.column_stack([points, np.full(len(points), 3.0)]) @ axes.T
    return vectors(space + noise * rng.standard_normal(space.shape))


def vectors(array):
    return Vectors(np.asarray(array, dtype=np.float32), np.arange(len(array)))


def lots(n, seed=0):
    return np.random.default_rng(seed).random(n)


SHAPES = {
    "moons": make_moons(1200, noise=0.05, random_state=0),
    "rings": make_circles(1200, noise=0.04, factor=0.5, random_state=0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_it_follows_shapes_that_k_means_cuts_through(shape, seed):
    points, truth = SHAPES[shape]
    found = landmark(lifted(points), lots(1200, seed), ENGINE, k=2, seed=seed)
    cut = kmeans(lifted(points), 2, lots(1200, seed), ENGINE, seed)
    assert adjusted_rand_score(truth, found.labels) > 0.95
    assert adjusted_rand_score(truth, cut.labels) < 0.5


def test_two_pairs_by_hand():
    # On a circle, two pairs of rows face each other. Each row is a landmark, joined to itself and
    # to its partner: σ of a row is the distance d to the partner, σ of a landmark the distance D
    # to the second of the others, so that K = 1 and exp(-d²/dD). A pair's walk is then
    # [[p, 1-p], [1-p, p]], whose ZᵀZ has the eigenvalues 1 and (2p-1)².
    angles = np.array([0, 0.2, np.pi, np.pi + 0.2])
    rows = vectors(np.column_stack([np.cos(angles), np.sin(angles)]))
    found = landmark(rows, lots(4), ENGINE, k=4, landmarks=4, neighbours=2)
    p = 1 / (1 + np.exp(-np.tan(0.1)))
    inner = 1 - (2 * p - 1) ** 2
    np.testing.assert_allclose(found.eigenvalues, [0, 0, inner, inner], atol=1e-5)
    two = landmark(rows, lots(4), ENGINE, k=2, landmarks=4, neighbours=2)
    assert two.labels[0] == two.labels[1] != two.labels[2] == two.labels[3]


def walk_by_definition(rows, neighbours):
    """Z with every row a landmark, in float64 and plain numpy."""
    distances = np.linalg.norm(rows[:, None] - rows, axis=2)
    ranked = np.sort(distances, axis=1)
    of_rows, of_landmarks = ranked[:, neighbours - 1], ranked[:, neighbours]
    kernel = np.exp(-(distances**2) / (of_rows[:, None] * of_landmarks))
    kernel[distances > of_rows[:, None]] = 0
    return kernel / kernel.sum(axis=1, keepdims=True)


def test_eigenvalues_and_map_are_those_of_the_walk_between_all_rows():
    rows = np.random.default_rng(0).standard_normal((60, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = landmark(vectors(rows), lots(60), ENGINE, k=8, landmarks=60, neighbours=6)
    z = walk_by_definition(rows, 6)
    there_and_back = z / z.sum(axis=0) @ z.T
    expected = np.sort(1 - np.linalg.eigvals(there_and_back).real)
    np.testing.assert_allclose(found.eigenvalues, expected[:8], atol=1e-5)
    assert abs(found.eigenvalues[0]) < 1e-12
    assert found.eigenvalues[1] > 1e-3  # so the graph is in one part, and
    np.testing.assert_allclose(found.embedding[:, 0], found.embedding[0, 0], rtol=1e-5)
    np.testing.assert_allclose(
        there_and_back @ found.embedding, found.embedding * (1 - found.eigenvalues), atol=1e-4
    )


def test_order_and_workers_change_no_bit():
    points, _ = make_moons(9000, noise=0.05, random_state=1)  # three shards
    array = lifted(points).array
    texts = [f"row {i}" for i in range(9000)]

    def clustered(order, workers):
        rows = rows_of(read([texts[i] for i in order]), Columns(text="text"))
        found = landmark(
            Vectors(array[order], rows.positions),
            draws(rows.ids, 0, "landmarks"),
            Local(workers),
            k=6,
            landmarks=150,
        )
        return rows.ids, found

    ids, found = clustered(np.arange(9000), 1)
    for order, workers in [(np.arange(9000), 4), (np.random.default_rng(2).permutation(9000), 3)]:
        again_ids, again = clustered(order, workers)
        assert np.array_equal(again_ids, ids)
        assert np.array_equal(again.labels, found.labels)
        assert again.embedding.tobytes() == found.embedding.tobytes()
        assert again.eigenvalues.tobytes() == found.eigenvalues.tobytes()


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(4, 60),
    k=st.integers(1, 4),
    neighbours=st.integers(1, 8),
    copies=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_any_rows_give_labels_and_a_spectrum(n, k, neighbours, copies, seed):
    rng = np.random.default_rng(seed)
    rows = vectors(np.repeat(rng.standard_normal((n, 3)), copies, axis=0))
    found = landmark(rows, rng.random(len(rows)), ENGINE, k=k, seed=seed, neighbours=neighbours)
    assert found.labels.shape == (n * copies,)
    assert found.embedding.shape == (n * copies, k)
    assert set(found.labels) <= set(range(k))
    assert np.isfinite(found.embedding).all()
    assert abs(found.eigenvalues[0]) < 1e-9
    assert (np.diff(found.eigenvalues) >= -1e-12).all()
    assert found.eigenvalues[-1] < 1 + 1e-9


def test_what_landmark_refuses():
    rows, lot = vectors(np.eye(8)), lots(8)
    for k in (0, 9, True, 2.0):
        with pytest.raises(InputError, match=f"k must be .* 1 to the 8 rows, got {k!r}"):
            landmark(rows, lot, ENGINE, k=k)
    with pytest.raises(InputError, match=r"landmarks must be .* from 3 to the 8 rows, got 2"):
        landmark(rows, lot, ENGINE, k=3, landmarks=2)
    with pytest.raises(InputError, match="neighbours must be a whole number >= 1, got 0"):
        landmark(rows, lot, ENGINE, k=3, neighbours=0)
    equal = vectors(np.ones((50, 3)))
    with pytest.raises(InputError, match=r"Only 1 of the 12 landmarks drawn differ, .* 2 clusters"):
        landmark(equal, lots(50), ENGINE, k=2)
    assert landmark(equal, lots(50), ENGINE, k=1).labels.tolist() == [0] * 50


def test_more_landmarks_than_rows_are_as_many_with_a_warning():
    rows = lifted(SHAPES["moons"][0][:80])
    with pytest.warns(UserWarning, match="80 rows, fewer than the 500 landmarks asked for"):
        more = landmark(rows, lots(80), ENGINE, k=2, landmarks=500)
    as_many = landmark(rows, lots(80), ENGINE, k=2, landmarks=80)
    assert more.embedding.tobytes() == as_many.embedding.tobytes()


def as_published(rows, k, time):
    """PASER's clustering step by step, on the symmetric Laplacian."""
    n = len(rows)
    distances = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
    a = np.exp(-(distances**2) / (2 * np.median(distances) ** 2))
    half = np.diag(a.sum(axis=1) ** -0.5)
    eigenvalues, u = np.linalg.eigh(np.eye(n) - half @ a @ half)
    embedding = (half @ u)[:, :k] * np.exp(-time * eigenvalues[:k])
    affinity = np.abs(embedding @ embedding.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        w = NMF(k, init="random", random_state=0).fit_transform(affinity)
    return eigenvalues[:k], affinity, w.argmax(axis=1), a


@pytest.mark.parametrize("time", [0.0, 1.0])
def test_dense_is_the_published_scheme(time):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 6))
    rows = centres[np.arange(80) % 4] + 0.3 * rng.standard_normal((80, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows = vectors(rows).array.astype(np.float64)
    found = dense(vectors(rows), k=4, time=time)
    eigenvalues, affinity, labels, a = as_published(rows, 4, time)
    np.testing.assert_allclose(found.eigenvalues, eigenvalues, atol=1e-7)
    np.testing.assert_allclose(np.abs(found.embedding @ found.embedding.T), affinity, atol=1e-6)
    assert np.array_equal(found.labels, labels)
    assert adjusted_rand_score(np.arange(80) % 4, labels) > 0.9
    assert abs(found.eigenvalues[0]) < 1e-12
    # The published code gives I - D⁻¹A to this solver, as if it were symmetric.
    taken = eigsh(np.eye(80) - a / a.sum(axis=1, keepdims=True), k=4, which="SM")[0]
    assert abs(taken).min() > 1e-6


def test_what_dense_refuses():
    with pytest.raises(InputError, match=r"at most 5,000 rows, got 5,001: it would need 1.2 GB"):
        dense(vectors(np.ones((DENSE_ROWS + 1, 1))))
    with pytest.raises(InputError, match="k must be a whole number from 1 to the 3 rows, got 10"):
        dense(vectors(np.eye(3)))
    with pytest.raises(InputError, match="half of the distances between the 30 rows are 0"):
        dense(vectors(np.ones((30, 3))), k=2)


def blobs(k, n, spread, seed=0):
    rng = np.random.default_rng(seed)
    return vectors(rng.standard_normal((k, 12))[np.arange(n) % k] + spread * rng.random((n, 12)))


@pytest.mark.parametrize("k", [3, 7])
def test_the_gap_counts_clusters_and_both_halves_agree(k):
    found = choose_clusters(blobs(k, 400, 0.3), lots(400), ENGINE, at_most=12)
    assert found.k == k
    assert found.stability == 1
    assert found.eigenvalues.shape == (13,)
    again = choose_clusters(blobs(k, 400, 0.3), lots(400), Local(3), at_most=12)
    assert again.stability == found.stability
    assert again.eigenvalues.tobytes() == found.eigenvalues.tobytes()


def test_where_there_are_no_clusters_the_halves_disagree():
    noise = vectors(np.random.default_rng(0).standard_normal((400, 12)))
    assert choose_clusters(noise, lots(400), ENGINE, at_most=12).stability < 0.5


def test_what_choose_clusters_refuses():
    with pytest.raises(InputError, match="at least 64 rows and at_most >= 2, got 63 rows and 50"):
        choose_clusters(blobs(3, 63, 0.3), lots(63), ENGINE)
    with pytest.raises(InputError, match="at_most >= 2, got 400 rows and 1"):
        choose_clusters(blobs(3, 400, 0.3), lots(400), ENGINE, at_most=1)
    with pytest.raises(InputError, match="Only 1 of the"):
        choose_clusters(vectors(np.ones((100, 3))), lots(100), ENGINE)
