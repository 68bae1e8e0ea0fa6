"""CCS: rows of every difficulty, in equal number as far as there are, but none of the hardest."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np

from data_prune import METHODS
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.metrics.aum import AUM
from prune_core.errors import InputError, check_count


@dataclass(frozen=True, kw_only=True)
class CCS(Metric):
    """Leave out the hardest rows, cut the rest into strata by difficulty, keep as many of each.

    Source: Zheng et al., "Coverage-centric coreset selection for high pruning rates" (ICLR 2023,
    arXiv:2210.15809), algorithm 1: strata are of equal width over the range of the difficulty;
    those that have fewer rows than an equal share stay whole and the others share what is left;
    within a stratum rows are drawn.
    Differs: the authors' code leaves out the rows of lowest AUM (of probabilities, not logits),
    whatever the strata are of; the paper and this, those of the strata's own difficulty. Its range,
    up to max · 1.0001, loses the largest row where that is not positive. The numbers of rows of the
    strata are the code's.
    Cost: that of the base.

    base: says how hard rows are: a metric that can keep "hard" ones, or its name. The authors'
    example is AUM. Which end the base keeps by itself does not matter.
    strata: the paper's 50.
    cutoff: β, the part of the rows in [0, 1) that is left out as too hard, as far as enough stay.
    The paper searches for it, by data set and pruning rate. By default it is 0 where half of the
    rows stay or more, .3 (the authors' example) where a tenth does or less, and linear between,
    which is ours. If some share of the labels is wrong, give at least that.
    """

    name = "ccs"
    base: Metric | str = field(default_factory=AUM)
    strata: int = 50
    cutoff: float | None = None

    def __post_init__(self) -> None:
        base = METHODS.get(self.base)() if isinstance(self.base, str) else self.base
        if not isinstance(base, Metric) or "keep" not in {f.name for f in fields(base)}:
            raise InputError(
                f"base must be a metric that can keep hard or easy rows, like AUM(), EL2N() or "
                f"Prototypes(), got {base!r}."
            )
        check_count("strata", self.strata)
        if self.cutoff is not None and not 0 <= self.cutoff < 1:
            raise InputError(
                f"cutoff must be in [0, 1), the part of the rows that is too hard, or None, got "
                f"{self.cutoff!r}."
            )
        # Of this instance: what it looks at is what its base does.
        for name, value in (("base", base), ("embeds", base.embeds), ("nested", base.nested)):
            object.__setattr__(self, name, value)

    @property
    def _hard(self) -> Metric:
        hard: dict[str, Any] = {"keep": "hard"}
        return replace(cast(Metric, self.base), **hard)

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric."""
        return {**self._hard.score(given), "draw": given.draws("ccs")}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        difficulty = self._hard.rank(columns, keep).scores
        scored = np.flatnonzero(np.isfinite(difficulty))
        n = len(scored)
        cutoff = self.cutoff
        if cutoff is None:
            cutoff = float(np.interp(keep / max(n, 1), [0.1, 0.5], [0.3, 0.0]))
        hardest = scored[np.argsort(-difficulty[scored], kind="stable")]
        out, rest = np.split(hardest, [max(0, min(round(cutoff * n), n - keep))])
        groups = np.zeros(len(difficulty), dtype=np.int64)
        groups[rest] = strata(difficulty[rest], self.strata)
        return Ranking(
            np.where(np.isfinite(difficulty), columns["draw"], np.nan),
            groups,
            weights=np.ones(int(groups.max()) + 1),
            barred=dict.fromkeys(out.tolist(), f"among the hardest {len(out) / max(n, 1):.0%}"),
        )

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"{self._hard.describe(columns, i)}, lot {columns['draw'][i]:.4f} in its stratum"


def strata(difficulty: Array, k: int) -> Array:
    """(n,) numbers in [0, k) of strata of equal width; the one with most rows is 0, and so on.

    So the rows that an equal share leaves over go to the strata that have most, as in the code.
    """
    if not len(difficulty):
        return np.zeros(0, dtype=np.int64)
    low, high = difficulty.min(), difficulty.max()
    width = (high - low) / k
    if width == 0:
        return np.zeros(len(difficulty), dtype=np.int64)
    stratum = np.minimum(((difficulty - low) / width).astype(np.int64), k - 1)
    number = np.empty(k, dtype=np.int64)
    number[np.argsort(-np.bincount(stratum, minlength=k), kind="stable")] = np.arange(k)
    numbered: Array = number[stratum]
    return numbered
