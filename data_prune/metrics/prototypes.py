"""Self-supervised prototypes: a row is hard as far as it is from the centre of its cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prune.choose import choose
from data_prune.clusters import kmeans
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.vectors import Vectors
from prune_core.errors import InputError, check_count


@dataclass(frozen=True, kw_only=True)
class Prototypes(Metric):
    """Cluster the embeddings with k-means; keep the rows far from their centroids, or near.

    Source: Sorscher et al., "Beyond neural scaling laws" (NeurIPS 2022, arXiv:2206.14486),
    section 5: distance is the cosine distance to the nearest centroid; section 5.3 of its
    appendix: a class keeps at least half of the rows that an even cut would leave it.
    Cost: an embedding of each row, and k-means.

    keep: "hard" rows, best where data is plenty; "easy" ones, best where it is scarce; "auto"
    tries both where rows have labels (see `hard_from`). Without labels there is nothing to try
    them on, and "auto" keeps the hard rows, as the paper does with large sets.
    clusters: k; by default the number of classes, or without labels √(n / 2), at most 1,000. The
    paper finds the result insensitive to k within an order of magnitude.
    balance: the part of an even share of the budget that each class keeps at least, in [0, 1];
    the paper's .5. Rows without labels have one class.
    """

    name = "prototypes"
    embeds = "text"
    keep: Literal["hard", "easy", "auto"] = "auto"
    clusters: int | None = None
    balance: float = 0.5

    def __post_init__(self) -> None:
        if self.keep not in ("hard", "easy", "auto"):
            raise InputError(f"keep must be 'hard', 'easy' or 'auto', got {self.keep!r}.")
        if self.clusters is not None:
            check_count("clusters", self.clusters)
        if not 0 <= self.balance <= 1:
            raise InputError(f"balance must be in [0, 1], got {self.balance!r}: the paper's is .5.")

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric."""
        vectors: Vectors = given.needed("vectors", self.name)
        labels, n = given.rows.labels, len(given.rows)
        classes = 0 if labels is None else len(given.rows.label_names)
        k = self.clusters or (classes if classes > 1 else round((n / 2) ** 0.5))
        found = kmeans(
            vectors,
            max(1, min(k, n, 1000 if self.clusters is None else n)),
            given.draws("k-means"),
            given.engine,
            given.seed,
        )
        columns: dict[str, Array] = {
            "distance": found.distances.astype(np.float64),
            "cluster": found.labels,
        }
        if labels is not None:
            columns["label"] = labels
            if self.keep == "auto":
                found_from = hard_from(vectors, columns, given.draws("probe"), self.balance)
                columns["hard_from"] = np.array(found_from)
        return columns

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        hard = self.keep != "easy" and keep >= columns.get("hard_from", 0)
        labels = columns.get("label")
        floors = None if labels is None else even_floors(labels, keep, self.balance)
        return Ranking((1 if hard else -1) * columns["distance"], groups=labels, floors=floors)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return (
            f"cosine distance {columns['distance'][i]:.3f} to the prototype of cluster "
            f"{columns['cluster'][i]}"
        )


def even_floors(labels: NDArray[np.int64], keep: int, balance: float) -> NDArray[np.int64]:
    """(K,) rows that each class keeps at least: this part of an even share, if it has so many."""
    sizes = np.bincount(labels)
    return np.minimum(np.floor(balance * keep / np.count_nonzero(sizes)), sizes).astype(np.int64)


def hard_from(
    vectors: Vectors, columns: Columns, draws: NDArray[np.float64], balance: float
) -> float:
    """The number of rows kept from which the hard ones teach more than the easy ones.

    Of at most 20,000 rows, drawn, a fifth is held back. A linear classifier on the embeddings
    learns from the hard and from the easy rows of the rest, 10 of each class and twice as many
    each time, up to half of them, beyond which both are mostly the same rows. The answer is the
    number at which the hard ones begin to do better and from then on never worse, or infinity.
    """
    from sklearn.linear_model import LogisticRegression

    drawn = np.argsort(draws, kind="stable")[:20_000]
    held, rest = np.split(drawn, [len(drawn) // 5])
    labels, distance = columns["label"], columns["distance"]
    answer, count = math.inf, 10 * len(np.unique(labels))
    while count <= len(rest) // 2:
        right = []
        for sign in (1, -1):
            ranking = Ranking(
                sign * distance[rest],
                labels[rest],
                floors=even_floors(labels[rest], count, balance),
            )
            kept = rest[choose(ranking, count, draws[rest])]
            if len(np.unique(labels[kept])) < 2:
                right.append(0.0)
                continue
            probe = LogisticRegression(C=100, max_iter=1000).fit(vectors[kept], labels[kept])
            right.append(probe.score(vectors[held], labels[held]))
        hard, easy = right
        if hard < easy:
            answer = math.inf
        elif hard > easy:
            answer = min(answer, float(count))
        count *= 2
    return answer
