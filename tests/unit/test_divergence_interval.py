"""Bounds of a divergence from a few probabilities: always right, and as tight as they can be."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prune.divergence_interval import (
    DivergenceInterval,
    TopTokens,
    jensen_shannon_interval,
    top_tokens_interval,
)
from prune_core.errors import InputError

LN2 = math.log(2)
seeds = st.integers(0, 2**32 - 1)


def added(p, q):
    """What tokens of these probabilities add to the divergence, each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(2 * x / (p + q)), 0) for x in (p, q)]
    return sum(parts) / 2


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p)


def distributions(kind, draw, places, size):
    """Two models' probabilities, (places, size) each, more or less alike."""
    rank = np.arange(1, size + 1)
    alike = draw.choice([0.01, 0.5, 2.0, 6.0])
    if kind == "zipf":
        logits = -1.2 * np.log(rank) + draw.standard_normal((places, size))
    elif kind == "peaked":
        logits = np.where(rank <= 2, 12.0, 0.0) + draw.standard_normal((places, size))
    elif kind == "ties":
        logits = draw.integers(-2, 3, (places, size)).astype(float)
    else:
        logits = draw.standard_normal((places, size)) * draw.choice([0.1, 3.0, 30.0])
    others = logits + alike * draw.standard_normal((places, size))
    if kind == "ties":
        others = np.round(others)
    if kind == "sparse":
        for x in (logits, others):
            x[draw.random((places, size)) < 0.6] = -np.inf
            x[:, 0] = np.where(np.isfinite(x[:, 0]), x[:, 0], 0)
    if kind == "swapped":
        others = draw.permuted(logits, axis=1)
    return [np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, others)]


kinds = st.sampled_from(["random", "zipf", "peaked", "ties", "sparse", "swapped"])


def listed(p, k, text):
    """What vLLM tells: the k likeliest tokens of each place, and the text's own."""
    found = [None]
    for row, token in zip(p, text, strict=True):
        top = {*np.argsort(-row, kind="stable")[:k].tolist(), int(token)}
        found.append({t: SimpleNamespace(logprob=float(log(row[t])), rank=0) for t in top})
    return found


