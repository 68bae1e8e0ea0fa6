"""Random rows: what every other metric has to beat, and most do not."""

from __future__ import annotations

from dataclasses import dataclass

from data_prune.metric import Array, Columns, Given, Metric, Ranking


@dataclass(frozen=True, kw_only=True)
class Random(Metric):
    """Keep rows by lot; the lot belongs to the row's content and the seed, not to its place.

    Source: the baseline that "Rethinking data selection at scale: random selection is almost all
    you need" (2024, arXiv:2410.09335) finds hard to beat.   Cost: none.
    """

    name = "random"

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric."""
        return {"draw": given.draws("random")}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(columns["draw"])

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"lot {columns['draw'][i]:.4f}"
