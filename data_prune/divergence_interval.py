"""Bounds of a divergence over the whole vocabulary, from the probabilities of a few tokens.

A served model tells the log-probabilities of some tokens at each place, not of all. Whatever the
others are, the Jensen-Shannon divergence of two models is in [low, high].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune_core.errors import InputError, check_count

Array = NDArray[np.float64]

LN2 = math.log(2)
# Of the most that a token can be which a model does not list: what `value` takes it for. Of 0, .05,
# .1, .25, .5 and 1 it ranked rows best at k = 20, of a model with a fifth or half its weights zero.
_PART = 0.1


@dataclass(frozen=True, eq=False)
class DivergenceInterval:
    """Jensen-Shannon divergence in nats, [...] each: low <= the exact one <= high.

    value: to rank by, and for nothing else: the divergence of both models restricted to the tokens
    that either lists, each renormalised. It may lie outside of [low, high]. What a model does not
    list counts there as a tenth of the most that it can be; with k below 20 that ranks badly.
    """

    value: Array
    low: Array
    high: Array

    def mean(self) -> DivergenceInterval:
        """Of all places: bounds of the mean divergence, such as that of a response."""
        return DivergenceInterval(
            *(np.asarray(x.mean()) for x in (self.value, self.low, self.high))
        )


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The likeliest tokens at each of n places, as one model lists them.

    tokens: (n, k + 1) int64.   log_probs: (n, k + 1) float64, natural, descending.
    k: how many are its likeliest; one more is the token of the text itself where it is not among
    them, and else token -1 of log-probability -inf.
    """

    tokens: NDArray[np.int64]
    log_probs: Array
    k: int

    @classmethod
    def read(cls, prompt_logprobs: Sequence[Any], k: int, *, start: int = 1) -> TopTokens:
        """From vLLM's `prompt_logprobs`, of its engine or of its server's JSON.

        prompt_logprobs: one a token of the text: a dict from token, a number or its digits, to an
        object with `.logprob` or a dict with "logprob"; None for the first.
        k: the number that was asked for, which the lists do not tell.
        start: the token to begin with, such as the first of a response. Ask vLLM for its raw
        log-probabilities, as it gives by default, not for processed ones.

        Raises InputError for a k or start out of range, for a place without k tokens, and for NaN.
        """
        check_count("k", k)
        if not 1 <= start < len(prompt_logprobs):
            raise InputError(
                f"start must be from 1 to {len(prompt_logprobs) - 1}, the last of "
                f"{len(prompt_logprobs)} tokens, got {start!r}: nothing foretells the first."
            )
        places = [prompt_logprobs[i] for i in range(start, len(prompt_logprobs))]
        tokens = np.full((len(places), k + 1), -1, dtype=np.int64)
        log_probs = np.full((len(places), k + 1), -np.inf)
        for i, place in enumerate(places):
            if place is None or not k <= len(place) <= k + 1:
                raise InputError(
                    f"Token {start + i} comes with {len(place or ())} log-probabilities, and k = "
                    f"{k} of them, or one more for the token itself, were expected: pass the k "
                    f"that the model was asked for."
                )
            pairs = [(_log_prob(entry), int(token)) for token, entry in place.items()]
            for j, (log_prob, token) in enumerate(sorted(pairs, reverse=True)):
                tokens[i, j], log_probs[i, j] = token, log_prob
        if np.isnan(log_probs).any():
            raise InputError("A log-probability is NaN: the model that was served is broken.")
        return cls(tokens, log_probs, k)


