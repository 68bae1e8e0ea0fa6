"""Scores that were made elsewhere: memorization, influence, a reward model, a person."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prune.metric import Array, Columns, Given, Metric, Ranking
from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Imported(Metric):
    """Keep the rows of the highest scores, which come with the rows.

    For scores that take thousands of runs, like the published memorization and influence estimates
    of Feldman and Zhang, "What neural networks memorize and why" (2020, arXiv:2008.03703). NaN says
    that a row could not be scored, and it is not kept.   Cost: none.
    """

    name = "imported"

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric; raises InputError for scores that are infinite or not one number a row."""
        scores, n = np.asarray(given.needed("scores", self.name)), len(given.rows)
        if scores.shape != (n,) or scores.dtype.kind not in "fiub":
            raise InputError(
                f"scores must be a number for each of the {n} rows, higher for rows to keep, got "
                f"{scores.dtype} of shape {scores.shape}."
            )
        scores = scores.astype(np.float64)
        if len(infinite := np.flatnonzero(np.isinf(scores))):
            raise InputError(
                f"scores must be finite, or NaN for rows that could not be scored, got "
                f"{scores[infinite[0]]} for {len(infinite)} rows: replace it by a large number."
            )
        return {"score": scores}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(columns["score"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"score {columns['score'][i]:.4g}"
