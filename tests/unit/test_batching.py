"""The batcher: company changes no answer, trouble stays with who brought it, room is bounded."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_core.errors import InputError, Overloaded
from rag_prune import ContextPruner
from rag_prune.context.result import Budget, Scores
from rag_prune.server.batching import ROW, Batcher, characters
from tiny import PASSAGES, QUESTION


class Slow:
    """Scores by length, notes its batches, waits for `gate`, and raises where a passage says so."""

    name = "slow"

    def __init__(self, gate=None):
        self.batches, self.threads, self.gate = [], set(), gate

    def score(self, requests):
        self.batches.append([r.question for r in requests])
        self.threads.add(threading.current_thread().name)
        if self.gate:
            assert self.gate.wait(10)
        if any("boom" in p.text for r in requests for p in r.passages):
            raise RuntimeError("boom")
        return [
            [
                Scores(
                    1 / (1 + len(p.text)), np.array([1 / (end - start) for start, end in p.spans])
                )
                for p in r.passages
            ]
            for r in requests
        ]


class Words:
    @staticmethod
    def encode(text):
        return text.split()


def run(main, scorer, **options):
    """Run `main(batcher)` on a loop of its own; the batcher is closed after it."""

    async def whole():
        batcher = Batcher(ContextPruner(scorer), **options)
        try:
            return await asyncio.wait_for(main(batcher), 20)
        finally:
            if scorer.gate:
                scorer.gate.set()
            await asyncio.wait_for(batcher.close(), 20)
            assert (batcher.requests, batcher.characters) == (0, 0)

    return asyncio.run(whole())


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("It never happened.")


BUDGETS = st.one_of(
    st.none(),
    st.builds(Budget, threshold=st.floats(0, 1), top_k=st.none() | st.integers(1, 3)),
    st.builds(Budget, keep_ratio=st.floats(0, 1)),
    st.builds(Budget, max_tokens=st.integers(0, 20), tokenizer=st.just(Words)),
)
TEXTS = st.lists(st.sampled_from(["The cat sat. ", "Radium glows. ", "Who? ", "你好。", "\n\n"]))
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["Who found radium?", "cat"]),
        st.lists(TEXTS.map("".join), max_size=4),
        BUDGETS,
        st.booleans(),
    ),
    max_size=8,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(REQUESTS, st.sampled_from([1, 200, 100_000]))
def test_answers_are_those_of_pruning_one_by_one(tiny_pruners, requests, batch_characters):
    pruner = tiny_pruners["both"]

    async def whole():
        batcher = Batcher(pruner, window=0.001, batch_characters=batch_characters)
        try:
            return await asyncio.gather(
                *(batcher.prune(q, passages, b, reorder=r) for q, passages, b, r in requests)
            )
        finally:
            await batcher.close()

    for together, (question, passages, budget, reorder) in zip(
        asyncio.run(whole()), requests, strict=True
    ):
        pruner.scorer.late._recent.clear()  # or it would be read from there
        given = {} if budget is None else vars(budget)
        alone = pruner.prune(question, passages, **given, reorder=reorder)
        assert together.text == alone.text
        assert [p.text for p in together.passages] == [p.text for p in alone.passages]
        assert [p.rank for p in together.passages] == [p.rank for p in alone.passages]
        assert [p.relevance for p in together.passages] == pytest.approx(
            [p.relevance for p in alone.passages], abs=1e-5
        )


def test_concurrent_requests_share_a_batch_in_one_thread():
    scorer, seen = Slow(), []

    async def main(batcher):
        for _ in range(2):
            await asyncio.gather(*(batcher.prune(f"q{i}", PASSAGES) for i in range(10)))

    run(main, scorer, window=0.05, on_batch=lambda *numbers: seen.append(numbers))
    assert [sorted(batch) for batch in scorer.batches] == [[f"q{i}" for i in range(10)]] * 2
    assert len(scorer.threads) == 1
    assert [(n, size) for n, size, _ in seen] == [(10, 10 * characters("q0", PASSAGES))] * 2
    assert all(seconds > 0 for _, _, seconds in seen)


def test_a_batch_closes_before_it_is_too_large_and_a_larger_request_has_its_own():
    scorer = Slow()
    cost = characters("q0", ["word"] * 3)

    async def main(batcher):
        await asyncio.gather(
            *(batcher.prune(f"q{i}", ["word"] * 3) for i in range(5)),
            batcher.prune("long", ["word " * 500]),
        )

    run(main, scorer, window=0.05, batch_characters=2 * cost)
    assert sorted(len(batch) for batch in scorer.batches) == [1, 1, 2, 2]
    assert ["long"] in scorer.batches


def test_the_question_counts_for_each_passage():
    assert characters("abc", []) == 3 + ROW
    assert characters("abc", ["de", {"title": "f", "text": "gh"}]) == 3 * (3 + ROW) + 2 + 1 + 2
    assert characters("abc", [7, {"text": None}, None]) == 4 * (3 + ROW)


@pytest.mark.parametrize(
    ("question", "passages", "error", "says"),
    [
        ("", PASSAGES, InputError, "The question must be a string"),
        (QUESTION, None, InputError, "The passages must be a list"),
        (QUESTION, [7], InputError, "Passage 0 must be a string"),
        (QUESTION, ["boom"], RuntimeError, "boom"),
    ],
)
def test_a_failing_request_does_not_fail_its_mates(question, passages, error, says):
    scorer = Slow()

    async def main(batcher):
        return await asyncio.gather(
            *(batcher.prune(f"q{i}", PASSAGES) for i in range(3)),
            batcher.prune(question, passages),
            batcher.prune("q3", PASSAGES),
            return_exceptions=True,
        )

    *good, bad, last = run(main, scorer, window=0.05)
    assert isinstance(bad, error)
    assert says in str(bad)
    for answer in [*good, last]:
        alone = ContextPruner(Slow()).prune(answer.question, PASSAGES)
        assert answer.to_dict() == alone.to_dict()
    assert {"q0", "q1", "q2", "q3"} <= set(scorer.batches[0])


def test_a_tokenizer_that_raises_fails_its_own_request():
    class Broken:
        @staticmethod
        def encode(text):
            raise OSError("no vocabulary")

    async def main(batcher):
        budget = Budget(max_tokens=5, tokenizer=Broken)
        return await asyncio.gather(
            batcher.prune("q0", PASSAGES, budget),
            batcher.prune("q1", PASSAGES),
            return_exceptions=True,
        )

    bad, good = run(main, Slow(), window=0.05)
    assert isinstance(bad, OSError)
    assert good.question == "q1"


def test_what_is_too_much_is_refused_at_once_and_room_comes_back():
    scorer = Slow(threading.Event())
    cost = characters("q0", PASSAGES)

    async def main(batcher):
        here = [asyncio.create_task(batcher.prune(f"q{i}", PASSAGES)) for i in range(3)]
        await until(lambda: batcher.requests == 3)
        started = time.perf_counter()
        with pytest.raises(
            Overloaded, match=r"3 requests with \d+ characters are waiting"
        ) as caught:
            await batcher.prune("q3", PASSAGES)
        assert time.perf_counter() - started < 1
        assert 1 <= caught.value.retry_after <= 60
        scorer.gate.set()
        await asyncio.gather(*here)
        await batcher.prune("q3", PASSAGES)
        await batcher.prune("q4", ["word " * 10 * cost])  # alone, anything is let in

    run(main, scorer, queue_characters=3 * cost)
    assert scorer.batches[-1] == ["q4"]


def test_who_stops_waiting_is_not_scored_and_leaves_room():
    scorer = Slow(threading.Event())

    async def main(batcher):
        first = asyncio.create_task(batcher.prune("first", PASSAGES))
        await until(lambda: scorer.batches)
        left = asyncio.create_task(batcher.prune("left", PASSAGES))
        stays = asyncio.create_task(batcher.prune("stays", PASSAGES))
        await until(lambda: len(batcher._queue) == 2)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert batcher.characters == characters("first", PASSAGES) + characters("stays", PASSAGES)
        first.cancel()  # while it is being scored
        scorer.gate.set()
        assert (await stays).question == "stays"
        assert first.cancelled()

    run(main, scorer)
    assert scorer.batches == [["first"], ["stays"]]


def test_closing_answers_what_is_here_and_refuses_the_rest():
    scorer = Slow(threading.Event())

    async def main(batcher):
        here = [asyncio.create_task(batcher.prune(f"q{i}", PASSAGES)) for i in range(3)]
        await until(lambda: scorer.batches)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="shutting down"):
            await batcher.prune("late", PASSAGES)
        assert not closing.done()
        scorer.gate.set()
        await closing
        assert [(await task).question for task in here] == ["q0", "q1", "q2"]

    run(main, scorer)
    assert not [t for t in threading.enumerate() if t.name.startswith("prunekit")]


def test_the_loop_goes_on_while_a_batch_runs():
    scorer = Slow(threading.Event())

    async def main(batcher):
        task = asyncio.create_task(batcher.prune(QUESTION, PASSAGES))
        await until(lambda: scorer.batches)
        ticks = 0
        while ticks < 20:
            await asyncio.sleep(0.001)
            ticks += 1
        assert not task.done()
        scorer.gate.set()
        await task

    run(main, scorer)


@pytest.mark.parametrize("name", ["batch_characters", "queue_characters"])
def test_sizes_are_checked(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        Batcher(ContextPruner(Slow()), **{name: 0})
