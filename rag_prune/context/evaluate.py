"""Measure pruners side by side: evidence kept, text dropped, right passage first, answers, cost.

A task is a question with several passages, one of which answers in known sentences. Every
comparison holds `keep_all` and `random`; a curve, not a point, is the result: how much is dropped
when the method is cut where it keeps 90, 95 or 98 % of the evidence.
"""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prune_core.errors import InputError
from rag_prune.context.pruner import DEFAULT_THRESHOLD, ContextPruner
from rag_prune.context.result import PrunedContext
from rag_prune.context.sentences import Span, touched

RECALLS = (0.90, 0.95, 0.98)
CURVE = tuple(round(0.70 + 0.01 * i, 2) for i in range(31))
REQUIRED = ("keep_all", "random")


@dataclass(frozen=True)
class Task:
    """passages[gold] answers `question`, in the character spans `evidence` of its text."""

    question: str
    passages: tuple[dict[str, Any], ...]
    gold: int
    evidence: tuple[Span, ...]
    answers: tuple[str, ...]


def build_tasks(
    rows: Sequence[Mapping[str, Any]],
    *,
    distractors: Literal["random", "bm25", "same_title"],
    n_passages: int = 5,
    seed: int = 0,
) -> list[Task]:
    """Tasks from training rows (see `rag_prune.context.train`); those without evidence make none.

    Distractors are passages of other rows that hold none of the answers: drawn at random from other
    titles; those of other titles that are nearest to the question by BM25; or drawn from the same
    title, where a question whose title has too few makes no task. Passages are in random order.

    Raises InputError when there are too few passages of other titles to choose from.
    """
    import bm25s

    pool = list({row["passage"]: row for row in rows}.values())
    index = bm25s.BM25()
    if distractors == "bm25" and pool:
        passages = bm25s.tokenize([r["passage"] for r in pool], show_progress=False)
        index.index(passages, show_progress=False)
    tasks, near = [], distractors == "same_title"
    for number, row in enumerate(rows):
        if not row["evidence"]:
            continue
        title, answers = row.get("title"), tuple(row.get("answers", ()))
        rng = np.random.default_rng((seed, number))
        if distractors == "bm25":
            query = bm25s.tokenize([row["question"]], show_progress=False)
            found, _ = index.retrieve(query, k=len(pool), show_progress=False, n_threads=1)
            order = [int(i) for i in found[0]]
        else:
            order = rng.permutation(len(pool)).tolist()
        others = [
            pool[i]
            for i in order
            if pool[i]["passage"] != row["passage"]
            and (title is not None and pool[i].get("title") == title) == near
            and not any(a.lower() in pool[i]["passage"].lower() for a in answers)
        ][: n_passages - 1]
        if len(others) < n_passages - 1:
            if near:
                continue
            raise InputError(
                f"A task needs {n_passages - 1} distractors, and only {len(others)} of {len(pool)} "
                f"passages can serve for the question {row['question']!r}. Give more rows."
            )
        gold = int(rng.integers(n_passages))
        chosen = [*others[:gold], row, *others[gold:]]
        tasks.append(
            Task(
                row["question"],
                tuple({"title": r.get("title"), "text": r["passage"]} for r in chosen),
                gold,
                tuple((int(start), int(end)) for start, end in row["evidence"]),
                answers,
            )
        )
    return tasks


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a method on tasks, flat over all sentences: enough for any threshold.

    score, length, task: (n_sentences,) probability, characters, number of the task.
    evidence: (n_sentences,) whether a person marked it.
    rank: (n_tasks,) of the right passage, from 1.
    """

    score: np.ndarray
    length: np.ndarray
    task: np.ndarray
    evidence: np.ndarray
    rank: np.ndarray

    def recall(self, threshold: float) -> float:
        """Share of the evidence sentences that a threshold keeps."""
        return float((self.score[self.evidence] >= threshold).mean())

    def compression(self, threshold: float) -> float:
        """Share of all characters that a threshold drops."""
        return float(self.length[self.score < threshold].sum() / self.length.sum())

    def threshold_at(self, recall: float) -> float:
        """The highest threshold that keeps at least this share of the evidence sentences."""
        return least_kept(self.score[self.evidence], recall)

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank of the right passage."""
        return float((1 / self.rank).mean())

    def ndcg(self, k: int = 10) -> float:
        """nDCG@k with one right passage a task."""
        return float(np.where(self.rank <= k, 1 / np.log2(1 + self.rank), 0).mean())

    @property
    def ece(self) -> float:
        """Expected calibration error of the sentences' probabilities, in 15 equal bins.

        Guo et al., On calibration of modern neural networks, 2017, arXiv:1706.04599, eq. 3: how far
        the share of evidence in a bin is from its mean probability, weighted by sentences.
        """
        number = np.minimum((self.score * 15).astype(int), 14)
        gaps = np.bincount(number, self.score - self.evidence, minlength=15)
        return float(np.abs(gaps).sum() / len(self.score))

    def resample(self, rng: np.random.Generator) -> Scored:
        """The same measurement on tasks drawn with replacement."""
        n = len(self.rank)
        drawn = rng.integers(n, size=n)
        by_task = np.split(np.arange(len(self.task)), np.flatnonzero(np.diff(self.task)) + 1)
        pick = np.concatenate([by_task[t] for t in drawn])
        task = np.repeat(np.arange(n), [len(by_task[t]) for t in drawn])
        return Scored(
            self.score[pick], self.length[pick], task, self.evidence[pick], self.rank[drawn]
        )


