"""RDS+: rows that lie near those of a target, each of which chooses in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import shards
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from data_prune.vectors import Vectors
from prune_core.errors import InputError

_TARGETS = 16  # that are ranked at once: n times as many cosines are in memory


@dataclass(frozen=True, kw_only=True)
class RDS(Metric):
    """Keep the rows nearest to the target's, which choose in rounds: each its next nearest row.

    In round r the targets, one after the other, name the row that is their r-th nearest by cosine;
    one that is kept already uses the turn up. So a row's place is fixed by the first turn in which
    anyone names it, which is its rank to that target: the order is the same for all budgets.

    Source: RDS+ of Ivison et al., "Large-scale data selection for instruction tuning" (2025,
    arXiv:2503.01807), by its code: the selection "max" for one target set. Their vectors are the
    position-weighted means of a language model's hidden states: pass
    `data_prune.causal.Representations` as the encoder; another encoder does, too.
    Differs: equal cosines are settled by the rows' order, and targets that are rows choose in the
    order of their content, so that no input's order matters. Theirs holds all targets · n cosines.
    Cost: an embedding of each row and target, targets · n · (width + log n) operations, and
    16 n numbers of memory a worker.
    """

    name = "rds"
    embeds = "text"

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric. Raises InputError for targets of another width, or that have no direction."""
        vectors: Vectors = given.needed("vectors", self.name)
        targets: Vectors = given.needed("target_vectors", self.name)
        _check(vectors, targets)
        places = targets.positions if given.target is None else given.target.positions
        turn = np.full(len(vectors), np.iinfo(np.int64).max)
        cosine = np.zeros(len(vectors))
        work = _Turns(vectors, targets)
        for turns, cosines in given.engine.map(work, shards(len(targets), _TARGETS), "targets"):
            sooner = turns < turn
            turn[sooner], cosine[sooner] = turns[sooner], cosines[sooner]
        return {
            "turn": turn,
            "round": turn // len(targets) + 1,
            "target": places[turn % len(targets)],
            "cosine": cosine,
        }

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        return Ranking(-columns["turn"].astype(np.float64))

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return (
            f"number {columns['round'][i]:,} of the rows nearest to row {columns['target'][i]} of "
            f"the target, cosine {columns['cosine'][i]:.3f}"
        )


class _Turns:
    """The first turn in which some of the targets name each row, and the cosine to that one."""

    def __init__(self, vectors: Vectors, targets: Vectors) -> None:
        self.vectors, self.targets = vectors, targets

    def __call__(self, block: slice) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        n, of = len(self.vectors), self.targets[block].T
        cosines = np.concatenate([self.vectors[rows] @ of for rows in shards(n)])
        turns = np.full(n, np.iinfo(np.int64).max)
        nearest = np.zeros(n, dtype=np.int64)
        place = np.empty(n, dtype=np.int64)
        for j in range(of.shape[1]):
            place[np.argsort(-cosines[:, j], kind="stable")] = np.arange(n)
            named = place * len(self.targets) + block.start + j
            sooner = named < turns
            turns[sooner], nearest[sooner] = named[sooner], j
        return turns, cosines[np.arange(n), nearest]


def _check(vectors: Vectors, targets: Vectors) -> None:
    if not len(targets):
        raise InputError("The target has no rows: give some of what the model shall be good at.")
    if targets.width != vectors.width:
        raise InputError(
            f"The target's vectors have {targets.width} numbers and those of the rows "
            f"{vectors.width}: make both with one encoder."
        )
    if unfit := targets.unfit():
        place, why = next(iter(unfit.items()))
        raise InputError(
            f"Vector {place} of the target has no direction: {why}. Leave that row out."
        )
