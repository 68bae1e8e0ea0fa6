"""Budgets: what they may be, and that they are spent exactly and where they should be."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prune import Budget, select
from data_prune.budget import allocate
from data_prune.choose import choose, fill
from data_prune.metric import Ranking
from prune_core.errors import InputError


@pytest.mark.parametrize(
    ("given", "rows", "share"),
    [
        (500, 500, None),
        (0.2, None, 0.2),
        ("20%", None, 0.2),
        (" 12.5 % ", None, 0.125),
        ("500", 500, None),
        ("0.2", None, 0.2),
        (1, 1, None),
        (1.0, None, 1.0),
    ],
)
def test_what_a_budget_may_be(given, rows, share):
    budget = Budget.of(given)
    assert (budget.rows, budget.share) == (rows, share)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget.of(0), "rows must be a whole number >= 1, got 0"),
        (lambda: Budget.of(-3), "got -3"),
        (lambda: Budget.of(0.0), "above 0 and at most 1"),
        (lambda: Budget.of("120%"), "above 0 and at most 1.*got 1.2"),
        (lambda: Budget.of("many"), "rows like 500, or a share like 0.2 or 20%, got 'many'"),
        (lambda: Budget.of("nan"), "above 0 and at most 1"),
        (lambda: Budget.of(True), "got True"),
        (lambda: Budget.of(None), "got None"),
        (lambda: Budget(), "exactly one of rows, share and tokens, got none"),
        (lambda: Budget(rows=3, share=0.1), "got rows and share"),
        (lambda: Budget(tokens=0), "tokens must be a whole number >= 1"),
        (lambda: Budget(rows=3, min_per_group=1), "min_per_group needs group_by="),
        (lambda: Budget(rows=3, group_by="g", max_per_group=-1), "max_per_group must be rows"),
        (lambda: Budget(rows=3, group_by="g", min_per_group={"a": 1.5}), "got 1.5"),
    ],
)
def test_what_it_may_not_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


TEXTS = [{"text": f"row {i}", "g": "ab"[i % 4 == 0], "s": (i * 37) % 40} for i in range(40)]


def selected(budget, **more):
    return select(TEXTS, metric="imported", scores="s", budget=budget, **more)


@pytest.mark.parametrize(("budget", "count"), [(7, 7), ("10%", 4), (0.01, 1), (1.0, 40)])
def test_the_count_is_exact(budget, count):
    assert len(selected(budget).indices) == count


def test_more_rows_than_there_are():
    with pytest.raises(InputError, match="41 rows, but only 40 of 40 can be scored"):
        selected(41)


def test_floors_and_ceilings_by_group():
    def count(**limits):
        kept = selected(Budget(rows=10, group_by="g", **limits)).dataset()
        return {g: sum(row["g"] == g for row in kept) for g in "ab"}

    free = count()
    assert count(min_per_group=5) == {"a": 5, "b": 5}
    assert count(min_per_group={"b": 8}) == {"a": 2, "b": 8}
    assert count(min_per_group={"b": 0.8}) == {"a": 2, "b": 8}
    assert count(max_per_group={"a": free["a"] - 1}) == {"a": free["a"] - 1, "b": free["b"] + 1}
    # A group gives no more than it has.
    assert count(min_per_group=1, max_per_group={"a": 0.5}) == {"a": 5, "b": 5}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_per_group": 6}, "min_per_group asks for 12 rows over 2 groups, but .* is 10"),
        ({"max_per_group": 3}, "max_per_group leaves at most 6 rows, but the budget is 10"),
        ({"min_per_group": {"c": 1}}, "There is no group 'c': the groups are a, b"),
        ({"min_per_group": 4, "max_per_group": {"a": 2}}, "at least 4 and at most 2"),
    ],
)
def test_limits_that_cannot_be_met(limits, message):
    with pytest.raises(InputError, match=message):
        selected(Budget(rows=10, group_by="g", **limits))


def test_a_group_column_that_is_not_there():
    with pytest.raises(InputError, match="no column 'gg'"):
        selected(Budget(rows=10, group_by="gg"))


def test_tokens_are_not_exceeded_and_the_best_go_first():
    selection = selected(Budget(tokens=25), tokenizer=str.split)
    assert sum(len(row["text"].split()) for row in selection.dataset()) <= 25
    assert len(selection.indices) == 12
    assert min(row["s"] for row in selection.dataset()) == 28


def test_tokens_need_a_tokenizer():
    with pytest.raises(InputError, match="in tokens needs tokenizer="):
        selected(Budget(tokens=25))


# --------------------------------------------------------------------------------- allocation

groups = st.lists(
    st.tuples(
        st.floats(0, 10).filter(lambda w: w == 0 or w > 1e-6),
        st.integers(0, 30),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=8,
)


@given(groups, st.integers(0, 200))
def test_allocation_spends_the_total_within_bounds(given, extra):
    weights, caps, floors = map(list, zip(*given, strict=True))
    floors = np.minimum(floors, caps)
    total = int(floors.sum()) + extra
    rows = allocate(total, weights, caps, floors)
    assert rows.sum() == min(total, sum(caps))
    assert ((floors <= rows) & (rows <= caps)).all()
    # Nobody who got less than an equal or larger weight entitles to was passed over.
    for i, j in itertools.permutations(range(len(caps)), 2):
        if weights[i] >= weights[j] and rows[i] + 1 < rows[j]:
            assert rows[i] == caps[i] or rows[j] == floors[j]


def test_allocation_by_hand():
    # 10 rows at 1 : 2 : 3, the second capped at 1: the other two share 9 at 1 : 3.
    assert allocate(10, [1, 2, 3], [100, 1, 100]).tolist() == [2, 1, 7]
    # Weight 0 gets rows only once the others are full.
    assert allocate(5, [0, 1], [9, 4]).tolist() == [1, 4]
    # Floors first, and the rest to whom it raises to the same level.
    assert allocate(7, [1, 1, 1], [9, 9, 9], [5, 0, 0]).tolist() == [5, 1, 1]


@pytest.mark.parametrize(
    ("weights", "floors", "message"),
    [([1, -1], None, "finite and >= 0"), ([1, np.nan], None, "finite"), ([1, 1], [4, 4], "ask")],
)
def test_allocation_refuses(weights, floors, message):
    with pytest.raises(InputError, match=message):
        allocate(5, weights, [5, 5], floors)


# ------------------------------------------------------------------------------------- choice


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=9),
    st.integers(1, 9),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_no_other_choice_within_the_bounds_scores_higher(rows, total, floors, caps):
    scores = np.array([s for s, _ in rows], dtype=float)
    numbers = np.array([g for _, g in rows])
    k = int(numbers.max()) + 1
    sizes = np.bincount(numbers, minlength=k)
    caps = np.array(caps[:k])
    floors = np.minimum(np.minimum(floors[:k], sizes), caps)
    most = np.minimum(caps, sizes)
    if floors.sum() > total:
        return
    total = min(total, int(most.sum()))
    ranking = Ranking(scores, groups=numbers)
    kept = choose(ranking, total, np.arange(len(rows)) / len(rows), floors, caps)
    held = np.bincount(numbers[kept], minlength=k)
    assert kept.sum() == total
    assert ((floors <= held) & (held <= most)).all()
    best = max(
        scores[list(option)].sum()
        for option in itertools.combinations(range(len(rows)), total)
        for counts in [np.bincount(numbers[list(option)], minlength=k)]
        if ((floors <= counts) & (counts <= most)).all()
    )
    assert scores[kept].sum() == best


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 30),
)
def test_tokens_fill_from_the_best_down(rows, tokens):
    scores = np.array([s for s, _ in rows], dtype=float)
    sizes = np.array([size for _, size in rows])
    lots = np.arange(len(rows)) / len(rows)
    kept = fill(Ranking(scores), tokens, sizes, lots)
    left = tokens
    for i in np.lexsort((lots, -scores)):
        assert kept[i] == (sizes[i] <= left)
        left -= sizes[i] * kept[i]


def test_weights_share_rows_and_tokens():
    scores = np.arange(12.0)
    groups = np.arange(12) % 2
    lots = np.zeros(12)
    ranking = Ranking(scores, groups=groups, weights=np.array([1.0, 2.0]))
    assert np.bincount(groups[choose(ranking, 6, lots)]).tolist() == [2, 4]
    assert np.bincount(groups[fill(ranking, 12, np.full(12, 2), lots)]).tolist() == [2, 4]


def test_barred_and_unscored_rows_never_stay():
    scores = np.array([5.0, np.nan, 4.0, 3.0])
    kept = choose(Ranking(scores, barred={0: "no"}), 4, np.zeros(4))
    assert kept.tolist() == [False, False, True, True]


def test_equal_scores_are_settled_by_lot_and_it_is_said():
    rows = [f"row {i}" for i in range(50)]
    with pytest.warns(UserWarning, match="same score, so the choice among them is by lot"):
        first = select(rows, metric="imported", scores=np.ones(50), budget=10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = select(rows, metric="imported", scores=np.ones(50), budget=10, seed=1)
    assert first.compare(other).jaccard < 0.7