# ------------------------------------------------------------------------------ the same tokens
def test_of_the_same_tokens_by_hand():
    # Of four tokens both tell two; p leaves .2 and q leaves .4 to the others.
    found = jensen_shannon_interval(log([0.5, 0.3]), log([0.2, 0.4]))
    both = added(np.array([0.5, 0.3]), np.array([0.2, 0.4])).sum()
    merged = 0.1 * math.log(0.4 / 0.6) + 0.2 * math.log(0.8 / 0.6)
    assert found.low == pytest.approx(both + merged, abs=1e-12)
    assert found.high == pytest.approx(both + 0.3 * LN2, abs=1e-12)
    value = added(np.array([5, 3]) / 8, np.array([1, 2]) / 3).sum()
    assert found.value == pytest.approx(value, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(seeds, kinds, st.integers(1, 60), st.integers(1, 40))
def test_of_the_same_tokens_holds(seed, kind, size, count):
    draw = np.random.default_rng(seed)
    p, q = distributions(kind, draw, 4, size)
    exact = added(p, q).sum(axis=1)
    # Any set will do that holds each model's likeliest.
    order = draw.random((4, size))
    for x in (p, q):
        np.put_along_axis(order, x.argmax(axis=1)[:, None], -1, axis=1)
    tokens = np.argsort(order, axis=1)[:, : count + 1]
    some_p, some_q = (np.take_along_axis(x, tokens, axis=1) for x in (p, q))
    found = jensen_shannon_interval(log(some_p), log(some_q))
    assert (found.low <= exact + 1e-9).all()
    assert (exact <= found.high + 1e-9).all()
    assert ((found.low >= 0) & (found.high <= LN2)).all()
    tails = [1 - x.sum(axis=1) for x in (some_p, some_q)]
    assert (found.high - found.low <= sum(tails) / 2 * LN2 + 1e-9).all()
    # Merging what is left is all that can be known from below, and is one more token.
    merged = added(*(np.maximum(t, 0) for t in tails))
    np.testing.assert_allclose(found.low, added(some_p, some_q).sum(axis=1) + merged, atol=1e-9)
    if count + 1 >= size:
        np.testing.assert_allclose(found.high, exact, atol=1e-9)
        np.testing.assert_allclose(found.value, exact, atol=1e-9)


# ------------------------------------------------------------------------------ each its own list
def test_of_own_lists_by_hand():
    # Each lists one token of .9; the other's is then at most the .1 that is left.
    p = TopTokens.read([None, {7: {"logprob": log(0.9)}}], 1)
    q = TopTokens.read([None, {5: {"logprob": log(0.9)}}], 1)
    found = top_tokens_interval(p, q)
    nearest = added(np.array([0.9, 0.1]), np.array([0.1, 0.9])).sum()
    np.testing.assert_allclose(found.low, [nearest], atol=1e-12)
    np.testing.assert_allclose(found.high, [LN2], atol=1e-12)
    # A tenth of the most that it can be, .01, renormalised.
    value = added(np.array([90, 1]) / 91, np.array([1, 90]) / 91).sum()
    np.testing.assert_allclose(found.value, [value], atol=1e-12)

    # Of two tokens the second is the limit, though .3 is left. 3 and 4 may be alike in both.
    p = TopTokens.read([None, {7: {"logprob": log(0.6)}, 3: {"logprob": log(0.1)}}], 2)
    q = TopTokens.read([None, {5: {"logprob": log(0.6)}, 4: {"logprob": log(0.1)}}], 2)
    nearest = 2 * added(np.array(0.6), np.array(0.1))
    np.testing.assert_allclose(top_tokens_interval(p, q).low, [nearest], atol=1e-12)


@settings(max_examples=300, deadline=None)
@given(seeds, kinds, st.integers(2, 60), st.integers(1, 25))
def test_of_own_lists_holds(seed, kind, size, k):
    k = min(k, size)
    draw = np.random.default_rng(seed)
    p, q = distributions(kind, draw, 4, size)
    exact = added(p, q).sum(axis=1)
    text = draw.integers(0, size, 4)
    lists = [TopTokens.read(listed(x, k, text), k) for x in (p, q)]
    found = top_tokens_interval(*lists)
    assert (found.low <= exact + 1e-9).all()
    assert (exact <= found.high + 1e-9).all()
    assert np.isfinite(found.value).all()
    assert ((found.value >= 0) & (found.value <= LN2)).all()
    for one, other in zip(
        (found.low, found.high, found.value),
        (lambda f: (f.low, f.high, f.value))(top_tokens_interval(*lists[::-1])),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-9)
    # It knows no more than who asks both models of all these tokens.
    union = [
        sorted({*a[a >= 0], *b[b >= 0]}) for a, b in zip(*(x.tokens for x in lists), strict=True)
    ]
    for i, tokens in enumerate(union):
        asked = jensen_shannon_interval(log(p[i, tokens]), log(q[i, tokens]))
        assert found.low[i] <= asked.low + 1e-9
        assert found.high[i] >= asked.high - 1e-9


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 5))
def test_of_own_lists_holds_for_whatever_is_not_told(seed, k):
    """Models are made to fit the lists: what they do not tell is drawn up to its limits."""
    draw = np.random.default_rng(seed)
    size = 40
    models = []
    for _ in range(2):
        p = np.zeros(size)
        top = draw.permutation(12)[:k]
        p[top] = np.sort(draw.dirichlet(np.full(k, 0.5)) * draw.uniform(0.3, 1))[::-1]
        rest, limit = np.setdiff1d(draw.permutation(size), top), p[top].min()
        left = 1 - p.sum()
        assume(limit * len(rest) >= left)  # or else no model has such a list
        for token in draw.permutation(rest):  # greedily: each at its limit until nothing is left
            p[token] = min(limit, left) * (1 if draw.random() < 0.7 else draw.random())
            left -= p[token]
        for token in rest:
            more = min(limit - p[token], left)
            p[token] += more
            left -= more
        models.append((p[None], top))
    (p, _), (q, _) = models
    text = draw.integers(0, size, 1)
    found = top_tokens_interval(*(TopTokens.read(listed(x, k, text), k) for x in (p, q)))
    exact = added(p, q).sum()
    assert found.low[0] <= exact + 1e-9
    assert exact <= found.high[0] + 1e-9