def least_kept(scores: np.ndarray, share: float) -> float:
    """The lowest of the best scores that are at least this share of all, at least one of them."""
    falling = np.sort(scores)[::-1]
    # Less a hair: 0.07 * 100 is more than 7.
    return float(falling[max(0, int(np.ceil(share * len(falling) - 1e-9)) - 1)])


def score_tasks(pruner: ContextPruner, tasks: Sequence[Task]) -> Scored:
    """Run a pruner over tasks once."""
    results = pruner.prune_many([(t.question, t.passages) for t in tasks], threshold=0.0)
    return flatten(results, tasks)


def flatten(results: Sequence[PrunedContext], tasks: Sequence[Task]) -> Scored:
    """Flat scores of results that keep everything (threshold 0), for `tasks` in order."""
    score, length, number, evidence, rank = [], [], [], [], []
    for n, (result, task) in enumerate(zip(results, tasks, strict=True)):
        for i, passage in enumerate(result.passages):
            sentences = sorted([*passage.kept, *passage.dropped], key=lambda s: s.start)
            spans = [(s.start, s.end) for s in sentences]
            score += [s.score for s in sentences]
            length += [end - start for start, end in spans]
            number += [n] * len(sentences)
            evidence += touched(spans, task.evidence if i == task.gold else ())
        # A tie is worth its mean place, or the order would judge a method that ranks nothing.
        relevance = np.array([p.relevance for p in result.passages])
        right = relevance[task.gold]
        rank.append(1 + (relevance > right).sum() + ((relevance == right).sum() - 1) / 2)
    return Scored(
        np.array(score), np.array(length), np.array(number), np.array(evidence), np.array(rank)
    )


def measure(
    scored: Scored, threshold: float, *, resamples: int = 500, seed: int = 0
) -> dict[str, Any]:
    """All quality figures of one method, each with a 95 % bootstrap interval over tasks."""

    def figures(s: Scored) -> dict[str, float]:
        out = {"recall": s.recall(threshold), "compression": s.compression(threshold)}
        out |= {f"compression_at_{r:.2f}": s.compression(s.threshold_at(r)) for r in RECALLS}
        return out | {"mrr": s.mrr, "ndcg@5": s.ndcg(5), "ece": s.ece}

    rng = np.random.default_rng(seed)
    drawn = [figures(scored.resample(rng)) for _ in range(resamples)]
    return {
        name: _with_interval(value, [d[name] for d in drawn])
        for name, value in figures(scored).items()
    }


