"""What makes the pruner fast changes no result: batches, the read-ahead, the fast precision."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pipelines.demo.corpus import demo_passages, demo_questions
from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.result import Passage, Request, Scores
from rag_prune.context.windows import batches, sentence_means, tokenise
from tiny import PASSAGES, QUESTION

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "context"


# ----------------------------------------------------------------------------------------- batches


def test_batches_hold_every_row_once_within_both_limits():
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    made = list(batches(lengths, 200, 20))
    assert sorted(i for batch in made for i in batch) == list(range(300))
    for batch in made:
        width = max(lengths[i] for i in batch)
        assert width * len(batch) <= 200
        assert sum(width - lengths[i] for i in batch) <= 20


def test_a_batch_ends_where_the_next_row_would_cost_more_padding_than_allowed():
    assert list(batches([10, 9, 7, 7, 3], 100, 4)) == [[0, 1, 2], [3, 4]]
    assert list(batches([10, 9, 7, 7, 3], 100, 100)) == [[0, 1, 2, 3, 4]]
    assert list(batches([10, 10, 10], 20, 0)) == [[0, 1], [2]]
    assert list(batches([500], 20, 0)) == [[0]]
    assert list(batches([], 20, 0)) == []


# --------------------------------------------------------------------------------------- read-ahead


class Stepwise:
    """Scores a sentence by its length; notes which thread does which step, in order."""

    name = "stepwise"

    def __init__(self):
        self.steps = []

    def score(self, requests):
        return self.begin_score(requests)()

    def begin_score(self, requests):
        names = [r.question for r in requests]
        self.steps.append(("begin", names, threading.current_thread()))

        def rest():
            self.steps.append(("score", names, threading.current_thread()))
            return [
                [
                    Scores(0.5, np.array([1 / (1 + end - start) for start, end in p.spans]))
                    for p in r.passages
                ]
                for r in requests
            ]

        return rest


def requests(n):
    return [(f"question {i}", [f"Passage {i}. " * (i % 3 + 1)]) for i in range(n)]


def test_the_next_batch_is_begun_in_a_thread_and_the_order_is_kept():
    pruner = ContextPruner(Stepwise())
    results = list(pruner.stream(requests(7), batch_size=3, threshold=0))
    assert [r.question for r in results] == [f"question {i}" for i in range(7)]
    here = threading.current_thread()
    assert all(thread is here for step, _, thread in pruner.scorer.steps if step == "score")
    assert all(thread is not here for step, _, thread in pruner.scorer.steps if step == "begin")
    for step in ("begin", "score"):
        seen = [name for kind, names, _ in pruner.scorer.steps if kind == step for name in names]
        assert seen == [f"question {i}" for i in range(7)]


def test_what_is_begun_while_the_network_runs():
    """The second batch is begun before the first is scored to its end, or this would not end."""
    begun = threading.Event()

    class Waiting(Stepwise):
        def begin_score(self, requests):
            rest = super().begin_score(requests)
            if requests[0].question == "question 2":
                begun.set()
            return lambda: rest() if begun.wait(timeout=20) else pytest.fail("nothing was begun")

    results = list(ContextPruner(Waiting()).stream(requests(4), batch_size=2))
    assert len(results) == 4


def test_an_error_comes_in_its_place_and_ends_the_thread():
    pruner = ContextPruner(Stepwise())
    bad = [*requests(4), ("question 4", [7]), *requests(2)]
    results = pruner.stream(bad, batch_size=2)
    assert [next(results).question for _ in range(4)] == [f"question {i}" for i in range(4)]
    with pytest.raises(InputError, match="Passage 0 must be a string"):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("prunekit-ahead")]


def test_an_error_of_the_callers_own_requests_is_the_callers():
    def broken():
        yield from requests(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(ContextPruner(Stepwise()).stream(broken(), batch_size=2))


def test_a_stream_that_is_left_ends_its_thread():
    results = ContextPruner(Stepwise()).stream(requests(9), batch_size=2)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prunekit-ahead")]


def test_many_in_several_batches_are_as_one_by_one(tiny_pruner, monkeypatch):
    monkeypatch.setattr("rag_prune.context.pruner.TOGETHER", 2)
    asked = [(f"{QUESTION} {i}", PASSAGES[i % 3 :]) for i in range(5)]
    for (question, passages), together in zip(asked, tiny_pruner.prune_many(asked), strict=True):
        alone = tiny_pruner.prune(question, passages)
        assert alone.text == together.text
        for a, b in zip(alone.passages, together.passages, strict=True):
            np.testing.assert_allclose(a._scores, b._scores, atol=1e-5)


# ---------------------------------------------------------------------------------------- precision


def python_requests(n):
    """Questions on Python's reference with passages of it, cut to many lengths."""
    texts = [p["text"] for p in demo_passages()]
    return [
        (q["question"], [t[: 150 * (j + 1)] for j, t in enumerate(texts[5 * i : 5 * i + 4])])
        for i, q in enumerate(demo_questions()[:n])
    ]


