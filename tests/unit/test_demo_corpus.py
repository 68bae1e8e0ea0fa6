"""The demo's questions hold for the reference of the interpreter that runs this."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from pipelines.demo.corpus import demo_passages, demo_questions
from rag_prune.context.evaluate import contains

PASSAGES = demo_passages()
QUESTIONS = demo_questions()
ANSWERED = [question for question in QUESTIONS if question["answers"]]


def normalised(text: str) -> str:
    return " ".join(text.split())


def test_passages_are_exact_slices_of_the_articles() -> None:
    for passage in PASSAGES:
        article = topics[passage["id"].partition("#")[0]]
        assert article.startswith(passage["text"], passage["start"])
        assert passage["title"]


def test_passages_are_of_a_size_to_retrieve_and_appear_once() -> None:
    sizes = sorted(len(passage["text"]) for passage in PASSAGES)
    assert 400 <= len(sizes) <= 700
    assert 700 <= sizes[len(sizes) // 2] <= 1000
    assert sum(size > 1300 for size in sizes) <= 25  # tables, mostly
    assert len({passage["text"] for passage in PASSAGES}) == len(PASSAGES)
    assert len({passage["id"] for passage in PASSAGES}) == len(PASSAGES)


def test_articles_that_stand_in_longer_ones_keep_their_name() -> None:
    assert {"for", "while", "in"} <= {passage["id"].partition("#")[0] for passage in PASSAGES}


@pytest.mark.parametrize("question", ANSWERED, ids=lambda question: str(question["topic"]))
def test_evidence_and_answers_stand_in_the_reference(question: dict[str, list[str]]) -> None:
    article = normalised(topics[str(question["topic"])])
    for sentence in question["evidence"]:
        assert sentence == normalised(sentence)
        assert sentence in article
        assert any(sentence in normalised(passage["text"]) for passage in PASSAGES)
        assert normalised(str(question["question"])) not in sentence
    # The first answer stands there word for word; the others are other ways to say it.
    assert any(question["answers"][0] in sentence for sentence in question["evidence"])
    assert all(contains(answer, [answer]) for answer in question["answers"])


def test_questions_are_varied() -> None:
    assert len(QUESTIONS) == 24
    assert len({question["question"] for question in QUESTIONS}) == 24
    assert len({question["topic"] for question in ANSWERED}) >= 20
    assert sum(len(question["evidence"]) > 1 for question in ANSWERED) >= 6
    without = [question for question in QUESTIONS if not question["answers"]]
    assert len(without) == 2
    assert all(q["evidence"] == [] and q["topic"] is None for q in without)


def test_evidence_is_not_always_at_the_start() -> None:
    places = []
    for question in ANSWERED:
        article = normalised(topics[question["topic"]])
        places += [article.index(sentence) / len(article) for sentence in question["evidence"]]
    assert sum(place < 0.25 for place in places) <= len(places) * 0.5
    assert sum(place > 0.5 for place in places) >= len(places) * 0.25