def test_the_texts_own_token_does_not_limit_the_others():
    # Token 9 stands in the text and is unlikely: tokens 1 and 2 may yet be as likely as the k-th.
    p = np.array([0.5, 0.2, 0.2, 0.1 - 1e-6, *[0] * 5, 1e-6])
    q = np.array([0.5, 0.1 - 1e-6, 0.2, 0.2, *[0] * 5, 1e-6])
    lists = [TopTokens.read(listed(x[None], 2, [9]), 2) for x in (p, q)]
    assert [x.tokens[0, 2] for x in lists] == [9, 9]
    found = top_tokens_interval(*lists)
    exact = added(p, q).sum()
    assert found.low[0] <= exact <= found.high[0]


def test_more_tokens_tell_more():
    draw = np.random.default_rng(0)
    p, q = distributions("zipf", draw, 50, 2000)
    text = draw.integers(0, 2000, 50)
    widths, lows = [], []
    for k in (5, 20, 100, 500):
        found = top_tokens_interval(*(TopTokens.read(listed(x, k, text), k) for x in (p, q)))
        widths.append((found.high - found.low).mean())
        lows.append(found.low.mean())
    assert np.all(np.diff(widths) < 0)
    assert np.all(np.diff(lows) > 0)


def test_the_mean_is_of_all_three():
    found = DivergenceInterval(np.array([0.1, 0.3]), np.array([0.0, 0.2]), np.array([0.4, 0.6]))
    mean = found.mean()
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.2, 0.1, 0.5))


# ------------------------------------------------------------------------------ reading
ENGINE = [
    None,
    {4: SimpleNamespace(logprob=-0.5, rank=1), 8: SimpleNamespace(logprob=-2.0, rank=2)},
    {
        3: SimpleNamespace(logprob=-9.0, rank=70),
        6: SimpleNamespace(logprob=-0.25, rank=1),
        5: SimpleNamespace(logprob=-3.0, rank=2),
    },
]
SERVER = [
    place and {str(t): {"logprob": e.logprob, "rank": e.rank} for t, e in place.items()}
    for place in ENGINE
]


@pytest.mark.parametrize("prompt_logprobs", [ENGINE, SERVER], ids=["engine", "server"])
def test_read(prompt_logprobs):
    found = TopTokens.read(prompt_logprobs, 2)
    assert found.tokens.tolist() == [[4, 8, -1], [6, 5, 3]]
    assert found.log_probs.tolist() == [[-0.5, -2.0, -math.inf], [-0.25, -3.0, -9.0]]
    assert (found.k, found.tokens.dtype, found.log_probs.dtype) == (2, np.int64, np.float64)
    assert TopTokens.read(prompt_logprobs, 2, start=2).tokens.tolist() == [[6, 5, 3]]


def test_lists_that_cannot_be_read():
    with pytest.raises(InputError, match="k must be a whole number >= 1, got 0"):
        TopTokens.read(ENGINE, 0)
    with pytest.raises(InputError, match=r"Token 1 comes with 2 log-probabilities, and k = 3"):
        TopTokens.read(ENGINE, 3)
    with pytest.raises(InputError, match=r"Token 2 comes with 3 log-probabilities, and k = 1"):
        TopTokens.read(ENGINE, 1)
    with pytest.raises(InputError, match=r"start must be from 1 to 2, .* got 3"):
        TopTokens.read(ENGINE, 2, start=3)
    with pytest.raises(InputError, match=r"start must be"):
        TopTokens.read(ENGINE, 2, start=0)
    with pytest.raises(InputError, match=r"Token 2 comes with 0"):
        TopTokens.read([None, ENGINE[1], None], 2)
    with pytest.raises(InputError, match="NaN"):
        TopTokens.read([None, {1: SimpleNamespace(logprob=math.nan)}], 1)
    one, two = TopTokens.read(ENGINE, 2), TopTokens.read(ENGINE, 2, start=2)
    with pytest.raises(InputError, match="same places, got 2 and 1"):
        top_tokens_interval(one, two)


def test_what_is_no_distribution():
    good = log([0.5, 0.2])
    with pytest.raises(InputError, match=r"of the same tokens, got the shapes \(2,\) and \(1,\)"):
        jensen_shannon_interval(good, good[:1])
    with pytest.raises(InputError, match=r"log_q must be .* sum to 2.9.* are these logits"):
        jensen_shannon_interval(good, np.array([0.5, 0.3]))
    with pytest.raises(InputError, match="log_p gives no token of some place"):
        jensen_shannon_interval(np.array([[-np.inf, np.nan]]), good[None])
