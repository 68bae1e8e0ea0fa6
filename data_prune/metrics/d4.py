"""D4: drop near copies first, then the most typical rows of what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_prune.clusters import kmeans
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.metrics.semdedup import SemDeDup
from data_prune.neighbours import cells_for
from data_prune.vectors import Vectors
from prune_core.errors import InputError, check_count


@dataclass(frozen=True, kw_only=True)
class D4(Metric):
    """SemDeDup, then k-means of the survivors anew, and the rows far from their centroids.

    Source: Tirumala et al., "D4: improving LLM pretraining via document de-duplication and
    diversification" (NeurIPS 2023, arXiv:2308.12284), section 3: copies draw centroids to
    themselves, so rows are clustered again without them before the prototypes of Sorscher et al.
    (arXiv:2206.14486) go. The share of SemDeDup is the paper's .75.
    Budgets above that share are met too: the copies come after all survivors, in SemDeDup's order.
    Cost: an embedding of each row, two times k-means, and SemDeDup's search.

    survivors: share of the rows that SemDeDup keeps, in (0, 1].
    clusters: k of both; by default one for 500 rows, at most √n.
    """

    name = "d4"
    embeds = "text"
    survivors: float = 0.75
    clusters: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.survivors <= 1:
            raise InputError(
                f"survivors must be above 0 and at most 1 (the share of the rows that SemDeDup "
                f"keeps), got {self.survivors!r}: the paper's is .75."
            )
        if self.clusters is not None:
            check_count("clusters", self.clusters)

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric.

        SemDeDup's columns; distance: of a survivor, from its centroid, NaN for the
        others.
        """
        vectors: Vectors = given.needed("vectors", self.name)
        count = math.ceil(self.survivors * len(vectors))
        columns = SemDeDup(clusters=self.clusters).score(given)
        left = np.sort(np.argsort(columns["cosine"], kind="stable")[:count])
        found = kmeans(
            vectors.subset(left),
            min(count, self.clusters or cells_for(count)),
            given.draws("k-means again")[left],
            given.engine,
            given.seed,
        )
        distance = np.full(len(vectors), np.nan)
        distance[left] = found.distances
        return {**columns, "distance": distance}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        copy = np.isnan(columns["distance"])
        return Ranking(
            # A distance is at least 0; what stands for a copy is at most -1.
            np.fmax(columns["distance"], -2 - columns["cosine"]),
            instead=np.where(copy, columns["neighbour"], -1),
        )

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        distance = columns["distance"][i]
        if np.isnan(distance):
            return SemDeDup().describe(columns, i)
        return f"cosine distance {distance:.3f} to the prototype of its cluster"