def compare(
    pruners: Mapping[str, ContextPruner],
    tasks: Sequence[Task],
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Any]:
    """Quality and cost of every pruner on the same tasks; `keep_all` and `random` always join.

    Returns:
        `methods`: name → the figures of `measure`, `seconds`, and as `curve` the compression where
        the method keeps each share of the evidence in `recalls`.   `oracle`: the share of
        characters that is dropped when only the evidence sentences stay.

    Raises:
        InputError: There are no tasks.
    """
    if not tasks:
        raise InputError(
            "There are no tasks to compare on: give rows with evidence to build_tasks."
        )
    missing = [name for name in REQUIRED if name not in pruners]
    everyone = {**pruners, **{m: ContextPruner.from_pretrained(method=m) for m in missing}}
    methods: dict[str, Any] = {}
    scored = None
    for name, pruner in everyone.items():
        started = time.perf_counter()
        scored = score_tasks(pruner, tasks)
        seconds = time.perf_counter() - started
        methods[name] = measure(scored, threshold) | {
            "seconds": {"value": round(seconds, 2)},
            "curve": [round(scored.compression(scored.threshold_at(r)), 4) for r in CURVE],
        }
    assert scored is not None
    oracle = 1 - scored.length[scored.evidence].sum() / scored.length.sum()
    return {
        "tasks": len(tasks),
        "oracle": round(float(oracle), 4),
        "recalls": list(CURVE),
        "methods": methods,
    }


# ---------------------------------------------------------------------------------------- answers


def normalise_answer(text: str) -> list[str]:
    """Words without articles, punctuation and case, as SQuAD's evaluation compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 when the answer equals an accepted one."""
    words = normalise_answer(answer)
    return float(bool(words) and any(words == normalise_answer(a) for a in accepted))


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1.0 when an accepted answer occurs in the answer, word for word."""
    words = f" {' '.join(normalise_answer(answer))} "
    wanted = (" ".join(normalise_answer(a)) for a in accepted)
    return float(any(f" {a} " in words for a in wanted if a))


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """The best token F1 against an accepted answer (SQuAD)."""

    def f1(gold: list[str]) -> float:
        got = normalise_answer(answer)
        shared = sum((Counter(got) & Counter(gold)).values())
        return 2 * shared / (len(got) + len(gold)) if shared else 0.0

    return max((f1(normalise_answer(a)) for a in accepted), default=0.0)


Generate = Callable[[str, str], tuple[str, int, float]]


def answer_quality(
    contexts: Sequence[str], tasks: Sequence[Task], generate: Generate, progress: str | None = None
) -> dict[str, np.ndarray]:
    """Ask a language model every question with its context.

    Args:
        generate: Takes question and context; returns the answer, the prompt's tokens, the seconds.
        progress: Label of a progress bar; none without one.

    Returns:
        Arrays (n_tasks,): f1, exact_match, contains, prompt_tokens, seconds.
    """
    from tqdm.auto import tqdm

    rows = []
    pairs = zip(tasks, contexts, strict=True)
    for task, context in tqdm(pairs, total=len(tasks), desc=progress, disable=progress is None):
        answer, tokens, seconds = generate(task.question, context)
        rows.append(
            (
                token_f1(answer, task.answers),
                exact_match(answer, task.answers),
                contains(answer, task.answers),
                tokens,
                seconds,
            )
        )
    names = ("f1", "exact_match", "contains", "prompt_tokens", "seconds")
    return dict(zip(names, np.array(rows, dtype=float).T, strict=True))


def mean_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval."""
    return ratio_interval(values, np.ones(len(values)))


def ratio_interval(values: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Ratio of two means over the same questions and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(1000, len(values)))
    ratios = values[drawn].mean(axis=1) / baseline[drawn].mean(axis=1)
    return _with_interval(float(values.mean() / baseline.mean()), ratios)


def _with_interval(value: float, resampled: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A figure and the middle 95 % of its resampled values."""
    bounds = np.quantile(resampled, [0.025, 0.975])
    return {"value": round(value, 4), "interval": [round(float(q), 4) for q in bounds]}
