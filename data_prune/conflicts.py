"""Rows that contradict each other, and PASER's guess at it from the concepts they name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import Engine
from data_prune.neighbours import nearest
from data_prune.rewrite_checks import answer, number
from data_prune.vectors import Vectors

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NEAR = 8  # nearest rows that a row is compared with
_COSINE = 0.9  # of prompts that may ask the same
# Words by which two wordings of one question may differ.
_LITTLE = frozenset(
    (
        *("a", "an", "the", "of", "to", "in", "on", "at", "for", "is", "are", "was", "were", "be"),
        *("do", "does", "did", "has", "have", "had", "it", "its", "this", "that", "these", "those"),
        "please",
    )
)


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Pairs of rows that ask the same and answer otherwise, each once.

    pairs: (p, 2), the lower row first.   why: p sentences, from the answers' checks.
    """

    pairs: NDArray[np.int64]
    why: Sequence[str]


def contradictions(
    prompts: Sequence[str],
    responses: Sequence[str],
    vectors: Vectors,
    draws: NDArray[np.float64],
    engine: Engine,
    seed: int = 0,
) -> Conflicts:
    """Rows of near-equal prompts whose answers cannot both be right.

    Prompts ask the same if their cosine is at least .9, and their words, but for articles and the
    like, are the same, as are their numbers: one other word can make another question. Answers
    disagree if both state a result and the numbers differ, or both are short, or choices, and
    neither holds the other. Of longer answers nothing is said: two good ones can share no word.

    prompts, responses, vectors (of the prompts), draws: of n rows.
    Cost: the nearest neighbours (`data_prune.neighbours`), and a comparison of the likely pairs.
    """
    near = nearest(vectors, _NEAR, draws, engine, seed)
    rows, columns = np.nonzero(near.cosines >= _COSINE)
    pairs = np.stack([rows, near.rows[rows, columns]], axis=1).astype(np.int64)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    found, why = [], []
    for i, j in pairs.tolist():
        if _same_question(prompts[i], prompts[j]) and (
            said := disagreement(responses[i], responses[j])
        ):
            found.append((i, j))
            why.append(said)
    return Conflicts(np.array(found, dtype=np.int64).reshape(-1, 2), why)


def disagreement(one: str, other: str) -> str:
    """Why the two cannot both be right; empty where they agree, or nothing can be said."""
    for check in (number, answer):
        forth, back = check(one, other), check(other, one)
        if forth and back:
            return forth
    return ""


def _same_question(one: str, other: str) -> bool:
    if sorted(_NUMBER.findall(one)) != sorted(_NUMBER.findall(other)):
        return False
    words, others = (set(_WORD.findall(text.lower())) - _LITTLE for text in (one, other))
    return words == others


def settle(conflicts: Conflicts, order: NDArray[np.int64]) -> tuple[dict[int, int], dict[int, str]]:
    """Of the rows that give way: to which row, and why. A row gives way to one that does not.

    order: the rows, the better first.
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    against: dict[int, list[tuple[int, str]]] = {}
    for (i, j), why in zip(conflicts.pairs.tolist(), conflicts.why, strict=True):
        later, earlier = (i, j) if place[i] > place[j] else (j, i)
        against.setdefault(later, []).append((earlier, why))
    to: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for row in sorted(against, key=lambda row: int(place[row])):
        for other, why in sorted(against[row], key=lambda pair: int(place[pair[0]])):
            if other not in to:
                to[row], reasons[row] = other, why
                break
    return to, reasons


# --------------------------------------------------------------------------- the published graph


def concepts(text: str) -> frozenset[str]:
    """Key phrases as RAKE cuts them: what stands between punctuation and stop words.

    Source: Rose et al., "Automatic keyword extraction from individual documents" (2010); the stop
    words are scikit-learn's.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    phrases = set()
    for part in re.split(r"[^\w\s'’-]+|\n", text.lower()):
        words: list[str] = []
        for word in [*part.split(), ""]:
            if word and word not in ENGLISH_STOP_WORDS:
                words.append(word)
            elif words:
                phrases.add(" ".join(words))
                words = []
    return frozenset(phrases)


def inconsistent(texts: Sequence[str], order: NDArray[np.int64]) -> set[int]:
    """Rows that PASER's concept consistency graph refuses when they come in this order.

    A row is accepted if every two of its concepts that accepted rows have named before were named
    together by one of them; then its own become known, each pair of them together.
    It refuses new combinations of known concepts, whether or not anything is contradicted: of
    instruction data it takes a few per cent to a quarter, and which, depends on the order.

    Source: He et al., "PASER" (2025, arXiv:2502.12594), the concept consistency graph, and the
    authors' code. Cost: n · (concepts of a row)².
    """
    known: dict[str, set[str]] = {}
    refused = set()
    for i in order.tolist():
        named = sorted(concepts(texts[i]))
        old = [concept for concept in named if concept in known]
        if all(b in known[a] for k, a in enumerate(old) for b in old[k + 1 :]):
            if len(named) > 1:  # a lone concept makes no edge, and so no vertex
                for concept in named:
                    known.setdefault(concept, set()).update(named)
        else:
            refused.add(i)
    return refused
