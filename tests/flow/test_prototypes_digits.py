"""What the paper says of prototypes, on scikit-learn's digits: easy rows, then hard ones."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data" / "digits_prototypes.py"
SHARES = (0.05, 0.1, 0.6)


@pytest.fixture(scope="module")
def accuracy():
    run = runpy.run_path(str(SCRIPT))["accuracies"]
    runs = [run(seed, SHARES) for seed in range(6)]
    return {key: np.mean([one[key] for one in runs]) for key in runs[0]}


def test_easy_rows_teach_more_where_few_stay_and_hard_ones_where_many_do(accuracy):
    assert accuracy["easy, balanced", 0.05] > accuracy["hard, balanced", 0.05] + 20
    assert accuracy["hard, balanced", 0.6] > accuracy["easy, balanced", 0.6] + 3


def test_three_fifths_of_the_rows_teach_as_much_as_all(accuracy):
    assert accuracy["hard", 0.6] > accuracy["all", 1.0] - 0.3
    assert accuracy["hard", 0.6] > accuracy["random", 0.6]


def test_a_share_for_each_class_helps_where_few_stay(accuracy):
    assert accuracy["hard, balanced", 0.1] > accuracy["hard", 0.1] + 8
    assert accuracy["easy, balanced", 0.05] > accuracy["easy", 0.05] + 5


def test_auto_takes_the_better_side(accuracy):
    for share in (0.05, 0.6):
        better = max(accuracy[f"{side}, balanced", share] for side in ("easy", "hard"))
        assert accuracy["auto", share] > better - 1.5


def test_random_rows_beat_both_sides_where_few_stay(accuracy):
    """Which the docs say as loudly as the paper's claims."""
    assert accuracy["random", 0.05] > accuracy["easy, balanced", 0.05]
