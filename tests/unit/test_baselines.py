import math

import numpy as np
import pytest

from rag_prune import ContextPruner
from rag_prune.context.baselines import Random, bm25_scores
from rag_prune.context.result import Passage, Request


def request(*texts):
    return Request("red cat red", tuple(Passage.read(t, i) for i, t in enumerate(texts)))


def test_bm25_by_hand():
    scores = bm25_scores(["red", "cat", "red"], [["red", "cat", "cat"], ["cat"], ["dog", "dog"]])
    # Three texts of 3, 1 and 2 words, 2 on average; "red" is in one of them and "cat" in two.
    red, cat = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    long, short = (1.5 * (0.25 + 0.75 * length / 2) for length in (3, 1))
    expected = [red * 2.5 / (1 + long) + cat * 2 * 2.5 / (2 + long), cat * 2.5 / (1 + short), 0]
    np.testing.assert_allclose(scores, expected)


def test_bm25_adds_half_of_the_passage_and_scales_to_the_best():
    pruner = ContextPruner.from_pretrained(method="bm25")
    [[first, second]] = pruner.scorer.score([request("A red cat. It runs.", "Dogs bark.")])
    assert (first.relevance, second.relevance) == (1, 0)
    assert first.sentences[0] == 1 > first.sentences[1] > 0
    assert second.sentences.tolist() == [0]


def test_lead_and_keep_all():
    given = request("One. Two. Three.")
    lead, everything = (ContextPruner.from_pretrained(method=m) for m in ("lead", "keep_all"))
    assert lead.scorer.score([given])[0][0].sentences.tolist() == [1, 1 / 2, 1 / 3]
    assert everything.scorer.score([given])[0][0].sentences.tolist() == [1, 1, 1]


def test_random_depends_on_seed_question_and_text_alone():
    [[a, b]] = Random().score([request("One. Two.", "Three.")])
    [[b_alone]] = Random().score([request("Three.")])
    [[other]] = Random(seed=1).score([request("Three.")])
    assert b.relevance == b_alone.relevance
    assert b.sentences.tolist() == b_alone.sentences.tolist() != other.sentences.tolist()
    assert len({a.relevance, b.relevance, *a.sentences, *b.sentences}) == 5


def test_random_is_uniform():
    scores = np.concatenate(
        [
            s.sentences
            for s in Random().score([request(*(f"One {i}. Two." for i in range(2000)))])[0]
        ]
    )
    assert np.mean(scores) == pytest.approx(0.5, abs=0.02)
    assert np.quantile(scores, [0.1, 0.9]) == pytest.approx([0.1, 0.9], abs=0.02)
