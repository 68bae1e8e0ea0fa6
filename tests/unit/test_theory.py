"""The perceptron theory of data pruning: by hand, against the paper's own form, and its limits."""

import math
import re
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, ndtri

from data_prune import theory
from data_prune.theory import crossover, largest_margin, predict, simulate
from prune_core.errors import InputError, PruneError

ALPHAS = (1, 2, 4, 8, 16)
# Worked out in the paper's form, by another program, and checked by simulation.
TABLE = {
    ("hard", 1.0): (0.2657, 0.1885, 0.1137, 0.0609, 0.0311),
    ("hard", 0.5): (0.4057, 0.3210, 0.1361, 0.0610, 0.0311),
    ("easy", 0.5): (0.2502, 0.1818, 0.1173, 0.0679, 0.0366),
    ("hard", 0.2): (0.4800, 0.4679, 0.4386, 0.2794, 0.0320),
    ("easy", 0.2): (0.2791, 0.2165, 0.1535, 0.0987, 0.0581),
    ("random", 0.5): (0.3288, 0.2657, 0.1885, 0.1137, 0.0609),
    ("random", 0.2): (0.3887, 0.3457, 0.2879, 0.2142, 0.1360),
}


@pytest.mark.parametrize(("keep", "keep_ratio"), TABLE)
def test_the_table_of_errors(keep, keep_ratio):
    found = [predict(alpha, keep_ratio, keep).error for alpha in ALPHAS]
    assert found == pytest.approx(TABLE[keep, keep_ratio], abs=1e-4)


def test_a_small_share_of_hard_rows():
    found = [predict(kept / 0.05, 0.05).error for kept in (2.25, 3, 4)]
    assert found == pytest.approx([0.0166, 0.0088, 0.0063], abs=1e-4)


def normal(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def papers_equations(R, kappa, alpha, f, keep):
    """Both saddle-point equations as the paper has them: integrals over the student's margin t."""
    s = math.sqrt(1 - R * R)
    g = ndtri((1 + f) / 2) if keep == "hard" else -ndtri(f / 2)

    def H(x):  # the upper tail
        return ndtr(-x)

    def for_overlap(t):
        if keep == "hard":
            inside = math.exp(-((R * t) ** 2) / (2 * s * s))
            inside *= 1 - math.exp(-g * (g - 2 * R * t) / (2 * s * s))
        else:
            inside = math.exp(-((g - R * t) ** 2) / (2 * s * s))
        return normal(t) * (kappa - t) * inside

    def for_length(t):
        mass = H((g - R * t) / s)
        if keep == "hard":
            mass = H(-R * t / s) - mass
        return normal(t) * (kappa - t) ** 2 * mass

    whole = [quad(part, -12, kappa, limit=500, points=[0])[0] for part in (for_overlap, for_length)]
    factors = 2 * alpha / (f * s * math.sqrt(2 * math.pi)), 2 * alpha / f
    return factors[0] * whole[0] / R - 1, factors[1] * whole[1] / s**2 - 1


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize(("alpha_total", "f"), [(0.5, 0.3), (3, 0.5), (6, 0.9), (10, 0.2)])
def test_the_student_solves_the_equations_as_the_paper_has_them(alpha_total, f, keep):
    student = predict(alpha_total, f, keep)
    assert student.error == pytest.approx(math.acos(student.overlap) / math.pi, rel=1e-12)
    off = papers_equations(student.overlap, student.margin, f * alpha_total, f, keep)
    assert off == pytest.approx((0, 0), abs=1e-6)
    # The check can fail.
    elsewhere = papers_equations(student.overlap - 0.01, student.margin, f * alpha_total, f, keep)
    assert max(map(abs, elsewhere)) > 1e-3


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("probe_angle", [0, 30])
def test_keeping_all_rows_is_no_pruning(keep, probe_angle):
    student = predict(3, 1, keep, probe_angle=probe_angle)
    assert astuple(student) == pytest.approx(astuple(predict(3)), rel=1e-9)


def test_random_rows_are_fewer_rows():
    assert predict(10, 0.3, "random", probe_angle=20) == predict(3)


@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_a_probe_that_is_nearly_perfect_or_a_cut_that_drops_nearly_nothing(keep):
    perfect = predict(6, 0.5, keep)
    assert predict(6, 0.5, keep, probe_angle=1e-3).error == pytest.approx(perfect.error, abs=1e-5)
    nearly_all = predict(6, 1 - 1e-7, keep, probe_angle=30)
    assert nearly_all.error == pytest.approx(predict(6).error, abs=1e-5)


def test_few_and_many_rows():
    """By hand: few rows add up to the student, whose cosine to T is then √(2 alpha / pi); many
    leave it an angle of order 1 / alpha, of error .5005 / alpha for largest margin (Gardner)."""
    few, many = predict(1e-6), predict(1e5)
    assert few.overlap == pytest.approx(math.sqrt(2e-6 / math.pi), rel=1e-3)
    assert few.margin == pytest.approx(1e3, rel=1e-3)
    assert many.error * 1e5 == pytest.approx(0.5005, abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    st.floats(0.1, 100),
    st.floats(0.02, 0.98),
    st.sampled_from(["hard", "easy", "random"]),
    st.sampled_from([0.0, 15.0]),
)
def test_more_rows_make_margins_smaller_and_with_a_perfect_probe_errors(alpha, f, keep, angle):
    student = predict(alpha, f, keep, probe_angle=angle)
    assert 0 < student.error < 0.5
    assert student.margin > 0
    assert predict(1.3 * alpha, f, keep, probe_angle=angle).margin < student.margin
    if angle == 0:
        assert predict(1.3 * alpha, f, keep).error < student.error


def test_scarce_data_keeps_easy_rows_and_abundant_data_hard_ones():
    for f, low, high in ((0.5, 4, 8), (0.2, 8, 16)):
        point = crossover(f)
        assert low < point < high
        hard, easy = predict(point, f, "hard"), predict(point, f, "easy")
        assert hard.error == pytest.approx(easy.error, rel=1e-8)
        assert predict(0.9 * point, f, "hard").error > predict(0.9 * point, f, "easy").error
        assert predict(1.1 * point, f, "hard").error < predict(1.1 * point, f, "easy").error


def test_an_imperfect_probe_makes_pruning_too_much_ruinous():
    """Four rows per dimension are kept of ever more; figures from simulations of the same set-up,
    of four seeds, that others made."""
    shares = (1, 0.5, 0.2, 0.1, 0.05)
    simulated = {
        0: (0.111, 0.061, 0.027, 0.014, 0.006),
        10: (0.116, 0.060, 0.044, 0.222, 0.417),
        20: (0.111, 0.069, 0.137, 0.330, 0.382),
    }
    for angle, errors in simulated.items():
        found = [predict(4 / f, f, probe_angle=angle).error for f in shares]
        assert found == pytest.approx(errors, abs=0.02)


def test_the_largest_margin_by_hand():
    vector, margin = largest_margin(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    assert vector == pytest.approx(np.array([2.0, 1.0]) / 5**0.5)
    assert margin == pytest.approx(2 / 5**0.5)
    with pytest.raises(InputError, match="all 2 rows on one side"):
        largest_margin(np.array([[1.0, 0.0], [-1.0, 0.0]]))


def test_the_largest_margin_is_no_smaller_than_any_other():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 8))
    rows *= np.sign(rows[:, :1])
    vector, margin = largest_margin(rows)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert (rows @ vector).min() == pytest.approx(margin)
    others = vector + rng.standard_normal((2000, 8)) * np.geomspace(1e-4, 1, 2000)[:, None]
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert (rows @ others.T).min(0).max() < margin


