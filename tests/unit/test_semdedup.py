"""SemDeDup against the paper's rule in numpy; who a dropped row points to."""

import re
import warnings

import numpy as np
import pytest
from embedded import given, kept, on_circle, unit
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_prune import select
from data_prune.clusters import kmeans
from data_prune.engine import Local
from data_prune.metrics.semdedup import SemDeDup
from prune_core.errors import InputError


def published(array, labels, centroids):
    """The largest cosine of each row to one before it in its cluster, as the authors compute it."""
    vectors, most = unit(array), np.zeros(len(array))
    for cluster in np.unique(labels):
        rows = np.flatnonzero(labels == cluster)
        centroid = centroids[cluster] / np.linalg.norm(centroids[cluster])
        rows = rows[np.argsort(-(1 - vectors[rows] @ centroid), kind="stable")]
        most[rows] = np.triu(vectors[rows] @ vectors[rows].T, 1).max(axis=0)
    return most


def with_copies(n, width=8, seed=0):
    """Half of n rows, and a copy of each with a little noise."""
    rng = np.random.default_rng(seed)
    half = unit(rng.normal(size=(n // 2, width)))
    return np.concatenate([half, half + 0.1 * unit(rng.normal(size=half.shape))])


def test_four_rows_by_hand():
    """The mean is at 1.2°, so the order is -60°, 60°, 5°, 0°."""
    task = given(on_circle(-60, 0, 5, 60), keep=2)
    columns = SemDeDup(clusters=1).score(task)
    by_input = np.argsort(task.rows.positions)
    assert columns["neighbour"][by_input].tolist() == [-1, 2, 3, 0]
    expected = [-1, np.cos(np.radians(5)), np.cos(np.radians(55)), -0.5]
    np.testing.assert_allclose(columns["cosine"][by_input], expected, atol=1e-6)
    metric = SemDeDup()
    words = [metric.describe(columns, i) for i in by_input]
    assert words == [
        "no earlier row in its cluster",
        "cosine 0.996 to row 2",
        "cosine 0.574 to row 3",
        "cosine -0.500 to row 0",
    ]
    stay = {k: task.rows.positions[kept(metric, columns, k)].tolist() for k in (1, 2, 3)}
    assert [sorted(rows) for rows in stay.values()] == [[0], [0, 3], [0, 2, 3]]


@pytest.mark.parametrize("epsilon", [0.003, 0.01, 0.3])
def test_one_cluster_drops_what_the_paper_drops(epsilon):
    array = with_copies(200)
    most = published(array, np.zeros(200, int), unit(array).mean(axis=0, keepdims=True))
    assert np.abs(most - (1 - epsilon)).min() > 1e-5  # no case hangs on a rounding
    dropped = np.flatnonzero(most > 1 - epsilon)
    assert 0 < len(dropped) < 199
    task = given(array, keep=200)
    metric = SemDeDup(threshold=1 - epsilon, clusters=1)
    columns = metric.score(task)
    stay = task.rows.positions[kept(metric, columns, 200)]
    np.testing.assert_array_equal(np.setdiff1d(np.arange(200), stay), dropped)
    # And so does the budget of as many rows.
    stay = task.rows.positions[kept(SemDeDup(), columns, 200 - len(dropped))]
    np.testing.assert_array_equal(np.setdiff1d(np.arange(200), stay), dropped)


def test_several_clusters_see_all_that_the_paper_sees_and_more():
    array = with_copies(1000)
    task = given(array, keep=500)
    columns = SemDeDup(clusters=20).score(task)
    found = kmeans(task.vectors, 20, task.draws("k-means"), task.engine)
    most = published(array[task.rows.positions], found.labels, found.centroids)
    assert (np.maximum(columns["cosine"], 0) >= most - 1e-6).all()
    # A pair is together when one of the two is found missing something.
    cosines = columns["cosine"][np.argsort(task.rows.positions)]
    ours = np.maximum(*np.split(cosines, 2)) > 0.99
    papers = np.maximum(*np.split(most[np.argsort(task.rows.positions)], 2)) > 0.99
    assert ours.mean() >= 0.99 > papers.mean()


def test_a_threshold_bars_duplicates_whatever_room_there_is():
    array = with_copies(100)
    metric = SemDeDup(threshold=0.99)
    task = given(array, keep=100)
    columns = metric.score(task)
    duplicates = columns["cosine"] > 0.99
    assert 40 <= duplicates.sum() <= 50
    assert kept(metric, columns, 100).sum() == 100 - duplicates.sum()
    assert kept(metric, columns, 20).sum() == 20
    assert not (kept(metric, columns, 20) & duplicates).any()
    ranking = metric.rank(columns, 100)
    assert set(ranking.barred) == set(np.flatnonzero(duplicates).tolist())
    assert set(ranking.barred.values()) == {"a duplicate, by a cosine above 0.99 to an earlier row"}


numbers = st.integers(-3, 3).map(float)
embeddings = st.integers(2, 24).flatmap(
    lambda n: arrays(np.float32, (n, 3), elements=numbers).filter(lambda a: a.any(axis=1).all())
)


@settings(deadline=None, max_examples=25)
@drawn(embeddings, st.data())
def test_a_dropped_row_points_to_one_that_stays(array, data):
    n = len(array)
    metric = SemDeDup(
        clusters=data.draw(st.integers(1, 3)),
        threshold=data.draw(st.sampled_from([None, 0.5, 0.95])),
    )
    texts = [f"row {i}" for i in range(n)]
    vectors = unit(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer rows than the budget, equal scores
        whole = select(texts, metric=metric, budget=n, embeddings=array, engine=Local(1))
    first = sum("no earlier row" in reason for reason in whole.reasons)
    for budget in range(1, n + 1):
        selection = whole.reselect(budget)
        for i in selection.dropped.tolist():
            reason = selection.reasons[i]
            if like := re.search(r"cosine (-?[0-9.]+) to row (\d+)", reason):
                cosine = vectors[i] @ vectors[int(like[2])]
                np.testing.assert_allclose(float(like[1]), cosine, atol=6e-4)
            named = re.search(r"row (\d+) stays for it", reason)
            if named:
                assert int(named[1]) in selection.indices
            else:  # only where not even all rows without an earlier one stay
                assert budget < first


def test_the_order_of_the_input_and_the_workers_change_nothing():
    array = with_copies(5000)
    task = given(array, keep=2000, engine=Local(1))
    columns = SemDeDup().score(task)
    order = np.random.default_rng(0).permutation(5000)
    other = given(array, keep=2000, order=order, engine=Local(3))
    theirs = SemDeDup().score(other)
    np.testing.assert_array_equal(columns["cosine"], theirs["cosine"])
    some = theirs["neighbour"] >= 0
    np.testing.assert_array_equal(columns["neighbour"][some], order[theirs["neighbour"][some]])


@pytest.mark.parametrize("array", [np.ones((1, 4)), np.ones((7, 4))])
def test_one_row_and_equal_rows(array):
    task = given(array, keep=1)
    metric = SemDeDup(clusters=3)
    columns = metric.score(task)
    assert kept(metric, columns, 1).sum() == 1
    assert (columns["neighbour"] == -1).sum() == 1
    assert (columns["cosine"] <= 1).all()


@pytest.mark.parametrize("threshold", [0, 1, 1.5, -0.2])
def test_a_threshold_is_a_cosine_between_0_and_1(threshold):
    with pytest.raises(InputError, match=r"threshold must be a cosine above 0 and below 1, .*"):
        SemDeDup(threshold=threshold)


def test_clusters_must_be_some():
    with pytest.raises(InputError, match=r"clusters must be a whole number >= 1, got 0."):
        SemDeDup(clusters=0)


def test_vectors_are_needed():
    task = given(np.ones((3, 2)), keep=1)
    object.__setattr__(task, "vectors", None)
    with pytest.raises(InputError, match=r"The metric 'semdedup' needs embeddings="):
        SemDeDup().score(task)
