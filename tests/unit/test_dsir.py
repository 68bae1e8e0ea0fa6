"""DSIR's features and weights by plain Python, and who is drawn."""

import dataclasses
import hashlib
import math
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from data_prune.choose import choose
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.dsir import BUCKETS, DSIR, counts, hashed, ngrams
from data_prune.rows import Columns, read, rows_of
from prune_core.errors import InputError

MATHS = [
    "Ann has 3 apples and buys 4 apples. How many apples has Ann?",
    "Bob sells 12 pears at $2 each. How many dollars has Bob?",
    "Eve has 7 plums and eats 2. How many plums are left?",
]
PROSE = [
    "The river ran slowly past the old mill, and nobody spoke.",
    "A storm came over the hills; the shepherd counted his sheep.",
    "Ça va? « Naïve » coffee—it's 5€ ... ok_1!!",
    "word",
]
POOL = [
    "Tom has 9 apples and buys 5 apples. How many apples has Tom?",
    "Sue sells 3 pears at $4 each. How many dollars has Sue?",
    *PROSE,
]


def rows(texts):
    source = read(list(texts))
    return rows_of(source, Columns().found(source.names))


def given(texts=POOL, target=MATHS, **fields):
    pool = rows(texts)
    return Given(rows=pool, keep=2, target=rows(target) if target else None, **fields)


