"""Rows to train on: how they are read, labelled, paired with negatives and cut to a window."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_core.errors import InputError
from rag_prune.context.sentences import split
from rag_prune.context.train_rows import (
    IGNORED,
    Row,
    hard_negatives,
    labelled_rows,
    piece,
    read_rows,
    sentence_labels,
)
from tiny import NOUNS, WORDS, toy_tokenizer, write_rows

GOOD = {"question": "Where?", "passage": "In Rome. Or not.", "evidence": [[0, 9]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": ...}, "has no 'question'"),
        ({"passage": ...}, "has no 'passage'"),
        ({"evidence": ...}, "has no 'evidence'"),
        ({"question": "  "}, "must have text as 'question', got '  '"),
        ({"question": 7}, "must have text as 'question', got 7"),
        ({"passage": ""}, "must have text as 'passage'"),
        ({"evidence": {"start": 0}}, "must have a list as 'evidence'"),
        ({"evidence": [[0, 17]]}, r"the evidence \[0, 17\], which is no span of its 16 char"),
        ({"evidence": [[-1, 5]]}, r"the evidence \[-1, 5\], which is no span"),
        ({"evidence": [[9, 3]]}, r"the evidence \[9, 3\], which is no span"),
        ({"evidence": [[3, 3]]}, r"the evidence \[3, 3\], which is no span"),
        ({"evidence": [[0, 9], [1.0, 9]]}, r"the evidence \[1.0, 9\], which is not \[start, end\]"),
        ({"evidence": [[True, 9]]}, r"the evidence \[True, 9\], which is not"),
        ({"evidence": [["0", "9"]]}, r"which is not \[start, end\]"),
        ({"evidence": [[0, 4, 9]]}, r"which is not \[start, end\]"),
        ({"evidence": ["In Rome."]}, r"the evidence 'In Rome.', which is not \[start, end\]"),
        ({"title": 3}, "must have text or null as 'title', got 3"),
        ({"answers": "Rome"}, "must have a list of texts as 'answers', got 'Rome'"),
        ({"answers": [""]}, "must have a list of texts as 'answers'"),
        ({"weight": -1}, "must have a number of at least 0 as 'weight', got -1"),
        ({"weight": "2"}, "must have a number of at least 0 as 'weight', got '2'"),
        ({"weight": float("nan")}, "must have a number of at least 0 as 'weight', got nan"),
    ],
)
def test_a_bad_row_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, bad])
    with pytest.raises(InputError, match=rf"rows\.jsonl', line 2 .*{said}.* A training row has"):
        read_rows(file, toy_tokenizer())


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no training rows: give one JSON object a line"):
        labelled_rows(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match=r"Cannot read '.*absent\.jsonl'"):
        labelled_rows(tmp_path / "absent.jsonl")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + '\n{"question"')
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        labelled_rows(tmp_path / "broken.jsonl")


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    given = {**GOOD, "title": "Rome", "answers": ["Rome"], "weight": 2, "more": "ignored"}
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [GOOD, given]), toy_tokenizer())
    assert [row.weight for row in rows] == [1.0, 2.0]
    assert [row.title for row in rows] == [None, "Rome"]
    assert [row.answers for row in rows] == [(), ("Rome",)]
    assert [row.answered for row in rows] == [True, True]
    assert rows[0].labels.tolist() == [1, 0]
    assert rows[0].tokens.sentence.tolist() == [0, 0, 0, 1, 1, 1]


def test_sentence_labels() -> None:
    passage = "Born in Rome. Died in Oslo. Rome was big. No city at all. Yes."
    sentences = split(passage)
    assert len(sentences) == 5
    labels = sentence_labels(passage, sentences, [[14, 27]], ["Rome", "yes", "at"])
    # Whoever wrote the labels did not mark what else names Rome; short answers are everywhere.
    assert labels.tolist() == [IGNORED, 1, IGNORED, 0, 0]
    assert sentence_labels(passage, sentences, [], []).tolist() == [0] * 5
    # Half a sentence is evidence enough, a touch is not.
    assert sentence_labels(passage, sentences, [[7, 16]], []).tolist() == [1, 0, 0, 0, 0]


def test_hard_negatives_look_right_and_do_not_answer(tmp_path: Path) -> None:
    def row(question: str, title: str | None, passage: str, answered: bool) -> dict[str, Any]:
        evidence = [[0, len(passage)]] if answered else []
        return {
            "question": question,
            "title": title,
            "passage": passage,
            "evidence": evidence,
            "answers": ["berlin"],
        }

    rows = [
        row("Where is the cat?", "cat", "The cat is in berlin.", True),
        row("Where is the cat?", "cats", "Them saw a long stone.", False),  # its own, unanswered
        row("Where is the dog?", "cat", "The cat was a king.", True),  # of the same title
        row("Where is the bird?", "bird", "The cat saw berlin.", True),  # holds an answer
        row("Where is the tree?", "tree", "The cat is a tree.", True),
        row("Where is the lake?", None, "The lake is a cat.", True),
        row("Where is the boat?", None, "The cat is in berlin.", True),  # the same passage
    ]
    read = read_rows(write_rows(tmp_path / "rows.jsonl", rows), toy_tokenizer())
    negatives = hard_negatives(read, per_question=4)
    assert negatives[0][0] == 1
    assert set(negatives[0]) == {1, 2, 4, 5}
    assert hard_negatives(read, per_question=1)[0] == [1]
    # Without its answers nobody knows whether the same title answers.
    unknown = [replace(read[0], answers=()), *read[1:]]
    assert 2 not in hard_negatives(unknown, per_question=4)[0]
    for row_read, found in zip(read, negatives, strict=True):
        for other in (read[i] for i in found):
            assert other.passage != row_read.passage
            own = other.question == row_read.question and not other.answered
            assert own or "berlin" not in other.passage


# -------------------------------------------------------------------------------------- pieces


@st.composite
def long_rows(draw_: st.DrawFn) -> dict[str, Any]:
    numbers = st.integers(0, len(WORDS) - 1)
    sentences = draw_(st.lists(st.lists(numbers, min_size=2, max_size=12), min_size=1, max_size=15))
    texts = [" ".join(WORDS[i] for i in words).capitalize() + ". " for words in sentences]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    marked = draw_(st.sets(st.integers(0, len(texts) - 1), max_size=3))
    return {
        "question": "Where?",
        "title": draw_(st.sampled_from([None, "the cat"])),
        "passage": "".join(texts),
        "evidence": [[ends[i] - len(texts[i]), ends[i]] for i in sorted(marked)],
    }


def read_row(given: dict[str, Any], folder: Path) -> Row:
    [row] = read_rows(write_rows(folder / "row.jsonl", [given]), toy_tokenizer())
    return row


@settings(deadline=None)
@given(given_row=long_rows(), seed=st.integers(0, 99), room=st.integers(20, 60))
def test_a_piece_is_a_window_that_keeps_evidence(
    tmp_path_factory: pytest.TempPathFactory, given_row: dict[str, Any], seed: int, room: int
) -> None:
    row = read_row(given_row, tmp_path_factory.getbasetemp())
    cut = piece(row, room, np.random.default_rng(seed), title_rate=0.5, as_negative=False)
    ids, sentence = row.tokens.ids, row.tokens.sentence
    n = len(cut.ids)
    assert cut.title_ids in ([], row.title_ids)
    assert n == min(len(ids), room - (len(cut.title_ids) + 1 if cut.title_ids else 0))
    starts = [
        s
        for s in range(len(ids) - n + 1)
        if ids[s : s + n].tolist() == cut.ids
        and (sentence[s : s + n] - sentence[s]).tolist() == cut.sentence.tolist()
    ]
    assert starts
    assert len(cut.labels) == cut.sentence[-1] + 1
    if len(starts) > 1:  # a passage that repeats itself; which part it is cannot be seen
        return
    start, end = starts[0], starts[0] + n
    low = sentence[start]
    labels = row.labels[low : low + len(cut.labels)]
    first_tokens = [np.flatnonzero(sentence == s)[0] for s in np.flatnonzero(row.labels == 1)]
    if first_tokens:
        assert any(start <= first < end for first in first_tokens)
    if end < len(ids) and sentence[end] == sentence[end - 1]:
        # What is cut short and should be kept is neither rewarded nor punished.
        assert cut.labels[-1] == (IGNORED if labels[-1] == 1 else labels[-1])
        assert cut.labels[:-1].tolist() == labels[:-1].tolist()
    else:
        assert cut.labels.tolist() == labels.tolist()
    negative = piece(row, room, np.random.default_rng(seed), title_rate=0.5, as_negative=True)
    assert negative.ids == cut.ids
    assert not negative.labels.any()


def long_row(noun: str, folder: Path) -> Row:
    """Twenty sentences of six tokens each, all different; the one with `noun` is the evidence."""
    passage = "".join(f"The {other} was in rome. " for other in NOUNS)
    start = passage.index(f"The {noun}")
    evidence = [[start, start + len(f"The {noun} was in rome. ")]]
    return read_row({**GOOD, "passage": passage, "evidence": evidence}, folder)


def test_a_piece_begins_at_a_sentence_where_one_is_within_reach(tmp_path: Path) -> None:
    row = long_row("apple", tmp_path)  # the eleventh: its first token is number 60
    ids = row.tokens.ids.tolist()
    starts = set()
    for seed in range(60):
        cut = piece(row, 40, np.random.default_rng(seed), title_rate=1, as_negative=False)
        (start,) = (s for s in range(len(ids)) if ids[s : s + 40] == cut.ids)
        assert start % 6 == 0 or start == 60 - 40 // 2
        assert start <= 60
        assert (cut.labels == 1).sum() + (cut.labels == IGNORED).sum() == 1
        starts.add(start)
    assert starts == {40, 42, 48, 54, 60}
    whole = piece(row, 500, np.random.default_rng(0), title_rate=1, as_negative=False)
    assert whole.ids == ids
    assert whole.labels.tolist() == row.labels.tolist()


def test_a_piece_keeps_evidence_at_the_end_of_a_long_passage(tmp_path: Path) -> None:
    row = long_row("piano", tmp_path)
    for seed in range(60):
        cut = piece(row, 40, np.random.default_rng(seed), title_rate=1, as_negative=False)
        assert 1 in cut.labels.tolist() or IGNORED in cut.labels.tolist()
