import time

import numpy as np
import pytest

from prune_core.errors import InputError
from prune_core.results import cut

SCORES = [0.42, 0.04, 0.9, 0.42]
SIZES = [30, 20, 40, 10]


def test_threshold_keeps_scores_at_or_above_it():
    result = cut(SCORES, SIZES, threshold=0.42)
    assert result.kept.tolist() == [True, False, True, True]
    assert result.reasons == (
        "score 0.42 ≥ threshold 0.42",
        "score 0.04 < threshold 0.42",
        "score 0.9 ≥ threshold 0.42",
        "score 0.42 ≥ threshold 0.42",
    )


def test_a_rounded_score_never_contradicts_the_decision():
    result = cut([0.09999, 0.10001, np.float32(0.1)], [1, 1, 1], threshold=0.1)
    assert result.reasons[0] == "score 0.09999 < threshold 0.1"
    assert result.reasons[1] == "score 0.1 ≥ threshold 0.1"
    assert result.kept.tolist() == [False, True, True]


def test_max_size_fills_from_the_highest_score_and_skips_what_does_not_fit():
    result = cut(SCORES, SIZES, max_size=55, unit="tokens")
    assert result.kept.tolist() == [False, False, True, True]  # 40, then not 30, then 10
    assert result.reasons[0] == "over the budget of 55 tokens"
    assert result.reasons[3] == "fits the budget of 55 tokens"


def test_equal_scores_enter_in_the_order_given():
    kept = cut([0.5, 0.4] * 1_000, [1] * 2_000, max_size=500).kept  # few items sort stably anyway
    assert np.flatnonzero(kept).tolist() == list(range(0, 1_000, 2))


def test_keep_ratio_is_of_the_total_size():
    result = cut(SCORES, SIZES, keep_ratio=0.7)
    assert result.kept.tolist() == [True, False, True, False]
    assert result.reasons[1] == "over the budget of 70 characters (keep_ratio 0.7 of 100)"


@pytest.mark.parametrize("budget", [{"keep_ratio": 0}, {"max_size": 0}])
def test_only_items_without_size_fit_an_empty_budget(budget):
    assert cut([0.9, 0.1], [1, 0], **budget).kept.tolist() == [False, True]


@pytest.mark.parametrize("budget", [{"threshold": 0.5}, {"keep_ratio": 0.5}, {"max_size": 5}])
def test_no_items_at_all(budget):
    result = cut([], [], **budget)
    assert result.kept.shape == (0,)
    assert result.kept.dtype == bool
    assert result.reasons == ()


def test_the_caller_keeps_its_arrays_and_the_result_cannot_be_edited():
    scores, sizes = np.array(SCORES, dtype=np.float32), np.array(SIZES, dtype=np.uint8)
    kept = cut(scores, sizes, keep_ratio=0.7).kept
    assert kept.tolist() == [True, False, True, False]
    assert scores.tolist() == np.float32(SCORES).tolist()
    assert sizes.tolist() == SIZES
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = False


def test_small_integer_types_do_not_overflow():
    sizes = np.full(10, 200, dtype=np.uint8)
    assert cut(np.arange(10), sizes, max_size=np.int16(1_000)).kept.sum() == 5


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({}, "threshold, keep_ratio and max_size must be given, got none"),
        ({"threshold": 0.1, "max_size": 9}, "got threshold and max_size: choose one"),
        ({"threshold": 0, "keep_ratio": 0}, "got threshold and keep_ratio: choose one"),
        ({"threshold": 1.1}, r"threshold must be a number in \[0, 1\], got 1.1"),
        ({"threshold": float("nan")}, r"threshold must be a number in \[0, 1\], got nan"),
        ({"threshold": True}, "threshold must be a number in .* got True"),
        ({"threshold": "0.1"}, "threshold must be a number in .* got '0.1'"),
        ({"keep_ratio": -0.1}, r"keep_ratio must be a number in \[0, 1\], got -0.1"),
        ({"keep_ratio": 50}, r"keep_ratio must be a number in \[0, 1\], got 50"),
        ({"keep_ratio": False}, "keep_ratio must be a number in .* got False"),
        ({"max_size": -1}, r"max_size must be a whole number >= 0 \(in words\), got -1"),
        ({"max_size": 5.0}, "max_size must be a whole number >= 0 .* got 5.0"),
        ({"max_size": True}, "max_size must be a whole number >= 0 .* got True"),
        ({"max_size": "5"}, "max_size must be a whole number >= 0 .* got '5'"),
    ],
)
def test_bad_budgets(budgets, words):
    with pytest.raises(InputError, match=words):
        cut(SCORES, SIZES, unit="words", **budgets)


@pytest.mark.parametrize(
    ("scores", "sizes", "words"),
    [
        ([0.1, float("nan")], [1, 1], "scores must not be NaN, got NaN for 1 of 2 .* index 1"),
        ([0.1], [1, 1], "got 1 scores and 2 sizes"),
        ([True, False], [1, 1], r"scores must be numbers .* got shape \(2,\) of type bool"),
        (["0.1", "0.2"], [1, 1], "scores must be numbers"),
        ([None, 0.2], [1, 1], "scores must be numbers .* type object"),
        ([[0.1, 0.2]], [1, 1], r"scores must be numbers in one dimension, got shape \(1, 2\)"),
        (0.1, 1, r"scores must be numbers in one dimension, got shape \(\)"),
        ([0.1, 0.2], [1, -2], "sizes must be >= 0, got -2 at index 1"),
        ([0.1, 0.2], [1.0, 2.5], "sizes must be whole numbers"),
        ([0.1, 0.2], [True, True], "sizes must be whole numbers"),
    ],
)
@pytest.mark.parametrize("budget", [{"threshold": 0.5}, {"keep_ratio": 0.5}, {"max_size": 5}])
def test_bad_items(scores, sizes, words, budget):
    with pytest.raises(InputError, match=words):
        cut(scores, sizes, **budget)


@pytest.mark.parametrize("budget", [{"threshold": 0.5}, {"keep_ratio": 0.5}])
def test_a_hundred_thousand_items_are_quick(budget):
    rng = np.random.default_rng(0)
    scores, sizes = rng.random(100_000), rng.integers(0, 500, 100_000)
    start = time.process_time()
    cut(scores, sizes, **budget)
    assert time.process_time() - start < 2  # about 0.1 s; only a quadratic method would fail