def plain(text):
    """Buckets of a text, one n-gram at a time, as the paper's code counts them."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    for gram in [*words, *(f"{a} {b}" for a, b in pairwise(words))]:
        yield int(hashlib.sha256(gram.encode()).hexdigest(), 16) % 10_000


def plain_counts(texts):
    found = Counter(bucket for text in texts for bucket in plain(text))
    return np.array([found[bucket] for bucket in range(10_000)])


def plain_weights(pool, target, smoothing):
    raw, wanted = plain_counts(pool), plain_counts(target) + smoothing
    log_ratio = np.log(wanted / wanted.sum() + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    return [sum(log_ratio[bucket] for bucket in plain(text)) for text in pool]


# ------------------------------------------------------------------ features
def test_buckets_are_those_of_the_papers_code():
    # The two that its own tests name.
    assert hashed(["alice", "alice went"]).tolist() == [6720, 114]


def test_words_and_pairs_of_a_text_by_hand():
    buckets, text = ngrams(["Alice went, alice WENT", "a_b 3.5"])
    first = ["alice", "went", ",", "alice", "went"]
    first_pairs = ["alice went", "went ,", ", alice", "alice went"]
    second, second_pairs = ["a_b", "3", ".", "5"], ["a_b 3", "3 .", ". 5"]
    spelled = [*first, *second, *first_pairs, *second_pairs]  # no pair across the two texts
    assert buckets.tolist() == hashed(spelled).tolist()
    assert text.tolist() == [0] * 5 + [1] * 4 + [0] * 4 + [1] * 3


@settings(max_examples=50, deadline=None)
@examples(st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_counts_of_any_text_are_the_plain_ones(texts):
    texts = [text.encode("utf-8", "ignore").decode() + "x" for text in texts]
    assert (counts(texts, Local(1)) == plain_counts(texts)).all()


def test_a_lone_surrogate_is_counted():
    assert counts(["\ud800 x"], Local(1)).sum() == 3


# ------------------------------------------------------------------ weights
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_weights_are_the_plain_ones(smoothing):
    about = given()
    columns = DSIR(smoothing=smoothing).score(about)
    expected = plain_weights(list(about.rows.texts), MATHS, smoothing)
    np.testing.assert_allclose(columns["log_weight"], expected, rtol=1e-12)


def test_rows_like_the_target_are_kept():
    names, fruits = ["Tom", "Sue", "Ann", "Bob", "Eve"], ["apples", "pears", "plums", "figs"]
    target = [
        f"{name} has {i} {fruit} and buys {j} {fruit}. How many {fruit} has {name}?"
        for name in names
        for fruit in fruits
        for i in range(2, 8)
        for j in range(2, 8)
    ]
    alike, other = target[::90], ["The river ran slowly past the old mill , nobody spoke in it"] * 8
    about = given([*alike, *(f"{text} {i}." for i, text in enumerate(other))], target[1::90] * 20)
    kept = kept_texts(about, DSIR(), len(alike))
    assert kept == set(alike)


def test_the_noise_is_gumbels_of_the_rows_own_lots():
    about = given(seed=3)
    columns = DSIR().score(about)
    lots = about.draws("dsir").tolist()
    expected = [-math.log(-math.log(lot)) for lot in lots]
    np.testing.assert_allclose(columns["noise"], expected, rtol=1e-12)
    scores = DSIR().rank(columns, 1).scores
    assert (scores == columns["log_weight"] + columns["noise"]).all()


def test_a_lot_of_zero_is_no_infinity(monkeypatch):
    monkeypatch.setattr(Given, "draws", lambda self, purpose: np.zeros(len(self.rows)))
    assert np.isfinite(DSIR().score(given())["noise"]).all()


def test_a_row_is_first_of_two_by_the_odds_of_their_weights():
    pairs = 4000
    noise = DSIR().score(given([f"row {i}" for i in range(2 * pairs)]))["noise"]
    scores = DSIR().rank({"log_weight": np.log([3.0, 1.0] * pairs), "noise": noise}, 1).scores
    first = (scores[::2] > scores[1::2]).mean()
    assert abs(first - 0.75) < 4 * (0.75 * 0.25 / pairs) ** 0.5


# ------------------------------------------------------------------ the contract
def kept_texts(about, metric, keep):
    kept = choose(metric.rank(metric.score(about), keep), keep, about.draws("ties"))
    assert kept.sum() == keep
    return {about.rows.texts[i] for i in np.flatnonzero(kept)}


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_the_same_rows_whatever_the_order_and_the_workers(keep):
    shuffled = random.Random(1).sample(POOL, len(POOL))
    one = kept_texts(given(engine=Local(1)), DSIR(), keep)
    assert one == kept_texts(given(shuffled, MATHS[::-1], engine=Local(3)), DSIR(), keep)


def test_larger_budgets_add_rows():
    about, metric = given(), DSIR()
    kept = [kept_texts(about, metric, keep) for keep in range(1, 7)]
    assert all(a < b for a, b in pairwise(kept))


def test_rows_of_several_shards_weigh_as_one_by_one():
    about = given([f"{POOL[i % 6]} {i}" for i in range(5000)])
    expected = plain_weights(list(about.rows.texts), MATHS, 1.0)
    np.testing.assert_allclose(DSIR().score(about)["log_weight"], expected, rtol=1e-12)


def test_every_row_is_described():
    about = given()
    columns = DSIR().score(about)
    found = [DSIR().describe(columns, i) for i in range(len(about.rows))]
    assert all(re.match(r"log importance weight -?\d+\.\d\d, drawn with noise", f) for f in found)
    assert len(columns["log_weight"]) == len(about.rows)
    assert BUCKETS == 10_000


# ------------------------------------------------------------------ bad input
def test_without_a_target_it_says_what_to_pass():
    with pytest.raises(InputError, match=r"'dsir' needs target=, rows of what the model"):
        DSIR().score(given(target=None))


def test_a_target_without_rows_is_refused():
    about = given()
    empty = about.target.without(dict.fromkeys(range(len(about.target)), "unfit"))
    with pytest.raises(InputError, match=r"The target has no rows: give some"):
        DSIR().score(dataclasses.replace(about, target=empty))


@pytest.mark.parametrize("smoothing", [-1, math.nan, math.inf])
def test_smoothing_is_a_count(smoothing):
    with pytest.raises(InputError, match=r"smoothing must be a count >= 0, got"):
        DSIR(smoothing=smoothing)