def jensen_shannon_interval(
    log_p: Array, log_q: Array, limit_p: Array | None = None, limit_q: Array | None = None
) -> DivergenceInterval:
    """Bounds from the log-probabilities of some tokens, the same of both models.

    log_p, log_q: [..., S]. NaN is what one model does not tell, of a token of which the other does.
    limit_p, limit_q: [...] log-probability that what is not told cannot exceed; by default only the
    mass that is left bounds it.

    Let K be the tokens that both tell, J their part of the divergence, P those that p alone tells,
    Q those of q alone, and t_p, t_q the masses that p and q leave to what they do not tell.
    g(a, b) = a/2 ln(2a / (a + b)) + b/2 ln(2b / (a + b)) is what a token of a and b adds.
    - high = J + ln 2 / 2 · (t_p + t_q + Σ_P p + Σ_Q q): g(a, b) <= (a + b) ln 2 / 2.
    - low = J + α t_p + β t_q + Σ_P min_x [g(p, x) - β x] + Σ_Q min_x [g(x, q) - α x], where x goes
      from 0 to the limit. g is convex and homogeneous, so it lies above each of its tangents: of
      the ratio r = b / a, g(a, b) >= α a + β b with α = ln(2 / (1 + r)) / 2 and β = ln(2 r /
      (1 + r)) / 2. That bounds the tokens which none tells, and as the parts of t_p and t_q that
      belong to Q and P are x, the sum is weak duality, valid for any r. r = t_q / t_p is taken:
      where P and Q are empty, α t_p + β t_q = g(t_p, t_q), what the tails add when merged.

    Bounds hold up to the rounding of the log-probabilities: about 1e-6 where they are float32.

    Raises InputError for shapes that differ, and for what is not log-probabilities of one
    distribution.
    """
    log_p, log_q = _checked(log_p, "log_p"), _checked(log_q, "log_q")
    if log_p.shape != log_q.shape:
        raise InputError(
            f"log_p and log_q must be of the same tokens, got the shapes {log_p.shape} and "
            f"{log_q.shape}."
        )
    p, q = np.exp(log_p), np.exp(log_q)
    only_p, only_q = np.isnan(q), np.isnan(p)  # what the other does not tell
    tail_p, tail_q = (np.maximum(1 - np.nansum(x, axis=-1), 0) for x in (p, q))
    most_p, most_q = (
        tail if limit is None else np.minimum(np.exp(limit), tail)
        for tail, limit in ((tail_p, limit_p), (tail_q, limit_q))
    )

    ratio = np.clip((tail_q + 1e-300) / (tail_p + 1e-300), 1e-12, 1e12)
    alpha, beta = np.log(2 / (1 + ratio)) / 2, np.log(2 * ratio / (1 + ratio)) / 2
    # Where g(p, x) - β x is least: on the tangent's ray, or at the limit before it.
    x_q = np.where(only_p, np.minimum(ratio[..., None] * p, most_q[..., None]), q)
    x_p = np.where(only_q, np.minimum(q / ratio[..., None], most_p[..., None]), p)
    listed = _sum(_g(x_p, x_q))
    low = (
        listed
        + alpha * (tail_p - _sum(np.where(only_q, x_p, 0)))
        + beta * (tail_q - _sum(np.where(only_p, x_q, 0)))
    )
    both = _sum(np.where(only_p | only_q, 0, _g(p, q)))
    untold = tail_p + tail_q + _sum(np.where(only_p, p, 0)) + _sum(np.where(only_q, q, 0))
    high = np.clip(both + LN2 / 2 * untold, 0, LN2)

    value_p = np.where(only_q, _PART * most_p[..., None], p)
    value_q = np.where(only_p, _PART * most_q[..., None], q)
    value = _sum(_g(*(x / x.sum(axis=-1, keepdims=True) for x in (value_p, value_q))))
    return DivergenceInterval(np.clip(value, 0, LN2), np.clip(low, 0, high), high)


def top_tokens_interval(p: TopTokens, q: TopTokens) -> DivergenceInterval:
    """(n,) bounds where each model lists only its own likeliest tokens.

    A token that one lists alone has with the other at most the probability of its k-th token, and
    what it leaves unlisted: the interval is wider than where both are asked of the same tokens.

    Raises InputError for lists of different numbers of places.
    """
    if len(p.tokens) != len(q.tokens):
        raise InputError(
            f"The two models must list the same places, got {len(p.tokens)} and {len(q.tokens)}: "
            f"read both from the same text and the same start."
        )
    log_q_of_p, log_p_of_q = _looked_up(q, p.tokens), _looked_up(p, q.tokens)
    # Columns are p's tokens, then q's; one of q's that p lists too was there already.
    twice = ~np.isnan(log_p_of_q)
    return jensen_shannon_interval(
        np.concatenate([p.log_probs, np.where(twice, -np.inf, log_p_of_q)], axis=1),
        np.concatenate([log_q_of_p, np.where(twice, -np.inf, q.log_probs)], axis=1),
        p.log_probs[:, p.k - 1],
        q.log_probs[:, q.k - 1],
    )


def _looked_up(model: TopTokens, tokens: NDArray[np.int64]) -> Array:
    """What the model says of these tokens: NaN where it does not list one; -inf for token -1."""
    found = np.full(tokens.shape, np.nan)
    found[tokens < 0] = -np.inf
    for i, (listed, log_probs) in enumerate(zip(model.tokens, model.log_probs, strict=True)):
        order = np.argsort(listed)
        at = order[np.searchsorted(listed, tokens[i], sorter=order).clip(max=len(order) - 1)]
        here = (listed[at] == tokens[i]) & (tokens[i] >= 0)
        found[i, here] = log_probs[at[here]]
    return found


def _log_prob(entry: Any) -> float:
    return float(entry["logprob"] if isinstance(entry, Mapping) else entry.logprob)


def _checked(log_probs: Any, name: str) -> Array:
    found = np.asarray(log_probs, dtype=np.float64)
    mass = np.nansum(np.exp(found), axis=-1)
    if not (mass > 0).all():
        raise InputError(
            f"{name} gives no token of some place a probability above 0: let the tokens include "
            f"the likeliest of each model."
        )
    if (mass > 1.001).any():
        raise InputError(
            f"{name} must be natural log-probabilities of different tokens, but those of a place "
            f"sum to {mass.max():.4g} as probabilities: are these logits? Subtract their "
            f"log-sum-exp over the whole vocabulary."
        )
    return found


def _g(p: Array, q: Array) -> Array:
    """What a token adds to the divergence."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(2 * x / (p + q)), 0) for x in (p, q)]
    total: Array = (parts[0] + parts[1]) / 2
    return total


def _sum(x: Array) -> Array:
    total: Array = x.sum(axis=-1)
    return total
