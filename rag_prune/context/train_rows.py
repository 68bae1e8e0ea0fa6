"""Training rows: read, labelled by sentence, given hard negatives, cut to what one step reads."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_core.errors import InputError
from prune_core.storage import read_jsonl
from rag_prune.context.sentences import split, touched
from rag_prune.context.windows import Tokens, encode_plain, tokenise

IGNORED = -1


@dataclass(frozen=True)
class Row:
    """One labelled passage, tokenised."""

    question: str
    question_ids: list[int]
    title: str | None
    title_ids: list[int]
    passage: str
    tokens: Tokens
    labels: np.ndarray  # (n_sentences,) 1 evidence, 0 not, IGNORED may answer too
    answers: tuple[str, ...]
    weight: float

    @property
    def answered(self) -> bool:
        """Whether the passage holds evidence."""
        return bool((self.labels == 1).any())


def labelled_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of training rows as they are.

    Raises InputError, naming the line, for a row that lacks something or has it in another form.
    """
    raw = []
    for number, row in enumerate(read_jsonl(path), 1):
        if wrong := _what_is_wrong(row):
            raise InputError(
                f"'{path}', line {number} (blank ones not counted) {wrong}. A training row has "
                "question, passage and evidence ([[start, end], …] character spans, [] for none), "
                "and may have title, answers and weight."
            )
        raw.append(row)
    if not raw:
        raise InputError(f"'{path}' holds no training rows: give one JSON object a line.")
    return raw


def _what_is_wrong(row: Mapping[str, Any]) -> str | None:
    """What keeps a JSON object from being a training row, as the end of a sentence."""
    for key in ("question", "passage", "evidence"):
        if key not in row:
            return f"has no '{key}'"
    for key in ("question", "passage"):
        if not isinstance(row[key], str) or not row[key].strip():
            return f"must have text as '{key}', got {reprlib.repr(row[key])}"
    size = len(row["passage"])
    if not isinstance(row["evidence"], list):
        return f"must have a list as 'evidence', got {reprlib.repr(row['evidence'])}"
    for span in row["evidence"]:
        # JSON's true is an int to Python.
        if not (isinstance(span, list) and len(span) == 2 and {*map(type, span)} == {int}):
            return f"has the evidence {reprlib.repr(span)}, which is not [start, end]"
        if not 0 <= span[0] < span[1] <= size:
            return f"has the evidence {span}, which is no span of its {size} characters"
    if not isinstance(row.get("title"), str | None):
        return f"must have text or null as 'title', got {reprlib.repr(row['title'])}"
    answers, weight = row.get("answers", []), row.get("weight", 1)
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        return f"must have a list of texts as 'answers', got {reprlib.repr(answers)}"
    if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
        return f"must have a number of at least 0 as 'weight', got {reprlib.repr(weight)}"
    return None


def read_rows(path: Path, tokenizer: Any) -> list[Row]:
    """Read and tokenise a JSONL file; raises InputError naming file and line of a bad row."""
    raw = labelled_rows(path)
    spans = [split(row["passage"]) for row in raw]
    tokens = tokenise(tokenizer, [row["passage"] for row in raw], spans)
    questions = encode_plain(tokenizer, [row["question"] for row in raw])["input_ids"]
    titles = encode_plain(tokenizer, [row.get("title") or "" for row in raw])["input_ids"]
    return [
        Row(
            row["question"],
            question[:64],
            row.get("title"),
            title[:32],
            row["passage"],
            toks,
            sentence_labels(row["passage"], sentences, row["evidence"], row.get("answers", ())),
            tuple(row.get("answers", ())),
            float(row.get("weight", 1.0)),
        )
        for row, sentences, toks, question, title in zip(
            raw, spans, tokens, questions, titles, strict=True
        )
    ]


def sentence_labels(
    passage: str,
    sentences: Sequence[tuple[int, int]],
    evidence: Sequence[Sequence[int]],
    answers: Sequence[str],
) -> np.ndarray:
    """(n_sentences,) 1 for evidence, IGNORED where an answer stands unmarked, else 0."""
    labels = np.array(touched(sentences, evidence), dtype=np.int64)
    spoken = [a for a in answers if len(a) > 2 and a.lower() not in ("yes", "no")]
    for i, (start, end) in enumerate(sentences):
        if labels[i] == 0 and any(a in passage[start:end] for a in spoken):
            labels[i] = IGNORED
    return labels


def hard_negatives(rows: Sequence[Row], per_question: int = 12) -> list[list[int]]:
    """For each row, indices of rows whose passage looks right by BM25 and does not answer.

    The question's own unanswered passages come first; then the nearest ones that hold none of its
    answers. Another passage of the same title may answer all the same, so it serves only where the
    answers are known.
    """
    import bm25s

    passages = list(dict.fromkeys(row.passage for row in rows))
    first_row: dict[str, int] = {}
    for i, row in enumerate(rows):
        first_row.setdefault(row.passage, i)
    siblings = defaultdict(list)
    for i, row in enumerate(rows):
        if not row.answered:
            siblings[row.question].append(i)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    queries = bm25s.tokenize([row.question for row in rows], show_progress=False)
    found, _ = index.retrieve(
        queries, k=min(3 * per_question, len(passages)), show_progress=False, n_threads=1
    )
    out = []
    for row, candidates in zip(rows, found, strict=True):
        wanted = [i for i in siblings[row.question] if rows[i].passage != row.passage]
        for candidate in candidates:
            passage = passages[int(candidate)]
            other = rows[first_row[passage]]
            same_title = row.title is not None and other.title == row.title
            if (
                passage != row.passage
                and (row.answers or not same_title)
                and not any(a in passage for a in row.answers)
            ):
                wanted.append(first_row[passage])
        out.append(wanted[:per_question])
    return out


@dataclass(frozen=True)
class Piece:
    """The part of a row's passage that one training step reads."""

    row: Row
    title_ids: list[int]
    ids: list[int]
    sentence: np.ndarray  # (n_tokens,) from 0
    labels: np.ndarray  # (n_sentences,)


def piece(
    row: Row, room: int, rng: np.random.Generator, title_rate: float, as_negative: bool
) -> Piece:
    """A window of the passage of at most `room` tokens, around its evidence where there is some."""
    title = row.title_ids if row.title_ids and rng.random() < title_rate else []
    room -= len(title) + 1 if title else 0
    tokens, n = row.tokens, len(row.tokens.ids)
    start = 0
    if n > room:
        evidence = np.flatnonzero(row.labels == 1)
        anchor = int(rng.choice(evidence)) if len(evidence) else int(rng.integers(len(row.labels)))
        where = np.flatnonzero(tokens.sentence == anchor)
        first = int(where[0]) if len(where) else 0
        # At most half the window lies before the anchor, so that what follows it is read too.
        latest = min(first, n - room)
        earliest = max(0, min(latest, first - room // 2))
        start = int(rng.integers(earliest, latest + 1))
        # Begin at a sentence where one begins within reach, so that whole ones carry the labels.
        while start > earliest and tokens.sentence[start - 1] == tokens.sentence[start]:
            start -= 1
    end = min(n, start + room)
    sentence = tokens.sentence[start:end]
    low = int(sentence[0]) if len(sentence) else 0
    labels = row.labels[low : int(sentence[-1]) + 1 if len(sentence) else 0].copy()
    if end < n and len(labels) and tokens.sentence[end] == sentence[-1] and labels[-1] == 1:
        labels[-1] = IGNORED  # cut short: the part that answers may be the part that is missing
    if as_negative:
        labels[:] = 0
    return Piece(row, title, tokens.ids[start:end].tolist(), sentence - low, labels)
