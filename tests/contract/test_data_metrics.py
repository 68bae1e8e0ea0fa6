"""What every data metric in the table promises; a new row is tested without a line here."""

import warnings

import numpy as np
import pytest

from data_prune import METHODS, Selection, select
from data_prune.metric import Metric
from prune_core.testing import unregistered

N, WIDTH = 240, 12
KEEPS = (1, 24, 100, N)
RNG = np.random.default_rng(0)
TOPICS = ["cheese rind", "tax return", "bird song", "prime number"]
CENTRES = RNG.normal(size=(len(TOPICS), WIDTH))


def row(i):
    topic = TOPICS[i % len(TOPICS)]
    return {
        "prompt": f"Tell me about {topic}, number {i}.",
        "response": f"The {topic} of {i} is {' and '.join(['good'] * (1 + i % 7))}.",
        "label": i % 3,
        "i": i,
    }


ROWS = [row(i) for i in range(N)]
VECTORS = CENTRES[np.arange(N) % len(TOPICS)] + RNG.normal(size=(N, WIDTH))


def given(order):
    """Everything that any metric may ask for, its rows in this order."""
    return {
        "embeddings": VECTORS[order],
        "target": VECTORS[:9],
        "log": {name: values[:, order] for name, values in LOG.items()},
        "degradation": DAMAGE[order],
        "losses": LOSSES[order],
        "scores": DAMAGE[order],
        "cache": False,
    }


LOG = {
    "el2n": RNG.random((4, N)),
    "gradient_norm": RNG.random((4, N)),
    "margin": RNG.normal(size=(4, N)),
    "correct": (RNG.random((4, N)) > 0.4).astype(float),
    "entropy": RNG.random((4, N)),
}
DAMAGE = RNG.random(N)
LOSSES = RNG.random((N, 2))
METRICS = [method.name for method in METHODS if issubclass(METHODS.get(method.name), Metric)]


IN_ORDER = np.arange(N)


def chosen(metric, budget, order=IN_ORDER, **more) -> Selection:
    arguments = given(order) | more
    if metric == "dsir":
        arguments["target"] = [{"prompt": "A bird?", "response": "A song."}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # notes: some metrics bar rows
        return select([ROWS[i] for i in order], metric=metric, budget=budget, **arguments)


def content(selection):
    return sorted(row["i"] for row in selection.dataset())


def test_every_module_has_a_row():
    assert not unregistered(METHODS, "data_prune.metrics")


@pytest.mark.parametrize("metric", METRICS)
def test_the_count_is_exact(metric):
    for keep in KEEPS:
        selection = chosen(metric, keep)
        barred = sum(", of which " not in reason for reason in selection.reasons)
        assert len(selection.indices) == min(keep, N - barred)
        assert (np.diff(selection.indices) > 0).all()
        assert len(selection.indices) + len(selection.dropped) == N


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_rows_whatever_their_order(metric):
    order = np.random.default_rng(1).permutation(N)
    straight, shuffled = chosen(metric, 60), chosen(metric, 60, order)
    assert content(straight) == content(shuffled)
    np.testing.assert_array_equal(straight.scores[order], shuffled.scores)


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_rows_again_and_by_any_number_of_workers(metric):
    from data_prune import Local

    first = chosen(metric, 60, engine=Local(1))
    assert content(first) == content(chosen(metric, 60, engine=Local(4)))


@pytest.mark.parametrize("metric", METRICS)
def test_every_row_has_a_reason_and_can_be_explained(metric):
    selection = chosen(metric, 60)
    kept = set(selection.indices.tolist())
    for i, reason in enumerate(selection.reasons):
        assert reason.startswith("kept: " if i in kept else "dropped: ")
    for i in (int(selection.indices[0]), int(selection.dropped[0])):
        assert selection.explain(i).startswith(f"Row {i}: ")


@pytest.mark.parametrize("metric", METRICS)
def test_a_smaller_budget_asks_nothing_again_and_gives_what_select_gives(metric):
    again = chosen(metric, 60).reselect(30)
    assert content(again) == content(chosen(metric, 30))


@pytest.mark.parametrize("metric", METRICS)
def test_saved_and_loaded_it_is_the_same(metric, tmp_path):
    selection = chosen(metric, 60)
    selection.save(tmp_path / "s")
    loaded = Selection.load(tmp_path / "s", ROWS)
    np.testing.assert_array_equal(loaded.indices, selection.indices)
    assert list(loaded.reasons) == list(selection.reasons)
    assert loaded.dataset() == selection.dataset()
    np.testing.assert_array_equal(loaded.reselect(20).indices, selection.reselect(20).indices)


@pytest.mark.parametrize("metric", METRICS)
def test_the_callers_rows_stay_as_they_are(metric):
    before = [dict(row) for row in ROWS]
    arrays = VECTORS.copy(), DAMAGE.copy()
    chosen(metric, 60)
    assert before == ROWS
    np.testing.assert_array_equal(arrays[0], VECTORS)
    np.testing.assert_array_equal(arrays[1], DAMAGE)


@pytest.mark.parametrize("metric", METRICS)
def test_other_seeds_still_keep_as_many(metric):
    assert len(chosen(metric, 60, seed=7).indices) == len(chosen(metric, 60).indices)
