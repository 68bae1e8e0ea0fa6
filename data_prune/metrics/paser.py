"""PASER: rows of the kinds that a pruned model lost most, to train it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prune.asked import asked
from data_prune.budget import allocate
from data_prune.choose import places
from data_prune.clusters import kmeans
from data_prune.conflicts import contradictions, inconsistent, settle
from data_prune.graph import dense, landmark
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.vectors import Vectors
from prune_core.errors import InputError, check_count

_SPARE = 3  # candidates scored for each row that a cluster keeps, when clusters are sampled first


@dataclass(frozen=True, kw_only=True)
class PASER(Metric):
    """Cluster the prompts, share the budget by what the pruned model lost in each cluster, and keep
    in each the rows on which it lost most for their length.

    Source: He et al., "PASER: post-training data selection for efficient pruned large language
    model recovery" (2025, arXiv:2502.12594), and the authors' code. With d the mean Jensen–Shannon
    divergence a response token between original and pruned model: a cluster's weight is the mean
    of d, and a row's place in it d / log((prompt + response)²).
    Differs: responses are what d is of (the code takes the prompts', summed); the budget is spent
    exactly (the code rounds down, and leaves what a small cluster has no rows for); conflicts are
    settled over all rows, the best first, and not cluster by cluster, so that a row's fate does not
    hang on the budget; clusters are k-means', which on real text fits known tasks better than
    PASER's diffusion map ("dense") or its near-linear form ("landmark").
    Damage alone also sends rows to what is damaged beyond repair, or irrelevant: compare with
    random rows.
    Cost: an embedding of each prompt; both models' pass over each row, unless `samples` is given.

    Needs `degradation`: (n,) numbers >= 0, or a callable of prompts and responses, such as
    `data_prune.divergence.ResponseDivergence`; NaN leaves a row unscored.

    cluster: by "kmeans", "landmark", or "dense" (up to 5,000 rows).   clusters: 10, as in the code.
    samples: rows of each cluster that are scored first, by lot. Their means share the budget, and
    then three rows, drawn, are scored for each one to keep. None scores all; 100 give a mean to
    some 5 %.
    conflict: "answers" drops the worse of two rows that ask the same and answer otherwise (see
    `contradictions`); "ccg" is the paper's graph of concepts, which refuses most rows of real data;
    "none".
    """

    name = "paser"
    embeds = "prompt"
    cluster: Literal["kmeans", "landmark", "dense"] = "kmeans"
    clusters: int = 10
    samples: int | None = None
    conflict: Literal["answers", "ccg", "none"] = "answers"

    def __post_init__(self) -> None:
        if self.cluster not in ("kmeans", "landmark", "dense"):
            raise InputError(
                f"cluster must be 'kmeans', 'landmark' or 'dense', got {self.cluster!r}."
            )
        if self.conflict not in ("answers", "ccg", "none"):
            raise InputError(f"conflict must be 'answers', 'ccg' or 'none', got {self.conflict!r}.")
        for name in ("clusters", "samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        # What is scored of sampled clusters depends on the budget.
        object.__setattr__(self, "nested", self.samples is None)

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric.

        damage: d, NaN where not scored.   efficiency: a row's place in its cluster.
        sampled: whether it counts in its cluster's mean.   gives_way: to which row, as numbered in
        the input, -1 to none; -2 where the graph of concepts refuses it.
        """
        given.pairs(self.name)
        vectors: Vectors = given.needed("vectors", self.name)
        degradation = given.needed("degradation", self.name)
        labels = self._labels(vectors, given)
        if callable(degradation):
            damage, sampled = self._asked(degradation, labels, given)
        else:
            damage = _checked(degradation, len(labels))
            sampled = np.isfinite(damage)
        efficiency = damage / np.log(_sizes(given) ** 2)
        return {
            "cluster": labels,
            "damage": damage,
            "efficiency": efficiency,
            "sampled": sampled,
            "gives_way": self._conflicts(efficiency, vectors, given),
        }

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        clusters = columns["cluster"].astype(np.int64)
        barred = {
            int(i): "its concepts are known, but not together (ccg)"
            if columns["gives_way"][i] == -2
            else f"it asks the same as row {columns['gives_way'][i]} and answers otherwise"
            for i in np.flatnonzero(columns["gives_way"] != -1)
        }
        return Ranking(
            columns["efficiency"],
            groups=clusters,
            weights=means(columns["damage"], columns["sampled"], clusters),
            barred=barred,
        )

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        cluster = columns["cluster"][i]
        if np.isnan(columns["damage"][i]):
            return f"not scored; cluster {cluster}"
        return (
            f"divergence {columns['damage'][i]:.4g} a token, {columns['efficiency'][i]:.4g} for "
            f"its length; cluster {cluster}"
        )

    def _labels(self, vectors: Vectors, given: Given) -> NDArray[np.int64]:
        k, draws = min(self.clusters, len(vectors)), given.draws("clusters")
        if self.cluster == "dense":
            return dense(vectors, k, given.seed).labels
        if self.cluster == "landmark":  # text wants more neighbours than curves do
            return landmark(vectors, draws, given.engine, k, given.seed, neighbours=10).labels
        return kmeans(vectors, k, draws, given.engine, given.seed).labels

    def _asked(
        self, degradation: Callable[..., Any], labels: NDArray[np.int64], given: Given
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """d of the rows that are asked about, and which of them are the sample."""
        n = len(labels)
        damage = np.full(n, np.nan)

        def ask(rows: NDArray[np.int64]) -> None:
            damage[rows] = asked(
                degradation, "divergence", _checked, given, self.name, rows.tolist()
            )

        if self.samples is None:
            ask(np.arange(n))
            return damage, np.isfinite(damage)
        # A cluster's rows in an order drawn: the first are the sample, the next the candidates.
        place = places(np.argsort(given.draws("sample"), kind="stable"), labels)
        sampled = place < self.samples
        ask(np.flatnonzero(sampled))
        share = allocate(given.keep, means(damage, sampled, labels), np.bincount(labels))
        more = np.maximum(self.samples, _SPARE * share)
        if rest := np.flatnonzero(~sampled & (place < more[labels])).tolist():
            ask(np.array(rest))
        return damage, sampled & np.isfinite(damage)

    def _conflicts(
        self, efficiency: NDArray[np.float64], vectors: Vectors, given: Given
    ) -> NDArray[np.int64]:
        rows, gives_way = given.rows, np.full(len(efficiency), -1)
        order = np.argsort(-efficiency, kind="stable")
        order = order[np.isfinite(efficiency[order])]
        if self.conflict == "ccg":
            gives_way[list(inconsistent(rows.texts, order))] = -2
        if self.conflict == "answers":
            prompts, responses = (
                [of[i] for i in order.tolist()] for of in (rows.prompts, rows.responses)
            )
            found = contradictions(
                prompts,
                responses,
                vectors.subset(order),
                given.draws("near")[order],
                given.engine,
                given.seed,
            )
            to, _ = settle(found, np.arange(len(order)))
            for later, earlier in to.items():
                gives_way[order[later]] = rows.positions[order[earlier]]
        return gives_way


def means(
    damage: NDArray[np.float64], counted: NDArray[np.bool_], clusters: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(K,) mean damage of each cluster over the rows that count; 0 where none does."""
    counted = counted & np.isfinite(damage)
    k = int(clusters.max()) + 1
    counts = np.bincount(clusters[counted], minlength=k)
    sums = np.bincount(clusters[counted], damage[counted], minlength=k)
    return np.divide(sums, counts, out=np.zeros(k), where=counts > 0)


def _sizes(given: Given) -> NDArray[np.float64]:
    """(n,) tokens of prompt and response, at least 2; a quarter of the characters if unknown."""
    if given.sizes is not None:
        return np.maximum(given.sizes, 2).astype(np.float64)
    return np.maximum([len(text) / 4 for text in given.rows.texts], 2.0)


def _checked(damage: Any, n: int) -> NDArray[np.float64]:
    found = np.asarray(damage, dtype=np.float64)
    if found.shape != (n,):
        raise InputError(
            f"degradation must be a number for each of {n} rows, got shape {found.shape}."
        )
    if (found < 0).any() or np.isinf(found).any():
        raise InputError(
            f"degradation must be >= 0 and finite, or NaN where it cannot be told, got "
            f"{found[(found < 0) | np.isinf(found)][0]}."
        )
    return found
