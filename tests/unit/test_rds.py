"""RDS+'s rounds against the plain loop of the paper's code."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from data_prune.choose import choose
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.rds import RDS
from data_prune.rows import Columns, read, rows_of
from data_prune.vectors import Vectors
from prune_core.errors import InputError


def rows(texts):
    source = read(list(texts))
    return rows_of(source, Columns().found(source.names))


def given(vectors, targets, texts=None, names=None, **fields):
    """Vectors and targets in the order of their texts as they are put in."""
    pool = rows(texts or [f"row {i}" for i in range(len(vectors))])
    target = rows(names or [f"target {i}" for i in range(len(targets))])
    return Given(
        rows=pool,
        keep=len(pool),
        vectors=Vectors(np.asarray(vectors), pool.positions),
        target=target,
        target_vectors=Vectors(np.asarray(targets), target.positions),
        **fields,
    )


def order_of(about, metric=None):
    """Rows best first, by their place in the input."""
    metric = metric or RDS()
    scores = metric.rank(metric.score(about), len(about.rows)).scores
    return about.rows.positions[np.argsort(-scores, kind="stable")].tolist()


def round_robin(cosines, size):
    """Each target pops the row nearest to it; one that is kept already is not kept twice."""
    lists = [sorted(range(cosines.shape[1]), key=lambda i: -row[i]) for row in cosines]
    kept = []
    while len(kept) < size:
        for mine in lists:
            row = mine.pop(0)
            if row not in kept:
                kept.append(row)
    return kept[:size]


def plain(about):
    cosines = about.target_vectors[:] @ about.vectors[:].T
    found = round_robin(cosines, len(about.rows))
    return about.rows.positions[found].tolist()


# ------------------------------------------------------------------ the order
def test_two_targets_by_hand():
    rows = [[1, 0], [0.9, 0.1], [0, 1], [0.5, 0.5], [-1, 0]]
    about = given(rows, [[1, 0], [1, 0.2]])
    first, second = about.target.positions.tolist()
    # Nearest to [1, 0]: 0 1 3 2 4; to [1, .2] (11.3 degrees): 1 (6.3) 0 (0) 3 (45) 2 (90) 4 (180).
    wanted = [0, 1, 3, 2, 4] if first == 0 else [1, 0, 3, 2, 4]
    assert order_of(about) == wanted
    columns = RDS().score(about)
    at = np.argsort(about.rows.positions)
    assert columns["round"][at].tolist() == [1, 1, 4, 3, 5]
    named = {0: 0, 1: 1}  # rows 0 and 1 are each the nearest of one target
    for row, target in named.items():
        assert columns["target"][at[row]] == target
    assert columns["cosine"][at[0]] == pytest.approx(1)
    angle = np.arctan2(0.1, 0.9) - np.arctan2(0.2, 1)
    assert columns["cosine"][at[1]] == pytest.approx(np.cos(angle))
    assert {first, second} == {0, 1}


def test_a_row_that_is_kept_uses_up_the_turn():
    # Both targets name row 0 first; the second does not take its next one instead.
    about = given([[1, 0], [0.8, 0.6], [0.8, -0.6], [-1, 0]], [[1, 0.1], [1, -0.1]])
    order = order_of(about)
    assert order[0] == 0
    first = about.target.positions[0]
    assert order[1] == (1 if first == 0 else 2)
    assert RDS().score(about)["round"].max() == 4


@settings(max_examples=60, deadline=None)
@examples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_order_is_that_of_the_plain_loop(n, targets, width, seed):
    rng = np.random.default_rng(seed)
    # Few different directions, so that there are many ties.
    draw = rng.integers(-1, 2, size=(n + targets, width)) + np.eye(width)[0] * 0.1
    about = given(draw[:n].astype(np.float32), draw[n:].astype(np.float32))
    assert order_of(about) == plain(about)


def test_targets_that_fill_several_blocks():
    rng = np.random.default_rng(0)
    about = given(rng.normal(size=(90, 5)), rng.normal(size=(37, 5)))
    assert order_of(about) == plain(about)


# ------------------------------------------------------------------ the contract
def test_the_same_rows_whatever_the_order_and_the_workers():
    rng = np.random.default_rng(1)
    vectors, targets = rng.normal(size=(200, 8)), rng.normal(size=(40, 8))
    one = given(vectors, targets, engine=Local(1))
    pick, pick_target = (random.Random(2).sample(range(n), n) for n in (200, 40))
    other = given(
        vectors[pick],
        targets[pick_target],
        [f"row {i}" for i in pick],
        [f"target {i}" for i in pick_target],
        engine=Local(3),
    )
    assert order_of(one) == [pick[i] for i in order_of(other)]
    columns, others = RDS().score(one), RDS().score(other)
    for name in ("turn", "round", "cosine"):
        assert (columns[name] == others[name]).all()


@pytest.mark.parametrize("keep", [1, 2, 19, 20])
def test_budgets_are_exact_and_nested(keep):
    rng = np.random.default_rng(3)
    about = given(rng.normal(size=(20, 4)), rng.normal(size=(3, 4)))
    columns = RDS().score(about)
    kept = choose(RDS().rank(columns, keep), keep, about.draws("ties"))
    assert kept.sum() == keep
    assert set(about.rows.positions[kept]) == set(order_of(about)[:keep])


def test_every_row_is_described():
    about = given([[1, 0], [0.6, 0.8]], [[1, 0]])
    columns = RDS().score(about)
    at = int(np.flatnonzero(about.rows.positions == 1)[0])
    assert RDS().describe(columns, at) == (
        "number 2 of the rows nearest to row 0 of the target, cosine 0.600"
    )


def test_targets_may_be_vectors_alone():
    about = given(np.eye(3), np.eye(3)[:2])
    both, alone = (RDS().score(a) for a in (about, dataclasses.replace(about, target=None)))
    assert (both["turn"] == alone["turn"]).all()
    assert (both["target"] == alone["target"]).all()


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vectors", "'rds' needs embeddings=, an array"),
        ("target_vectors", "'rds' needs target=, rows of what"),
    ],
)
def test_what_is_missing_is_named(missing, message):
    about = given(np.eye(2), np.eye(2))
    with pytest.raises(InputError, match=message):
        RDS().score(dataclasses.replace(about, **{missing: None}))


def test_targets_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"have 3 numbers and those of the rows 2: make both with"):
        RDS().score(given(np.eye(2), np.eye(3)))


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0]])
def test_a_target_without_direction_is_refused(bad):
    with pytest.raises(InputError, match=r"Vector \d of the target has no direction: its embed"):
        RDS().score(given(np.eye(2), [[1.0, 0.0], bad]))


def test_an_empty_target_is_refused():
    about = given(np.eye(2), np.eye(2))
    empty = dataclasses.replace(
        about, target_vectors=about.target_vectors.subset(np.array([], int))
    )
    with pytest.raises(InputError, match=r"The target has no rows"):
        RDS().score(empty)
