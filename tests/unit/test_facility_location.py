"""Facility location against plain greedy, on the rows' neighbours and on all of them."""

import numpy as np
import pytest
from embedded import given, kept, on_circle, unit

from data_prune.engine import Local
from data_prune.metrics.facility_location import FacilityLocation, greedy
from data_prune.neighbours import Neighbours, nearest
from data_prune.vectors import Vectors
from prune_core.errors import InputError


def mixture(n, width=12, centres=15, seed=0):
    rng = np.random.default_rng(seed)
    middles = 2 * rng.normal(size=(centres, width))
    return middles[rng.integers(centres, size=n)] + rng.normal(size=(n, width))


def neighbours_of(array, k):
    vectors = Vectors(np.asarray(array, dtype=np.float32), np.arange(len(array)))
    return nearest(vectors, k, np.zeros(len(array)), Local(1))


def plain_greedy(similar, keep, best):
    """Each time the row of the largest gain; the first of equals."""
    order, gains = [], []
    for _ in range(keep):
        gain = np.maximum(similar - best[:, None], 0).sum(axis=0, dtype=np.float64)
        gain[order] = -1
        order.append(int(gain.argmax()))
        gains.append(gain.max())
        best = np.maximum(best, similar[:, order[-1]])
    return order, gains


def objective(array, chosen):
    vectors = unit(array)
    return np.maximum(vectors @ vectors[chosen].T, 0).max(axis=1).sum()


def test_four_rows_by_hand():
    """20° serves all best, 80°, 20°, 0° and 70° off; what it serves worst is -60°."""
    task = given(on_circle(-60, 0, 20, 90), keep=2)
    columns = FacilityLocation().score(task)
    by_input = np.argsort(task.rows.positions)
    assert columns["place"][by_input].tolist() == [1, 3, 0, 2]
    assert columns["nearest"][by_input].tolist() == [0, 2, 2, 2]
    cosine = np.cos(np.radians([80, 20, 0, 70]))
    np.testing.assert_allclose(columns["cosine"][by_input], [1, *cosine[1:]], atol=1e-6)
    # Each counts from its farthest row: 20° from -60°, and the others from 0, at 90° or more.
    first = cosine.sum() - np.cos(np.radians(80))
    second = 1 - cosine[0]
    np.testing.assert_allclose(columns["gain"][by_input], [second, 0, first, 0], atol=1e-6)
    metric = FacilityLocation()
    assert [metric.describe(columns, i) for i in by_input] == [
        f"gain {second:.3g} over the 1 rows chosen before it",
        "cosine 0.940 to row 2, the nearest of 2 chosen",
        f"gain {first:.3g} over the 0 rows chosen before it",
        "cosine 0.342 to row 2, the nearest of 2 chosen",
    ]


@pytest.mark.parametrize("k", [3, 20, 79])
def test_lazy_greedy_is_plain_greedy(k):
    near = neighbours_of(mixture(80), k)
    floor = np.maximum(near.cosines[:, -1], 0)
    similar = np.repeat(floor[:, None], 80, axis=1)
    np.put_along_axis(similar, near.rows.astype(int), near.cosines, axis=1)
    np.fill_diagonal(similar, 1)
    expected, gains = plain_greedy(similar, 80, floor)
    order, ours = greedy(near, 80)
    assert order.tolist() == expected
    np.testing.assert_allclose(ours, gains, rtol=1e-6, atol=1e-6)
    assert (np.diff(ours) <= 1e-9).all()


def test_with_all_neighbours_it_is_greedy_on_all_similarities():
    array = mixture(60)
    similar = np.maximum(unit(array) @ unit(array).T, 0)
    order, _ = greedy(neighbours_of(array, 59), 60)
    best = np.zeros(60)
    for j in order:  # two rows that serve each other tie to the last bit: any of the best will do
        gain = np.maximum(similar - best[:, None], 0).sum(axis=0)
        assert gain[j] >= gain.max() - 1e-5
        best = np.maximum(best, similar[:, j])


def test_a_few_neighbours_do_as_well_as_all_similarities():
    array = mixture(1500, width=32, centres=100)
    vectors = unit(array)
    whole = np.maximum(vectors @ vectors.T, 0).astype(np.float32)
    for keep in (30, 150):
        dense, _ = plain_greedy(whole, keep, np.zeros(1500, np.float32))
        order, _ = greedy(neighbours_of(array, 128), keep)
        lot = np.random.default_rng(0).permutation(1500)[:keep]
        best = objective(array, dense)
        assert objective(array, order[:keep]) >= 0.99 * best
        assert objective(array, lot) < 0.95 * best


def test_places_without_a_neighbour_are_passed_over():
    rows = np.array([[1, 2], [0, -1], [-1, -1]], dtype=np.int32)
    cosines = np.array([[0.9, 0.5], [0.9, -1], [-1, -1]], dtype=np.float32)
    order, gains = greedy(Neighbours(rows, cosines), 3)
    # From floors .5, 0 and 0: row 0 gives itself .5 and row 1 .9, row 1 itself 1 and row 0 .4,
    # row 2 itself 1 and row 0 nothing.
    assert order.tolist() == [0, 2, 1] or order.tolist() == [1, 2, 0]
    np.testing.assert_allclose(gains, [1.4, 1.0, 0.1], atol=1e-6)


def test_budgets_are_exact_and_a_smaller_one_is_a_prefix():
    task = given(mixture(50), keep=20)
    metric = FacilityLocation(neighbours=8)
    columns = metric.score(task)
    assert sorted(columns["place"].tolist()) == list(range(50))
    for budget in range(1, 51):
        stay = kept(metric, columns, budget)
        assert stay.sum() == budget
        assert (columns["place"][stay] < budget).all()
    smaller = metric.score(given(mixture(50), keep=5))
    np.testing.assert_array_equal(kept(metric, smaller, 5), kept(metric, columns, 5))
    known = columns["nearest"] >= 0
    stay = task.rows.positions[columns["place"] < 20]
    assert np.isin(columns["nearest"][known], stay).all()
    vectors = unit(mixture(50))
    rows = task.rows.positions[known]
    cosine = (vectors[rows] * vectors[columns["nearest"][known]]).sum(axis=1)
    np.testing.assert_allclose(columns["cosine"][known], cosine, atol=1e-6)


def test_a_row_that_knows_none_of_those_chosen():
    task = given(mixture(50), keep=1)
    metric = FacilityLocation(neighbours=2)
    columns = metric.score(task)
    lost = np.flatnonzero(columns["nearest"] == -1)
    assert len(lost) > 0
    words = metric.describe(columns, lost[0])
    assert words == "none of its nearest rows is among the 1 chosen"


@pytest.mark.parametrize("array", [np.ones((1, 3)), np.ones((6, 3))])
def test_one_row_and_equal_rows(array):
    columns = FacilityLocation().score(given(array, keep=1))
    assert sorted(columns["place"].tolist()) == list(range(len(array)))
    assert kept(FacilityLocation(), columns, 1).sum() == 1


def test_the_order_of_the_input_and_the_workers_change_nothing():
    array = mixture(3000)
    columns = FacilityLocation(neighbours=16).score(given(array, keep=100, engine=Local(1)))
    order = np.random.default_rng(1).permutation(3000)
    task = given(array, keep=100, order=order, engine=Local(3))
    theirs = FacilityLocation(neighbours=16).score(task)
    for name in ("place", "gain", "cosine"):
        np.testing.assert_array_equal(columns[name], theirs[name])


def test_bad_settings():
    with pytest.raises(InputError, match=r"neighbours must be a whole number >= 1, got 0."):
        FacilityLocation(neighbours=0)
