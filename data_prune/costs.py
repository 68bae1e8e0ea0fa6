"""What choosing rows would cost, before anything is spent."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prune.budget import Budget
from data_prune.cache import Cache, cache_folder, keys_of
from data_prune.engine import Local
from data_prune.metric import Metric
from data_prune.rows import Columns, draws, read, rows_of
from data_prune.selector import encoder_of, metric_of_name, texts_of
from prune_core.storage import StrPath

_TRIED = 32  # texts encoded to see how long one takes


@dataclass(frozen=True)
class Estimate:
    """Rows and characters of the input, what stays, and what it takes to find out.

    fit: rows that can be scored.   kept: rows that stay; None for a budget in tokens.
    encode: texts to encode, those left out that the cache holds.   seconds: for them, on this
    machine; measured on 32 of them.   memory, disk: bytes of their vectors.
    cost: of the metric itself, in words.
    """

    rows: int
    fit: int
    kept: int | None
    characters: int
    encode: int
    seconds: float
    memory: int
    disk: int
    cost: str

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.characters:,} characters; {self.fit:,} can be scored"
            + ("" if self.kept is None else f", {self.kept:,} stay"),
            f"The metric costs {self.cost}.",
        ]
        if self.memory:
            minutes = self.seconds / 60
            lines.append(
                f"{self.encode:,} texts to encode, about {minutes:,.1f} minutes here; "
                f"{self.memory / 2**20:,.0f} MiB of memory, {self.disk / 2**20:,.0f} MiB of disk."
            )
        return "\n".join(lines)


def estimate(
    dataset: Any,
    *,
    metric: str | Metric = "prototypes",
    budget: int | float | str | Budget,
    seed: int = 0,
    prompt: str | None = None,
    response: str | None = None,
    text: str | None = None,
    label: str | None = None,
    id: str | None = None,
    embeddings: Any = None,
    cache: StrPath | bool = True,
) -> Estimate:
    """Read the rows, and say what `select` with the same arguments would take.

    Raises InputError as `select` does for rows, columns and budgets that are not fit.
    """
    from data_prune import METHODS

    metric, budget = metric_of_name(metric), Budget.of(budget)
    source = read(dataset)
    names = Columns(prompt=prompt, response=response, text=text, label=label, id=id)
    rows = rows_of(source, names.found(source.names))
    encode, seconds, width, disk = 0, 0.0, 0, 0
    if isinstance(embeddings, np.ndarray):
        width = embeddings.shape[1]
    elif metric.embeds:
        encoder = encoder_of(embeddings)
        texts = texts_of(rows, metric.embeds)
        folder: Path | None = None if cache is False else cache_folder(cache)
        store = Cache.of(encoder, "embeddings", folder)
        missing = store.missing(keys_of(list(texts)))
        encode = len(missing)
        tried = [texts[i] for i in missing[np.argsort(draws(rows.ids, seed, "estimate")[missing])]]
        tried = tried[:_TRIED] or list(texts[:1])
        work = Local(1)
        started = time.perf_counter()
        [vectors] = work.map(encoder, [tried])
        seconds = (time.perf_counter() - started) / len(tried) * encode / Local().workers
        width = np.shape(vectors)[1]
        disk = encode * (width * 4 + 32) if store.keeps else 0
    return Estimate(
        rows=len(source),
        fit=len(rows),
        kept=None if budget.tokens else budget.count(len(source), len(rows)),
        characters=sum(map(len, rows.texts)),
        encode=encode,
        seconds=seconds,
        memory=len(rows) * width * 4,
        disk=disk,
        cost=METHODS.row(metric.name).cost,
    )
