"""Where work on many rows runs: threads of this process, or Ray Data. The results are the same.

Work is cut into shards by the rows, never by the number of workers; each shard is computed with
one thread, and sums are taken in the order of the shards. So neither the engine nor the number of
workers changes a bit of what comes out.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from prune_core.errors import check_count, require

S = TypeVar("S")
R = TypeVar("R")

ROWS = 4096
"""Rows of a shard."""


def shards(n: int, size: int = ROWS) -> list[slice]:
    """n rows in slices of `size`, the last one shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def one_thread() -> Any:
    """A context in which BLAS, and OpenMP called from this thread, compute with one thread."""
    return _libraries(len(sys.modules)).limit(limits=1)


@lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """Those loaded by now. Looking for them takes milliseconds, so only after an import again."""
    return ThreadpoolController()


class Engine(ABC):
    """Runs work on shards; the work is a function or an object that can be called and pickled."""

    @abstractmethod
    def map(self, work: Callable[[S], R], items: Sequence[S], desc: str = "") -> Iterator[R]:
        """Give work(item) of each, in order, computed ahead of what is taken by a few shards.

        desc: what the progress bar says; none is shown without it.
        """

    def reduce(
        self, work: Callable[[S], Mapping[str, NDArray[Any]]], items: Sequence[S], desc: str = ""
    ) -> dict[str, NDArray[np.float64]]:
        """The sums over all shards of the arrays that work gives, in float64 and in order."""
        sums: dict[str, NDArray[np.float64]] = {}
        for part in self.map(work, items, desc):
            for name, array in part.items():
                if name in sums:
                    sums[name] += array
                else:
                    sums[name] = np.array(array, dtype=np.float64)
        return sums

    def by_group(
        self,
        work: Callable[[NDArray[np.int64]], R],
        groups: NDArray[np.int64],
        desc: str = "",
    ) -> Iterator[tuple[NDArray[np.int64], R]]:
        """Give the rows of each group, ascending, with work(rows); groups in order of number."""
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        members = np.split(order, starts[1:])
        yield from zip(members, self.map(work, members, desc), strict=True)


@dataclass(frozen=True)
class Local(Engine):
    """Threads of this process.

    workers: threads; the machine's cores by default.
    """

    workers: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        check_count("workers", self.workers)

    def map(self, work: Callable[[S], R], items: Sequence[S], desc: str = "") -> Iterator[R]:
        """See Engine."""
        waiting: deque[Future[R]] = deque()
        # One thread a shard: several would add in another order, and fight over the cores. OpenMP
        # keeps its number by thread, BLAS for the process.
        with (
            one_thread(),
            ThreadPoolExecutor(self.workers, initializer=one_thread) as pool,
            _bar(desc, len(items)) as bar,
        ):
            try:
                for item in items:
                    waiting.append(pool.submit(work, item))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                        bar.update()
                while waiting:
                    yield waiting.popleft().result()
                    bar.update()
            finally:
                for future in waiting:
                    future.cancel()


class _Worker(Generic[S, R]):
    """What Ray's actors run; the work reaches each of them once, its arrays without a copy."""

    def __init__(self, work: Any, items: Any) -> None:
        import ray

        self.work: Callable[[S], R] = ray.get(work)
        self.items: Sequence[S] = ray.get(items)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[Any]]:
        import pickle

        numbers = batch["id"].tolist()
        with one_thread():
            done = [pickle.dumps(self.work(self.items[i])) for i in numbers]
        return {"id": numbers, "result": done}


@dataclass(frozen=True)
class Ray(Engine):
    """Actors of Ray Data: on this machine, or on the cluster that `ray.init` joined.

    workers: actors, each asking for half a core, so that as much is left to feed them.
    """

    workers: int = 2

    def __post_init__(self) -> None:
        check_count("workers", self.workers)

    def map(self, work: Callable[[S], R], items: Sequence[S], desc: str = "") -> Iterator[R]:
        """See Engine. Results that are early wait in memory until those before them are there."""
        import pickle

        ray = require("ray", extra="ray", purpose="The Ray engine")
        data = require("ray.data", extra="ray", purpose="The Ray engine")
        if not items:
            return
        pipeline = data.range(len(items), override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_args=(ray.put(work), ray.put(items)),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(self.workers, len(items))),
            num_cpus=0.5,  # with whole cores the actors would leave none to feed them
        )
        early: dict[int, R] = {}
        following = 0
        with _bar(desc, len(items)) as bar:
            for row in pipeline.iter_rows():
                # The bytes are what our own worker wrote a moment ago.
                early[row["id"]] = pickle.loads(row["result"])
                bar.update()
                while following in early:
                    yield early.pop(following)
                    following += 1


def _bar(desc: str, total: int) -> Any:
    return tqdm(desc=desc, total=total, unit="shard", disable=None if desc else True, leave=False)
