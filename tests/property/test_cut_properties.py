"""What holds for every cut, whatever the items."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prune_core.results import cut

# A few round values among the floats, so that ties and exact thresholds do happen.
scores_ = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))
items = st.lists(st.tuples(scores_, st.integers(0, 50)), max_size=30)
fractions = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))


def columns(items):
    return [score for score, _ in items], [size for _, size in items]


def kept_size(sizes, kept):
    return sum(size for size, keep in zip(sizes, kept, strict=True) if keep)


@given(items, st.integers(0, 2_000))
def test_never_over_an_absolute_budget_and_nothing_left_out_would_still_fit(items, budget):
    scores, sizes = columns(items)
    kept = cut(scores, sizes, max_size=budget).kept
    used = kept_size(sizes, kept)
    assert used <= budget
    assert all(size > budget - used for size, keep in zip(sizes, kept, strict=True) if not keep)


@given(items, fractions)
def test_never_over_a_relative_budget(items, keep_ratio):
    scores, sizes = columns(items)
    kept = cut(scores, sizes, keep_ratio=keep_ratio).kept
    assert kept_size(sizes, kept) <= keep_ratio * sum(sizes)


@given(items, st.integers(0, 100))
def test_a_budget_of_the_total_or_more_keeps_everything(items, more):
    scores, sizes = columns(items)
    assert cut(scores, sizes, max_size=sum(sizes) + more).kept.all()
    assert cut(scores, sizes, keep_ratio=1.0).kept.all()


@given(items, fractions)
def test_the_threshold_cut_is_its_definition(items, threshold):
    scores, sizes = columns(items)
    result = cut(scores, sizes, threshold=threshold)
    assert result.kept.tolist() == [score >= threshold for score in scores]
    assert ["≥" in reason for reason in result.reasons] == result.kept.tolist()


@given(items, fractions, fractions)
def test_a_higher_threshold_keeps_a_subset(items, one, other):
    scores, sizes = columns(items)
    low = cut(scores, sizes, threshold=min(one, other)).kept
    high = cut(scores, sizes, threshold=max(one, other)).kept
    assert not (high & ~low).any()


@given(st.data(), items, st.integers(0, 500))
def test_the_order_of_items_matters_only_to_ties(data, items, budget):
    items = list({score: (score, size) for score, size in items}.values())  # no ties
    order = data.draw(st.permutations(range(len(items))))
    kept = cut(*columns(items), max_size=budget).kept
    shuffled = cut(*columns([items[i] for i in order]), max_size=budget).kept
    assert shuffled.tolist() == kept[np.array(order, dtype=int)].tolist()


@given(st.data(), items, fractions)
def test_the_order_of_items_never_matters_to_a_threshold(data, items, threshold):
    order = data.draw(st.permutations(range(len(items))))
    kept = cut(*columns(items), threshold=threshold).kept
    shuffled = cut(*columns([items[i] for i in order]), threshold=threshold).kept
    assert shuffled.tolist() == kept[np.array(order, dtype=int)].tolist()
