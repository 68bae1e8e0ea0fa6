"""Scores made elsewhere: memorization, influence, a reward model's, your own."""

from __future__ import annotations

from dataclasses import dataclass

from data_prune.metric import Array, Columns, Given, Metric, Ranking


@dataclass(frozen=True, kw_only=True)
class Imported(Metric):
    """Keep the rows whose given score is high.

    For scores that take thousands of runs, such as the memorization and influence estimates of
    Feldman and Zhang, "What neural networks memorize and why" (2020, arXiv:2008.03703), which are
    published as files.   Cost: none.
    """

    name = "imported"

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric."""
        return {"given": given.needed("scores", self.name)}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(columns["given"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"given score {columns['given'][i]:.4g}"