@pytest.mark.parametrize("method", ["provence", "late"])
def test_fast_decides_as_float32_does(method):
    """The bundled pruner. Where the processor has no bfloat16, both are float32 and all equal."""
    from rag_prune.context.model import fast_bfloat16

    exact, fast = (
        ContextPruner.from_pretrained(method=method, device="cpu", precision=precision)
        for precision in ("float32", "fast")
    )
    asked = python_requests(8)
    same, apart = [], []
    for a, b in zip(exact.prune_many(asked), fast.prune_many(asked), strict=True):
        for p, q in zip(a.passages, b.passages, strict=True):
            same += (p._kept == q._kept).tolist()
            apart.append(np.abs(p._scores - q._scores).max())
    assert len(same) > 80
    assert np.mean(same) >= 0.985  # one of them may stand on the threshold itself
    assert max(apart) < 0.05
    assert (max(apart) > 1e-4) == fast_bfloat16()


def test_precision_is_one_of_two():
    with pytest.raises(InputError, match="precision must be 'float32' or 'fast', got 'half'"):
        ContextPruner.from_pretrained(precision="half")


# -------------------------------------------------------------------------------------------- peers


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    yield peers
    sys.modules.pop("peers")


@pytest.mark.parametrize("peer", ["open_provence", "provence"])
def test_a_peer_reads_the_same_rows_and_gets_the_same_logits(peers, peer):
    """So the benchmark times code paths, not models."""
    engine = ContextPruner.from_pretrained(method="provence", device="cpu").scorer
    asked = python_requests(3)
    read = [Request(q, tuple(Passage.read(t, i) for i, t in enumerate(ts))) for q, ts in asked]
    passages = [p for r in read for p in r.passages]
    tokens = tokenise(
        engine.checkpoint.tokenizer, [p.text for p in passages], [p.spans for p in passages]
    )
    ours = [scored for request in engine.logits(read) for scored in request]
    theirs = getattr(peers, peer)(engine.checkpoint, asked)
    room = engine.checkpoint.settings.window
    compared = 0
    for passage, ids, (keep, relevance), pruned in zip(passages, tokens, ours, theirs, strict=True):
        if len(ids.ids) > room - 40:  # we read it in windows, they do not
            continue
        assert len(pruned.logits) == len(ids.ids)
        means = sentence_means(pruned.logits, ids.sentence, len(passage.spans))
        np.testing.assert_allclose(means, keep, atol=1e-4)
        assert pruned.relevance == pytest.approx(1 / (1 + np.exp(-relevance)), abs=1e-5)
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("peer", ["open_provence", "provence"])
def test_a_peer_keeps_what_answers(peers, peer):
    checkpoint = ContextPruner.from_pretrained(method="provence", device="cpu").scorer.checkpoint
    text = "Curie was born in Warsaw. She discovered radium in 1898. She liked cycling a lot."
    asked = [("when was radium discovered?", [text])]
    [pruned] = getattr(peers, peer)(checkpoint, asked, threshold=0.45)
    assert pruned.text.lower().strip() == "she discovered radium in 1898."
    [whole] = getattr(peers, peer)(checkpoint, asked, threshold=0.0)
    assert whole.text.lower() == text.lower()


# ----------------------------------------------------------------------------------------- openvino


@pytest.mark.parametrize("method", ["provence", "late", "both"])
def test_openvino_gives_the_networks_own_numbers(
    tiny_checkpoint, tiny_pruners, method, monkeypatch
):
    pytest.importorskip("openvino")
    monkeypatch.setattr("rag_prune.context.openvino.fast_bfloat16", lambda: False)
    fast = ContextPruner.from_pretrained(
        tiny_checkpoint, method=method, device="cpu", precision="fast"
    )
    asked = [(QUESTION, [*PASSAGES, "", "The cat found radium. " * 30]), ("cat?", PASSAGES[:1])]
    exact = tiny_pruners[method].prune_many(asked)
    for a, b in zip(exact, fast.prune_many(asked), strict=True):
        for p, q in zip(a.passages, b.passages, strict=True):
            assert p.relevance == pytest.approx(q.relevance, abs=1e-4)
            np.testing.assert_allclose(p._scores, q._scores, atol=1e-4)
