"""Figures worked by hand: recall, compression, ranking, intervals, SQuAD's answer comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
import pytest

from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.evaluate import (
    Scored,
    Task,
    answer_quality,
    build_tasks,
    compare,
    contains,
    exact_match,
    flatten,
    mean_interval,
    measure,
    ratio_interval,
    score_tasks,
    token_f1,
)
from rag_prune.context.result import Request, Scores

# ----------------------------------------------------------------------------- scores by hand

SCORED = Scored(
    score=np.array([0.9, 0.2, 0.6, 0.1, 0.05, 0.4]),
    length=np.array([10, 20, 30, 40, 50, 50]),
    task=np.array([0, 0, 0, 1, 1, 1]),
    evidence=np.array([True, False, True, False, False, True]),
    rank=np.array([1.0, 2.5]),
)


@pytest.mark.parametrize(
    ("threshold", "recall", "dropped"),
    [(0.0, 1, 0), (0.4, 1, 110), (0.41, 2 / 3, 160), (0.9, 1 / 3, 190), (0.91, 0, 200)],
)
def test_recall_and_compression(threshold: float, recall: float, dropped: int) -> None:
    assert SCORED.recall(threshold) == pytest.approx(recall)
    assert SCORED.compression(threshold) == pytest.approx(dropped / 200)


@pytest.mark.parametrize(
    ("recall", "threshold"), [(1.0, 0.4), (0.67, 0.4), (2 / 3, 0.6), (1 / 3, 0.9), (0.01, 0.9)]
)
def test_threshold_at_is_the_highest_that_keeps_the_share(recall: float, threshold: float) -> None:
    assert SCORED.threshold_at(recall) == threshold
    assert SCORED.recall(threshold) >= recall - 1e-9


def test_threshold_at_is_not_fooled_by_rounding() -> None:
    # 0.07 · 100 is 7.000000000000001 in floating point; seven sentences are enough.
    scored = Scored(
        np.arange(100, 0, -1) / 100,
        np.ones(100),
        np.zeros(100),
        np.ones(100, dtype=bool),
        np.ones(1),
    )
    assert scored.threshold_at(0.07) == 0.94


def test_mrr_and_ndcg() -> None:
    ranks = Scored(*(np.zeros(0),) * 3, evidence=np.zeros(0, bool), rank=np.array([1.0, 2.5, 11.0]))
    assert ranks.mrr == pytest.approx((1 + 0.4 + 1 / 11) / 3)
    assert ranks.ndcg(10) == pytest.approx((1 + 1 / log2(3.5)) / 3)
    assert ranks.ndcg(11) == pytest.approx((1 + 1 / log2(3.5) + 1 / log2(12)) / 3)


def test_calibration_error() -> None:
    """Bins of 1/15: two sentences near 0.1 with none of the evidence, two near 0.9 with one."""
    score = np.array([0.10, 0.12, 0.90, 0.92, 1.0])
    evidence = np.array([False, False, True, False, True])
    scored = Scored(score, np.ones(5), np.zeros(5, dtype=int), evidence, np.ones(1))
    assert scored.ece == pytest.approx((0.22 + 0.82 + 0.0) / 5)


def test_resampling_draws_whole_tasks() -> None:
    drawn = SCORED.resample(np.random.default_rng(0))
    assert len(drawn.rank) == 2
    for number, rank in enumerate(drawn.rank):
        of_task = drawn.task == number
        expected = SCORED.task == (0 if rank == 1.0 else 1)
        assert drawn.score[of_task].tolist() == SCORED.score[expected].tolist()
        assert drawn.evidence[of_task].tolist() == SCORED.evidence[expected].tolist()


# --------------------------------------------------------------------------- results to scores


class ByTable:
    """Scores from a table: text of a passage -> relevance and sentence scores."""

    name = "table"

    def __init__(self, table: dict[str, tuple[float, list[float]]]) -> None:
        self.table = table

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        return [
            [Scores(self.table[p.text][0], np.array(self.table[p.text][1])) for p in r.passages]
            for r in requests
        ]


GOLD = "Radium glows. Marie Curie found it. It is rare."
TASK = Task(
    "Who found radium?",
    ({"title": None, "text": "A cat sat."}, {"title": None, "text": GOLD}, {"text": "No end"}),
    gold=1,
    evidence=((14, 35),),
    answers=("Marie Curie",),
)


@pytest.mark.parametrize(
    ("relevance", "rank"),
    [([0.1, 0.5, 0.2], 1), ([0.9, 0.5, 0.2], 2), ([0.5, 0.5, 0.2], 1.5), ([0.7, 0.7, 0.7], 2)],
)
def test_a_tie_is_worth_its_mean_place(relevance: list[float], rank: float) -> None:
    a, b, c = relevance
    table = {"A cat sat.": (a, [0.3]), GOLD: (b, [0.2, 0.8, 0.0]), "No end": (c, [0.1])}
    scored = score_tasks(ContextPruner(ByTable(table)), [TASK, TASK])
    assert scored.rank.tolist() == [rank, rank]
    assert scored.score.tolist() == [0.3, 0.2, 0.8, 0.0, 0.1] * 2
    assert scored.length.tolist() == [10, 14, 22, 11, 6] * 2
    assert scored.task.tolist() == [0] * 5 + [1] * 5
    assert scored.evidence.tolist() == [False, False, True, False, False] * 2


def test_what_a_pruner_dropped_is_scored_like_what_it_kept() -> None:
    pruner = ContextPruner.from_pretrained(method="lead")
    kept = pruner.prune_many([(TASK.question, TASK.passages)], threshold=0.0)
    cut = pruner.prune_many([(TASK.question, TASK.passages)], threshold=0.4)
    assert flatten(cut, [TASK]).score.tolist() == flatten(kept, [TASK]).score.tolist()


# -------------------------------------------------------------------------------------- tasks


def row(
    title: str | None, passage: str, question: str = "", evidence: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    return {
        "question": question,
        "title": title,
        "passage": passage,
        "evidence": list(evidence),
        "answers": ["Marie Curie"] if evidence else [],
    }


ROWS = [
    row("Radium", "Marie Curie found radium. It glows.", "Who found radium?", [[0, 25]]),
    row("Radium", "Radium was found in a shed in Paris."),  # near, but of the same title
    row("Polonium", "Polonium: marie curie found radium later."),  # near, but holds the answer
    row("Paint", "Radium paint was found on watches."),
    row("Gold", "Gold was found in the river."),
    row("Cats", "The cat sat on the mat."),
    row("Dogs", "A dog slept on the sofa."),
    row("Rain", "Rain fell on the roof."),
]


@pytest.mark.parametrize("distractors", ["random", "bm25"])
def test_distractors_have_another_title_and_hold_no_answer(distractors: Any) -> None:
    for seed in range(5):
        (task,) = build_tasks(ROWS, distractors=distractors, seed=seed)  # only one row has evidence
        texts = [p["text"] for p in task.passages]
        assert len(set(texts)) == 5
        assert texts[task.gold] == ROWS[0]["passage"]
        others = [p for i, p in enumerate(task.passages) if i != task.gold]
        assert all(p["title"] not in ("Radium", "Polonium") for p in others)
        assert task.evidence == ((0, 25),)
        assert task.answers == ("Marie Curie",)


def test_hard_distractors_are_the_nearest_by_bm25() -> None:
    (task,) = build_tasks(ROWS, distractors="bm25", n_passages=3)
    assert {p["title"] for p in task.passages} == {"Radium", "Paint", "Gold"}


@pytest.mark.parametrize("distractors", ["random", "bm25"])
def test_tasks_follow_from_rows_and_seed(distractors: Any) -> None:
    assert build_tasks(ROWS, distractors=distractors, seed=3) == build_tasks(
        ROWS, distractors=distractors, seed=3
    )
    orders = {
        tuple(p["text"] for p in build_tasks(ROWS, distractors=distractors, seed=seed)[0].passages)
        for seed in range(10)
    }
    assert len(orders) > 1


def test_distractors_of_the_same_title() -> None:
    rows = [*ROWS, row("Radium", "Radium is heavy."), row("Radium", "Marie Curie liked radium.")]
    (task,) = build_tasks(rows, distractors="same_title", n_passages=3)
    assert {p["text"] for p in task.passages} == {rows[i]["passage"] for i in (0, 1, 8)}
    assert build_tasks(rows, distractors="same_title") == []  # four of them there are not
    untitled = [row(None, f"Number {i} of ten.", "?", [[0, 8]]) for i in range(10)]
    assert build_tasks(untitled, distractors="same_title") == []


def test_title_and_answers_may_be_absent() -> None:
    rows = [
        {"question": "Xyzzy?", "passage": f"Number {i} of ten.", "evidence": [[0, 8]]}
        for i in range(10)
    ]
    for distractors in ("random", "bm25"):  # no word of the question is in any passage
        tasks = build_tasks(rows, distractors=distractors)
        assert len(tasks) == 10
        assert tasks[0].passages[tasks[0].gold] == {"title": None, "text": "Number 0 of ten."}
        assert tasks[0].answers == ()


@pytest.mark.parametrize("distractors", ["random", "bm25"])
def test_too_few_passages_to_choose_from(distractors: Any) -> None:
    with pytest.raises(InputError, match=r"needs 4 distractors, and only 2 of 5 .* Give more"):
        build_tasks(ROWS[:5], distractors=distractors)
    assert build_tasks([], distractors=distractors) == []


# ------------------------------------------------------------------------- measure and compare


def random_scored(n_tasks: int = 40) -> Scored:
    rng = np.random.default_rng(1)
    evidence = np.tile([True, False, False, False], n_tasks)
    return Scored(
        np.clip(rng.random(4 * n_tasks) + 0.3 * evidence, 0, 1),
        rng.integers(10, 90, 4 * n_tasks),
        np.repeat(np.arange(n_tasks), 4),
        evidence,
        rng.integers(1, 6, n_tasks).astype(float),
    )


def test_measure_gives_every_figure_with_an_interval_around_it() -> None:
    scored = random_scored()
    figures = measure(scored, 0.4, resamples=200)
    assert list(figures) == [
        "recall",
        "compression",
        "compression_at_0.90",
        "compression_at_0.95",
        "compression_at_0.98",
        "mrr",
        "ndcg@5",
        "ece",
    ]
    for figure in figures.values():
        low, high = figure["interval"]
        assert low <= figure["value"] <= high
        assert low < high
    assert figures["recall"]["value"] == pytest.approx(scored.recall(0.4), abs=1e-4)
    at_95 = scored.compression(scored.threshold_at(0.95))
    assert figures["compression_at_0.95"]["value"] == pytest.approx(at_95, abs=1e-4)
    assert figures == measure(scored, 0.4, resamples=200)


def test_keep_all_and_random_are_always_compared() -> None:
    tasks = build_tasks(ROWS, distractors="bm25", n_passages=3)
    report = compare({"bm25": ContextPruner.from_pretrained(method="bm25")}, tasks)
    json.dumps(report)
    methods = report["methods"]
    assert set(methods) == {"bm25", "keep_all", "random"}
    assert methods["keep_all"]["recall"]["value"] == 1
    assert methods["keep_all"]["compression"]["value"] == 0
    assert methods["keep_all"]["mrr"]["value"] == 0.5  # the mean place of three is the second
    assert methods["bm25"]["mrr"]["value"] == 1
    assert all(m["seconds"]["value"] >= 0 for m in methods.values())
    assert report["tasks"] == 1
    total = sum(len(ROWS[i]["passage"]) for i in (0, 3, 4))
    assert report["oracle"] == pytest.approx(1 - 26 / total, abs=1e-4)  # with the space after it


def test_a_given_random_is_not_replaced() -> None:
    table = {r["passage"]: (0.5, [0.5] * r["passage"].count(".")) for r in ROWS}
    report = compare(
        {"random": ContextPruner(ByTable(table))}, build_tasks(ROWS, distractors="random")
    )
    assert report["methods"]["random"]["recall"]["value"] == 1


def test_nothing_to_compare_on() -> None:
    with pytest.raises(InputError, match="no tasks to compare on: give rows"):
        compare({}, [])


# ------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "within", "f1"),
    [
        ("The Eiffel Tower!", ["Eiffel Tower"], 1, 1, 1),
        ("paris", ["Lyon", "Paris"], 1, 1, 1),
        ("In the city of Paris.", ["Paris"], 0, 1, 2 * 1 / (4 + 1)),
        ("Marie and Pierre Curie", ["Marie Curie", "Pierre"], 0, 1, 2 * 2 / (4 + 2)),
        ("Marie and Pierre Curie", ["Marie Curie"], 0, 0, 2 * 2 / (4 + 2)),
        ("Paris, Paris", ["Paris"], 0, 1, 2 * 1 / (2 + 1)),
        ("a scar", ["car"], 0, 0, 0),
        ("U.S.", ["US"], 1, 1, 1),
        ("", ["Paris"], 0, 0, 0),
        ("Paris", [], 0, 0, 0),
        ("...", ["{{"], 0, 0, 0),  # nothing is left of either to compare
    ],
)
def test_answers_are_compared_as_squad_does(
    answer: str, accepted: list[str], exact: float, within: float, f1: float
) -> None:
    assert exact_match(answer, accepted) == exact
    assert contains(answer, accepted) == within
    assert token_f1(answer, accepted) == pytest.approx(f1)


def test_answer_quality_asks_every_question_with_its_context() -> None:
    asked = []

    def generate(question: str, context: str) -> tuple[str, int, float]:
        asked.append((question, context))
        return context, len(context), 0.5

    quality = answer_quality(["Marie Curie", "nobody"], [TASK, TASK], generate)
    assert asked == [(TASK.question, "Marie Curie"), (TASK.question, "nobody")]
    assert {name: values.tolist() for name, values in quality.items()} == {
        "f1": [1, 0],
        "exact_match": [1, 0],
        "contains": [1, 0],
        "prompt_tokens": [11, 6],
        "seconds": [0.5, 0.5],
    }


def test_mean_interval() -> None:
    figure = mean_interval(np.array([0.0, 1.0] * 50))
    assert figure["value"] == 0.5
    assert 0.35 < figure["interval"][0] < 0.45
    assert 0.55 < figure["interval"][1] < 0.65


def test_the_interval_of_a_ratio_is_over_questions_answered_both_ways() -> None:
    """What both share cancels: a pair that always differs by a half leaves no doubt."""
    baseline = np.array([1.0, 5.0] * 50)
    assert ratio_interval(1.5 * baseline, baseline) == {"value": 1.5, "interval": [1.5, 1.5]}
    figure = ratio_interval(baseline, baseline[::-1])
    assert figure["value"] == 1.0
    assert figure["interval"][0] < 0.9 < 1.1 < figure["interval"][1]