def test_a_simulation_is_its_seed_and_keeps_the_side_it_says():
    assert simulate(3, 0.5, dimension=20, seed=1) == simulate(3, 0.5, dimension=20, seed=1)
    assert simulate(3, 0.5, dimension=20, seed=1) != simulate(3, 0.5, dimension=20, seed=2)
    # Of one row at a time, hard has the least product with the teacher, easy the most.
    margins = [simulate(10, 0.1, keep, dimension=10).overlap for keep in ("hard", "random", "easy")]
    assert margins == sorted(margins)


@pytest.mark.parametrize("call", [predict, simulate])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "alpha_total must be positive and finite, got 0."),
        ((math.inf,), "alpha_total must be positive and finite, got inf."),
        ((math.nan,), "alpha_total must be positive and finite, got nan."),
        ((1, 0), "keep_ratio must be above 0 and at most 1, got 0."),
        ((1, 1.5), "keep_ratio must be above 0 and at most 1, got 1.5."),
        ((1, 0.5, "hrad"), "Unknown side to keep 'hrad'. Did you mean 'hard'?"),
    ],
)
def test_bad_arguments(call, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call(*arguments)


def test_more_bad_arguments():
    with pytest.raises(InputError, match="at least 0 and below 90 degrees, got 90"):
        predict(1, 0.5, probe_angle=90)
    with pytest.raises(InputError, match="dimension must be at least 2 and leave a row, got 1: 1"):
        simulate(1, dimension=1)
    with pytest.raises(InputError, match="leave a row, got 5: 0 rows stay"):
        simulate(1, 0.01, dimension=5)
    with pytest.raises(InputError, match=r"from \.001 to \.999, got 1"):
        crossover(1)


def test_what_cannot_be_solved_is_an_error_and_no_number(monkeypatch):
    with pytest.raises(PruneError, match=r"alpha_total=1e\+300.*Choose less extreme values"):
        predict(1e300)
    legendre = np.polynomial.legendre.leggauss  # too coarse for solving, fine for checking
    monkeypatch.setattr(theory, "_legendre", lambda nodes: legendre(3 if nodes < 100 else nodes))
    with pytest.raises(PruneError, match="are off by"):
        predict(2)
