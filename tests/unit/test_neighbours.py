"""Nearest neighbours against numpy; what is found where not all rows are compared."""

import numpy as np
import pytest
from embedded import unit

from data_prune import neighbours
from data_prune.clusters import Clusters, kmeans
from data_prune.engine import Local
from data_prune.neighbours import cells, cells_for, nearest, pieces
from data_prune.vectors import Vectors


def vectors_of(array):
    return Vectors(np.asarray(array, dtype=np.float32), np.arange(len(array)))


def mixture(n, width=16, centres=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(centres, width))[rng.integers(centres, size=n)] + 0.7 * rng.normal(
        size=(n, width)
    )


def by_numpy(array, k):
    cosines = unit(array) @ unit(array).T
    np.fill_diagonal(cosines, -np.inf)
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(cosines, rows, axis=1)


def test_all_rows_are_compared_where_they_are_few():
    array = mixture(300)
    found = nearest(vectors_of(array), 7, np.zeros(300), Local(2))
    rows, cosines = by_numpy(array, 7)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_row_finds_more_than_the_others(n):
    found = nearest(vectors_of(mixture(n)), 10, np.zeros(n), Local(1))
    assert found.rows.shape == found.cosines.shape == (n, n - 1)
    for i, row in enumerate(found.rows):
        assert sorted([i, *row.tolist()]) == list(range(n))


def test_of_equal_rows_the_first_come_first():
    found = nearest(vectors_of(np.ones((5, 3))), 4, np.zeros(5), Local(1))
    np.testing.assert_array_equal(found.rows[2], [0, 1, 3, 4])


@pytest.fixture
def many(monkeypatch):
    """3,000 rows as if they were too many to compare all."""
    monkeypatch.setattr(neighbours, "_ALL", 100)
    monkeypatch.setattr(neighbours, "cells_for", lambda n: 30)
    return mixture(3000), np.random.default_rng(1).random(3000)


def test_near_cells_hold_nearly_all_neighbours(many):
    array, draws = many
    found = nearest(vectors_of(array), 10, draws, Local(2))
    rows, _ = by_numpy(array, 10)
    hits = [np.isin(a, b).mean() for a, b in zip(found.rows, rows, strict=True)]
    assert np.mean(hits) > 0.95
    assert not (found.rows == np.arange(3000)[:, None]).any()
    whole = unit(array) @ unit(array).T
    np.testing.assert_allclose(
        found.cosines, np.take_along_axis(whole, found.rows.astype(int), axis=1), atol=1e-6
    )
    assert (np.diff(found.cosines, axis=1) <= 0).all()


def test_the_number_of_workers_and_the_size_of_pieces_change_nothing(many, monkeypatch):
    array, draws = many
    one = nearest(vectors_of(array), 5, draws, Local(1))
    three = nearest(vectors_of(array), 5, draws, Local(3))
    np.testing.assert_array_equal(one.rows, three.rows)
    np.testing.assert_array_equal(one.cosines, three.cosines)
    monkeypatch.setattr(neighbours, "_AT_ONCE", 3000)
    small = nearest(vectors_of(array), 5, draws, Local(3))
    np.testing.assert_array_equal(one.rows, small.rows)


def test_a_cell_with_too_few_rows_leaves_places_empty(monkeypatch):
    monkeypatch.setattr(neighbours, "_ALL", 10)
    monkeypatch.setattr(neighbours, "_CELLS", 1)
    monkeypatch.setattr(neighbours, "cells_for", lambda n: 2)
    apart = np.repeat([[1.0, 0.0], [-1.0, 0.0]], [18, 2], axis=0)
    found = nearest(vectors_of(apart), 3, np.random.default_rng(0).random(20), Local(1))
    assert found.rows[18:].tolist() == [[19, -1, -1], [18, -1, -1]]
    assert found.cosines[18:].tolist() == [[1, -1, -1]] * 2
    assert (found.rows[:18] >= 0).all()


def test_cells_are_those_of_the_nearest_centroids_and_always_the_own():
    array, draws = mixture(500), np.random.default_rng(0).random(500)
    vectors = vectors_of(array)
    found = kmeans(vectors, 6, draws, Local(1))
    members = cells(vectors, found, 2, Local(1))
    away = ((unit(array)[:, None] - found.centroids) ** 2).sum(axis=2)
    near = np.argsort(away, axis=1)[:, :2]
    for number, rows in enumerate(members):
        np.testing.assert_array_equal(rows, np.flatnonzero((near == number).any(axis=1)))
    same = Clusters(np.ones((4, 16), np.float32), np.full(500, 3), found.distances)
    assert cells(vectors, same, 1, Local(1))[3].tolist() == list(range(500))
    assert [len(rows) for rows in cells(vectors, same, 9, Local(1))] == [500] * 4


def test_pieces_hold_every_row_once_with_its_cell_and_bound_the_memory(monkeypatch):
    monkeypatch.setattr(neighbours, "_AT_ONCE", 40)
    own = np.array([2, 0, 2, 2, 0, 2, 2])
    members = [np.array([1, 4]), np.array([], dtype=int), np.arange(20)]
    found = pieces(own, members)
    assert sorted(np.concatenate([rows for _, rows in found]).tolist()) == list(range(7))
    for cell, rows in found:
        assert (own[rows] == cell).all()
        assert len(rows) * len(members[cell]) <= 40


@pytest.mark.parametrize(("n", "k"), [(1, 1), (700, 1), (100_000, 200), (1_000_000, 1000)])
def test_cells_hold_500_rows_until_clustering_would_cost_more(n, k):
    assert cells_for(n) == k
