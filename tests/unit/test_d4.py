"""D4 against its two stages in numpy; budgets on both sides of the share of survivors."""

import numpy as np
import pytest
from embedded import given, kept, unit

from data_prune.metrics.d4 import D4
from data_prune.metrics.semdedup import SemDeDup
from prune_core.errors import InputError


def with_copies(n=80, copies=20, width=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = unit(rng.normal(size=(n, width)) + 1)
    return np.concatenate([rows, rows[:copies] + 0.05 * unit(rng.normal(size=(copies, width)))])


def test_survivors_are_clustered_anew_and_the_most_typical_go_first():
    task = given(with_copies(), keep=50)
    columns = D4(clusters=1).score(task)
    alone = SemDeDup(clusters=1).score(task)
    np.testing.assert_array_equal(columns["cosine"], alone["cosine"])
    left = np.argsort(alone["cosine"], kind="stable")[:75]
    vectors = unit(task.vectors[np.arange(100)])
    centroid = vectors[left].mean(axis=0)
    distance = 1 - vectors[left] @ centroid / np.linalg.norm(centroid)
    np.testing.assert_allclose(columns["distance"][left], distance, atol=1e-6)
    assert np.isnan(np.delete(columns["distance"], left)).all()
    stay = np.flatnonzero(kept(D4(), columns, 50))
    np.testing.assert_array_equal(stay, np.sort(left[np.argsort(-distance)[:50]]))


def test_every_budget_is_exact_and_copies_come_last():
    task = given(with_copies(), keep=50)
    metric = D4()
    columns = metric.score(task)
    survivor = ~np.isnan(columns["distance"])
    assert survivor.sum() == 75
    before = np.zeros(100, dtype=bool)
    for budget in range(1, 101):
        stay = kept(metric, columns, budget)
        assert stay.sum() == budget
        assert (stay & before).sum() == budget - 1
        assert (stay & survivor).sum() == min(budget, 75)
        before = stay
    # The last to come back is the closest copy.
    assert columns["cosine"][~kept(metric, columns, 99)] == columns["cosine"].max()


def test_what_is_said_of_survivors_and_copies():
    task = given(with_copies(), keep=50)
    metric = D4()
    columns = metric.score(task)
    survivor = ~np.isnan(columns["distance"])
    for i in range(100):
        words = metric.describe(columns, i)
        if survivor[i]:
            distance = columns["distance"][i]
            assert words == f"cosine distance {distance:.3f} to the prototype of its cluster"
        else:
            assert f"cosine {columns['cosine'][i]:.3f} to row" in words
            assert metric.rank(columns, 50).instead[i] == columns["neighbour"][i] >= 0


def test_one_row_and_all_rows_as_survivors():
    columns = D4().score(given(np.ones((1, 3)), keep=1))
    assert kept(D4(), columns, 1).tolist() == [True]
    columns = D4(survivors=1).score(given(with_copies(), keep=10))
    assert not np.isnan(columns["distance"]).any()


def test_bad_settings():
    with pytest.raises(InputError, match=r"survivors must be above 0 and at most 1 .* got 75"):
        D4(survivors=75)
    with pytest.raises(InputError, match=r"survivors must be above 0 .* got 0"):
        D4(survivors=0)
    with pytest.raises(InputError, match=r"clusters must be a whole number >= 1, got -1."):
        D4(clusters=-1)
