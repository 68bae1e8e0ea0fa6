"""Importance resampling: rows whose words are more of the target's than of the whole's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import Engine, shards
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.rows import Rows
from prune_core.errors import InputError

BUCKETS = 10_000
_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True, kw_only=True)
class DSIR(Metric):
    """Draw rows without replacement, each by how likely its words are in the target, not in all.

    A row is the counts of its words and pairs of words, hashed into 10,000 buckets; target and raw
    data are each a distribution over buckets. The log importance weight of a row is the sum of
    log target/raw over its n-grams; adding Gumbel noise and keeping the highest draws with these
    weights.

    Source: Xie et al., "Data selection for language models via importance resampling" (NeurIPS
    2023, arXiv:2302.03169), with hashed n-gram features; words, hash (SHA-256) and the 1e-8 in the
    logarithms are those of its code, so the weights are, too. As there, a weight is not divided by
    the row's length, so the noise hardly changes the order of long rows.
    Differs: the code leaves out rows below 100 words, which suits documents and not instructions,
    and does not smooth unless told to: then each n-gram that the target lacks costs a row some 13,
    and with a small target the shortest rows win, whatever they say. With smoothing, too, a target
    wants as many n-grams as there are buckets, some 50 rows (benchmarks/data/targets.py).
    Cost: every text is read twice. No model.

    smoothing: added to the target's count in each bucket, >= 0.
    """

    name = "dsir"
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < float("inf"):
            raise InputError(f"smoothing must be a count >= 0, got {self.smoothing!r}: try 1.")

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric. Raises InputError for a target without rows."""
        target: Rows = given.needed("target", self.name)
        if not len(target):
            raise InputError(
                "The target has no rows: give some of what the model shall be good at."
            )
        wanted = shares(counts(target.texts, given.engine) + self.smoothing)
        raw = shares(counts(given.rows.texts, given.engine))
        work = _Weights(given.rows.texts, np.log(wanted + 1e-8) - np.log(raw + 1e-8))
        weights = list(given.engine.map(work, shards(len(given.rows)), "weighing"))
        # A lot of 0 would be an infinity.
        lots = np.maximum(given.draws("dsir"), 2.0**-54)
        return {"log_weight": np.concatenate(weights), "noise": -np.log(-np.log(lots))}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(columns["log_weight"] + columns["noise"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return (
            f"log importance weight {columns['log_weight'][i]:.2f}, drawn with noise "
            f"{columns['noise'][i]:.2f}"
        )


def shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts as a distribution."""
    distribution: NDArray[np.float64] = counts / counts.sum()
    return distribution


def counts(texts: Sequence[str], engine: Engine) -> NDArray[np.float64]:
    """(10000,) n-grams of all texts by bucket."""
    return engine.reduce(_Counts(texts), shards(len(texts)), "counting")["counts"]


def ngrams(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bucket of each n-gram of the texts and the place of its text: words, then pairs of them.

    A word is letters, digits and underscores in a row, or other marks in a row, in lower case.
    Each different n-gram is hashed once.
    """
    words = [_WORD.findall(text.lower()) for text in texts]
    text = np.repeat(np.arange(len(texts)), [len(found) for found in words])
    flat = list(chain.from_iterable(words))
    vocabulary = list(dict.fromkeys(flat))
    number = {word: i for i, word in enumerate(vocabulary)}
    ids = np.fromiter(map(number.__getitem__, flat), dtype=np.int64, count=len(flat))
    inside = text[:-1] == text[1:]
    pairs, pair = np.unique(
        ids[:-1][inside] * len(vocabulary) + ids[1:][inside], return_inverse=True
    )
    first, second = (part.tolist() for part in np.divmod(pairs, len(vocabulary)))
    spelled = [f"{vocabulary[a]} {vocabulary[b]}" for a, b in zip(first, second, strict=True)]
    return (
        np.concatenate([hashed(vocabulary)[ids], hashed(spelled)[pair]]),
        np.concatenate([text, text[:-1][inside]]),
    )


def hashed(spelled: Sequence[str]) -> NDArray[np.int64]:
    """(n,) SHA-256 of each, a number of 256 bits, modulo the number of buckets."""
    digests = b"".join(
        hashlib.sha256(each.encode("utf-8", "surrogatepass")).digest() for each in spelled
    )
    parts = np.frombuffer(digests, dtype=">u8").reshape(-1, 4) % BUCKETS
    powers = np.array([pow(2, bits, BUCKETS) for bits in (192, 128, 64, 0)], dtype=np.int64)
    buckets: NDArray[np.int64] = parts.astype(np.int64) @ powers % BUCKETS
    return buckets


class _Counts:
    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __call__(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        return {"counts": np.bincount(ngrams(self.texts[rows])[0], minlength=BUCKETS)}


class _Weights:
    def __init__(self, texts: Sequence[str], log_ratio: NDArray[np.float64]) -> None:
        self.texts, self.log_ratio = texts, log_ratio

    def __call__(self, rows: slice) -> NDArray[np.float64]:
        texts = self.texts[rows]
        buckets, text = ngrams(texts)
        weights: NDArray[np.float64] = np.zeros(len(texts))
        np.add.at(weights, text, self.log_ratio[buckets])
        return weights
