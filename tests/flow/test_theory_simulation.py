"""The perceptron theory of data pruning beside perceptrons that were trained (slow)."""

import numpy as np
import pytest

from data_prune.theory import predict, simulate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("alpha_total", "keep_ratio", "keep", "probe_angle"),
    [
        (1, 0.2, "hard", 0),
        (4, 0.5, "hard", 0),
        (4, 0.5, "easy", 0),
        (8, 0.2, "random", 0),
        (16, 1.0, "hard", 0),
        (60, 0.05, "hard", 0),
        (8, 0.5, "hard", 10),
        (8, 0.5, "easy", 20),
        (80, 0.05, "hard", 20),
    ],
)
def test_theory_and_simulation_agree(alpha_total, keep_ratio, keep, probe_angle):
    """Within .015 of error and a tenth of the margin, and nearer than to any neighbour there."""
    arguments = alpha_total, keep_ratio, keep
    theory = predict(*arguments, probe_angle=probe_angle)
    trained = [
        simulate(*arguments, probe_angle=probe_angle, dimension=200, seed=seed) for seed in range(6)
    ]
    assert np.mean([s.error for s in trained]) == pytest.approx(theory.error, abs=0.015)
    assert np.mean([s.margin for s in trained]) == pytest.approx(theory.margin, rel=0.1)


def test_they_come_nearer_in_more_dimensions():
    theory = predict(3, 0.5).error
    off = {
        dimension: np.mean([simulate(3, 0.5, dimension=dimension, seed=s).error for s in range(n)])
        - theory
        for dimension, n in ((10, 200), (400, 8))
    }
    assert abs(off[400]) < 0.006 < abs(off[10])
