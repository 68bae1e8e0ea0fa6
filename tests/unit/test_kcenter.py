"""k-centre against plain greedy and against the best centres there are."""

from itertools import combinations

import numpy as np
import pytest
from embedded import given, kept, on_circle, unit

from data_prune.engine import Local
from data_prune.metrics import kcenter
from data_prune.metrics.kcenter import KCenter, farthest_first
from data_prune.vectors import Vectors


def vectors_of(array):
    return Vectors(np.asarray(array, dtype=np.float32), np.arange(len(array)))


def test_five_rows_by_hand():
    """From 0°: 180° is farthest, then 90°, then 50° (40° from 90°), then 10°."""
    array = on_circle(0, 10, 50, 90, 180)
    chosen, cosine, centre = farthest_first(vectors_of(array), 4, 0)
    assert chosen.tolist() == [0, 4, 3, 2]
    assert centre.tolist() == [-1, 0, 3, 0, 0]
    expected = [-1, *np.cos(np.radians([10, 40, 90, 180]))]
    np.testing.assert_allclose(cosine, expected, atol=1e-6)


@pytest.mark.parametrize("together", [1, 7, 64])
def test_the_order_is_that_of_plain_greedy(together, monkeypatch):
    monkeypatch.setattr(kcenter, "_TOGETHER", together)
    array = np.random.default_rng(0).normal(size=(300, 8))
    vectors = unit(array)
    expected, near = [17], vectors @ vectors[17]
    while len(expected) < 60:
        near[expected] = np.inf
        expected.append(int(near.argmin()))
        near = np.maximum(near, vectors @ vectors[expected[-1]])
    chosen, cosine, centre = farthest_first(vectors_of(array), 60, 17)
    assert chosen.tolist() == expected
    others = np.setdiff1d(np.arange(300), chosen)
    whole = vectors[others] @ vectors[chosen].T
    np.testing.assert_allclose(cosine[others], whole.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(centre[others], chosen[whole.argmax(axis=1)])


@pytest.mark.parametrize("seed", range(5))
def test_the_radius_is_at_most_twice_the_smallest(seed):
    array = np.random.default_rng(seed).normal(size=(11, 3))
    vectors = unit(array)
    away = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    for k in (1, 2, 3, 4):
        smallest = min(away[:, centres].min(axis=1).max() for centres in combinations(range(11), k))
        for first in range(11):
            chosen, _, _ = farthest_first(vectors_of(array), k, first)
            assert len(set(chosen.tolist())) == k
            assert away[:, chosen].min(axis=1).max() <= 2 * smallest + 1e-6


def test_budgets_are_exact_and_a_smaller_one_is_a_prefix():
    task = given(np.random.default_rng(0).normal(size=(40, 4)), keep=15)
    metric = KCenter()
    columns = metric.score(task)
    first = task.draws("first centre").argmin()
    assert kept(metric, columns, 1).nonzero()[0].tolist() == [first]
    assert sorted(columns["place"].tolist()) == list(range(40))
    for budget in range(1, 41):
        stay = kept(metric, columns, budget)
        assert stay.sum() == budget
        assert (columns["place"][stay] < budget).all()
    # Beyond those chosen, those farthest from them come first.
    rest = np.argsort(columns["place"])[15:]
    assert (np.diff(columns["distance"][rest]) <= 0).all()


def test_what_is_said_of_a_row():
    task = given(on_circle(0, 10, 50, 90, 180), keep=3)
    metric = KCenter()
    columns = metric.score(task)
    order = np.argsort(columns["place"])
    assert metric.describe(columns, order[0]) == "drawn as the first centre"
    first = task.rows.positions[order[0]]
    words = metric.describe(columns, order[1])
    assert words.endswith(f"to row {first}, the nearest of the 1 centres before it")
    words = metric.describe(columns, order[4])
    centre = columns["centre"][order[4]]
    assert words.startswith("cosine distance 0.")
    assert words.endswith(f"to row {centre}, the nearest of 3 centres")
    assert centre in task.rows.positions[order[:3]]


def test_copies_come_last_and_equal_rows_are_no_trouble():
    array = np.repeat(np.eye(4), 3, axis=0)
    task = given(array, keep=12)
    columns = KCenter().score(task)
    stay = task.rows.positions[kept(KCenter(), columns, 4)]
    assert sorted(stay // 3) == [0, 1, 2, 3]
    assert sorted(columns["place"].tolist()) == list(range(12))
    assert KCenter().score(given(np.ones((1, 2)), keep=1))["place"].tolist() == [0]


def test_the_order_of_the_input_and_the_workers_change_nothing(monkeypatch):
    array = np.random.default_rng(0).normal(size=(5000, 4))
    columns = KCenter().score(given(array, keep=200))
    order = np.random.default_rng(1).permutation(5000)
    monkeypatch.setattr(kcenter, "Local", lambda: Local(3))
    theirs = KCenter().score(given(array, keep=200, order=order))
    np.testing.assert_array_equal(columns["place"], theirs["place"])
    np.testing.assert_array_equal(columns["distance"], theirs["distance"])
