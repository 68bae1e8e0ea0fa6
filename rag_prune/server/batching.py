"""Gather concurrent requests into batches for one scoring thread; each is answered as if alone.

    batcher = Batcher(pruner)
    result = await batcher.prune(question, passages, Budget(threshold=0.3))
    await batcher.close()

A request waits a few milliseconds for company, so a busy server fills its batches and an idle one
loses nothing. What goes wrong with a request, in reading, scoring or cutting it, is raised to its
caller alone; a caller that stops waiting leaves the queue. Needs nothing but asyncio.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prune_core.errors import InputError, Overloaded
from rag_prune.context.pruner import DEFAULT_THRESHOLD, ContextPruner
from rag_prune.context.result import Budget, PassageLike, PrunedContext, Request, Scores

# What a passage costs besides its characters: a row of its own and its special tokens.
ROW = 32


@dataclass(eq=False)
class _Waiting:
    request: Request
    budget: Budget
    reorder: bool
    cost: int
    answer: asyncio.Future[PrunedContext] = field(default_factory=asyncio.Future)


class Batcher:
    """Prunes for many callers of one event loop with one pruner.

    Args:
        pruner: Used from one thread alone.
        window: Seconds that a request waits for others.
        batch_characters: A batch closes before it would have more; a larger request has its own.
            Characters are those that the model reads, so the question counts for each passage.
        queue_characters: What may wait or run at a time. A larger request is let in when there is
            no other.
        on_batch: Called in the event loop after each batch with its number of requests, its
            characters and its seconds.
    """

    def __init__(
        self,
        pruner: ContextPruner,
        *,
        window: float = 0.004,
        batch_characters: int = 40_000,
        queue_characters: int = 2_000_000,
        on_batch: Callable[[int, int, float], None] | None = None,
    ) -> None:
        for name, value in (("batch", batch_characters), ("queue", queue_characters)):
            if value < 1:
                raise InputError(
                    f"{name}_characters must be at least 1, got {value}: leave it out."
                )
        self.pruner = pruner
        self.window = window
        self.batch_characters = batch_characters
        self.queue_characters = queue_characters
        self.on_batch = on_batch
        self.requests = 0  # waiting or running
        self.characters = 0
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunekit")
        self._draining: asyncio.Task[None] | None = None
        self._closed = False
        self._speed = 20_000.0  # characters a second, as of the last batches

    async def prune(
        self,
        question: str,
        passages: Sequence[PassageLike],
        budget: Budget | None = None,
        *,
        reorder: bool = True,
    ) -> PrunedContext:
        """`ContextPruner.prune`, in a batch with whoever asks at the same time.

        Raises:
            InputError: As `ContextPruner.prune` does, for this request.
            Overloaded: Too much is waiting, or the batcher was closed; nothing was done.
        """
        cost = characters(question, passages)
        self._admit(cost)
        self.requests += 1
        self.characters += cost
        try:
            # In a thread of its own: sentences are split while the network runs for others.
            request = await asyncio.to_thread(Request.read, question, passages)
            waiting = _Waiting(
                request, budget or Budget(threshold=DEFAULT_THRESHOLD), reorder, cost
            )
            self._queue.append(waiting)
            if self._draining is None or self._draining.done():
                self._draining = asyncio.create_task(self._drain())
            return await waiting.answer
        finally:
            self.requests -= 1
            self.characters -= cost

    async def close(self) -> None:
        """Refuse what comes from now on, answer what is here, end the thread."""
        self._closed = True
        while self.requests:
            await asyncio.sleep(self.window)
        if self._draining:
            await self._draining  # a batch that everybody abandoned may still run
        self._thread.shutdown()

    def _admit(self, cost: int) -> None:
        if self._closed:
            raise Overloaded("The pruner is shutting down: ask another one.", retry_after=5)
        if self.requests and self.characters + cost > self.queue_characters:
            wait = math.ceil(min(max(self.characters / self._speed, 1), 60))
            raise Overloaded(
                f"{self.requests} requests with {self.characters} characters are waiting, and "
                f"{cost} more would be over {self.queue_characters}: try again in {wait} s.",
                retry_after=wait,
            )

    async def _drain(self) -> None:
        """Answer batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._queue:
            if sum(w.cost for w in self._queue) < self.batch_characters:
                await asyncio.sleep(self.window)
            if not (batch := self._take()):
                continue
            started = time.perf_counter()
            answers = await loop.run_in_executor(self._thread, self._answer, batch)
            seconds = time.perf_counter() - started
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():  # abandoned meanwhile
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
            cost = sum(w.cost for w in batch)
            self._speed = (self._speed + cost / max(seconds, 1e-6)) / 2
            if self.on_batch:
                self.on_batch(len(batch), cost, seconds)

    def _take(self) -> list[_Waiting]:
        """The next batch, in the order of arrival; without those that nobody waits for."""
        batch: list[_Waiting] = []
        room = self.batch_characters
        while self._queue:
            if self._queue[0].answer.done():
                self._queue.popleft()
                continue
            if batch and self._queue[0].cost > room:
                break
            batch.append(self._queue.popleft())
            room -= batch[-1].cost
        return batch

    def _answer(self, batch: list[_Waiting]) -> list[PrunedContext | Exception]:
        """In the thread. A batch that fails is scored one by one: the guilty fails alone."""
        try:
            scored: list[list[Scores] | Exception] = list(
                self.pruner.scorer.score([w.request for w in batch])
            )
        except Exception as error:
            if len(batch) > 1:
                return [answer for w in batch for answer in self._answer([w])]
            scored = [error]
        return [self._cut(w, scores) for w, scores in zip(batch, scored, strict=True)]

    def _cut(
        self, waiting: _Waiting, scores: list[Scores] | Exception
    ) -> PrunedContext | Exception:
        if isinstance(scores, Exception):
            return scores
        try:
            return PrunedContext.from_scores(
                waiting.request,
                scores,
                waiting.budget,
                method=self.pruner.scorer.name,
                reorder=waiting.reorder,
            )
        except Exception as error:  # a tokenizer may raise anything
            return error


def characters(question: str, passages: Sequence[PassageLike]) -> int:
    """What the model has to read: the question once a passage, titles, texts, and `ROW` for each.

    What is no text counts as none; `Request.read` is the one to complain.
    """
    asked = _length(question) + ROW
    if not isinstance(passages, Sequence):
        return asked
    parts = (
        asked + sum(map(_length, (p.get("text"), p.get("title"))))
        if isinstance(p, Mapping)
        else asked + _length(p)
        for p in passages
    )
    return sum(parts, start=asked)


def _length(text: object) -> int:
    return len(text) if isinstance(text, str) else 0
