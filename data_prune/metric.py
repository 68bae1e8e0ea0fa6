"""What every way to choose rows is: settings, scores that cost, and a ranking that does not.

score(given) -> columns     asks models, clusters, searches; once, and kept
rank(columns, keep)         from the columns alone who goes first, for any budget
describe(columns, i)        what was found of a row, in words
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import Engine, Local
from data_prune.rows import Rows, draws
from data_prune.vectors import Vectors
from prune_core.errors import InputError

Array = NDArray[Any]
Columns = Mapping[str, Array]
"""Arrays of n entries, one a row, by name; or of shape (), one for all."""

Degradation = Callable[[Sequence[str], Sequence[str]], Any]
"""Prompts and responses in, how much a pruned model lost on each out; NaN where none can tell."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Given:
    """What a metric may look at, all in the order of `rows`; what was not given is None.

    keep: rows that the budget asks for.   vectors: of what the metric embeds.
    target, target_vectors: rows of what the model shall be good at.
    log: from training, (epochs, n) or (runs, epochs, n) arrays by name; see
    `data_prune.training_log`.
    degradation, losses: callables, or (n,) arrays.   scores: (n,) made elsewhere.
    sizes: (n,) tokens.
    """

    rows: Rows
    keep: int
    seed: int = 0
    engine: Engine = field(default_factory=Local)
    cache: Path | None = None
    vectors: Vectors | None = None
    target: Rows | None = None
    target_vectors: Vectors | None = None
    log: Mapping[str, Array] | None = None
    degradation: Degradation | Array | None = None
    losses: Callable[..., Any] | Array | None = None
    scores: Array | None = None
    sizes: NDArray[np.int64] | None = None

    def draws(self, purpose: str) -> NDArray[np.float64]:
        """(n,) numbers in [0, 1) that belong to the rows and the seed, not to their order."""
        return draws(self.rows.ids, self.seed, purpose)

    def pairs(self, metric: str) -> list[tuple[str, str]]:
        """(n,) prompts and responses; raises InputError for rows of one text."""
        if not self.rows.prompts:
            raise InputError(
                f"The metric '{metric}' needs rows of prompt and response, but these are of one "
                f"text: name the columns with prompt= and response=."
            )
        return list(zip(self.rows.prompts, self.rows.responses, strict=True))

    def needed(self, name: str, metric: str) -> Any:
        """One of the fields; raises InputError, which says what to pass, where it is None."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"The metric '{metric}' needs {_HOW[name]}.")
        return value


_HOW = {
    "vectors": "embeddings=, an array (rows, width), an encoder, or the name of a model",
    "target": "target=, rows of what the model shall be good at",
    "target_vectors": "target=, rows of what the model shall be good at",
    "log": "log=, what a TrainingLog recorded while a model was trained on these rows",
    "degradation": "degradation=, an array of a number a row, or a callable of prompts and "
    "responses",
    "losses": "losses=, a callable of prompts and responses, or an array",
    "scores": "scores=, a number a row, higher for rows to keep",
}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Who goes first. Higher scores are kept; ties are settled by the rows' order.

    scores: (n,) float64; NaN is never kept.
    groups: (n,) group numbers from 0, or None.
    weights: (K,) how the budget is shared among the groups; None lets the scores decide, between
    floors: (K,) rows that each group keeps at least, as far as it has them.
    barred: of rows that may not be kept at all, why.
    instead: (n,) of each row one that goes first and that it is like, as numbered in the input; -1
    where there is none. A row that is dropped names the first on this way that is kept.
    """

    scores: NDArray[np.float64]
    groups: NDArray[np.int64] | None = None
    weights: NDArray[np.float64] | None = None
    floors: NDArray[np.int64] | None = None
    barred: Mapping[int, str] = field(default_factory=dict)
    instead: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """Base of all metrics. A metric is its settings: `dataclasses.replace` makes a variant."""

    name: ClassVar[str]
    embeds: ClassVar[Literal["text", "prompt"] | None] = None
    """What of a row it looks at through embeddings."""
    nested: ClassVar[bool] = True
    """Whether the columns hold for any budget, not only up to the one that they were made for."""

    @abstractmethod
    def score(self, given: Given) -> dict[str, Array]:
        """The columns: everything that takes models, clustering or search."""

    @abstractmethod
    def rank(self, columns: Columns, keep: int) -> Ranking:
        """Who goes first when `keep` rows stay."""

    @abstractmethod
    def describe(self, columns: Columns, i: int) -> str:
        """What it found of row i: a phrase, like "cosine distance 0.41 to its prototype"."""


@dataclass(frozen=True, kw_only=True)
class Difficulty(Metric):
    """Base of metrics that say how hard a row is; either end of the scale can be kept.

    keep: "hard" or "easy" rows. Which is better depends on how much data is left: easy rows where
    it is scarce, hard ones where it is plenty (Sorscher et al., 2022, arXiv:2206.14486).
    """

    keep: Literal["hard", "easy"] = "hard"

    def __post_init__(self) -> None:
        if self.keep not in ("hard", "easy"):
            raise InputError(f"keep must be 'hard' or 'easy', got {self.keep!r}.")

    @abstractmethod
    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """(n,), higher for harder rows; NaN where it cannot be told."""

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric."""
        return {"difficulty": self.difficulty(given)}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        sign = 1 if self.keep == "hard" else -1
        return Ranking(sign * columns["difficulty"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"{self.name} {columns['difficulty'][i]:.3g}"
