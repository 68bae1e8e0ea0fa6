"""What holds of every mask and every allocation, whatever the scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_prune.core.allocate import around, erk, everywhere_alike, ranked_together, spread_out
from model_prune.core.plan import LayerPlan
from model_prune.core.structure import NM, PerMatrix, PerRow, keep_highest
from model_prune.core.target import Dims

# Few values, so that ties are the rule.
values = st.sampled_from([0.0, 0.5, 1.0, math.inf])
shares = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9]), st.floats(0, 0.999))


def matrices(block=1):
    columns = st.integers(1, 12 // block).map(lambda n: n * block)
    return st.tuples(st.integers(1, 5), columns).flatmap(
        lambda size: st.lists(
            st.lists(values, min_size=size[1], max_size=size[1]),
            min_size=size[0],
            max_size=size[0],
        ).map(torch.tensor)
    )


def by_sorting(scores, removed):
    """The mask, from a stable sort of (score, index)."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i not in order[:removed] for i in range(len(scores))]


@given(matrices(), st.data())
def test_the_highest_are_kept_as_a_stable_sort_has_them(scores, data):
    removed = data.draw(st.integers(0, scores.shape[1]))
    assert keep_highest(scores, removed).tolist() == [
        by_sorting(row, removed) for row in scores.tolist()
    ]


@given(matrices(), shares)
def test_counts_are_exact(scores, share):
    rows, columns = scores.shape
    removed = math.floor(rows * columns * share + 1e-6)
    assert int((~PerMatrix().mask(scores, share)).sum()) == removed
    by_row = (~PerRow().mask(scores, share)).sum(1).tolist()
    assert sum(by_row) == removed
    assert by_row == sorted(by_row, reverse=True)
    assert by_row[0] - by_row[-1] <= 1


@given(matrices(block=4), st.integers(1, 3))
def test_every_block_keeps_its_n_as_a_stable_sort_has_them(scores, keep):
    mask = NM(keep, 4).mask(scores, 0)
    for block, kept in zip(scores.view(-1, 4).tolist(), mask.reshape(-1, 4).tolist(), strict=True):
        assert kept == by_sorting(block, 4 - keep)


@given(matrices().map(lambda scores: scores > 0.5))
def test_packed_masks_come_back(mask):
    tensors = LayerPlan(masks={"m": mask}).tensors()
    assert torch.equal(LayerPlan.from_tensors(tensors).masks["m"], mask)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1), shares)
def test_erk_is_exact(shapes, share):
    named = {str(i): shape for i, shape in enumerate(shapes)}
    result = erk(named, share)
    total = sum(o * i for o, i in shapes)
    gone = sum(result[n] * o * i for n, (o, i) in named.items())
    assert gone == pytest.approx(share * total, abs=1e-6 * total)
    assert all(-1e-9 <= each <= 1 for each in result.values())


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(0, 0.98), st.floats(0, 0.5))
def test_shares_around_a_total_have_it_as_their_mean(signal, total, spread):
    result = around(signal, total, spread)
    assert result.mean() == pytest.approx(total, abs=1e-9)
    assert result.min() >= 0
    assert result.max() <= 0.99
    # A higher signal never loses more.
    order = np.argsort(signal)
    assert (np.diff(result[order]) <= 1e-9).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.floats(0, 1))
def test_spread_out_is_exact_and_fits(sizes, share):
    total = share * sum(sizes)
    counts = spread_out(total, sizes)
    assert sum(counts) == round(total)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    fair = round(total) / sum(sizes)
    assert all(abs(c - fair * s) < 1 + 1e-6 for c, s in zip(counts, sizes, strict=True))


dims_ = st.builds(
    lambda group, groups, neurons: Dims(8, group * groups, groups, 4, neurons),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(30, 90),
)


@given(dims_, st.integers(1, 5), st.floats(0, 0.2), st.integers(0, 10))
def test_totals_are_met_to_one_unit(dims, layers, remove, seed):
    draw = np.random.default_rng(seed)
    table = [
        {"kv_group": draw.integers(0, 5, dims.kv_groups) * 1.0, "neuron": draw.random(dims.neurons)}
        for _ in range(layers)
    ]
    everywhere = [dims] * layers
    budget = remove * layers * dims.weights
    for allocate, unit in ((everywhere_alike(), "neuron"), (ranked_together, "kv_group")):
        kept = allocate(table, everywhere, budget)
        gone = sum(
            int((~stays).sum()) * dims.cost(family)
            for families in kept
            for family, stays in families.items()
        )
        assert abs(gone - budget) <= max(dims.cost(unit), dims.cost("neuron")) / 2 + 1e-6
        assert all(stays.any() for families in kept for stays in families.values())
