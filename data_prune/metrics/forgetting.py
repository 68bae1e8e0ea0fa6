"""Forgetting events: a row is hard as often as training learns it and loses it again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.metric import Columns, Difficulty, Given
from data_prune.training_log import mean, recorded
from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Forgetting(Difficulty):
    """Keep rows that were forgotten often, or the unforgettable ones.

    Source: Toneva et al., "An empirical study of example forgetting during deep neural network
    learning" (ICLR 2019, arXiv:1812.05159), algorithm 1: a row is forgotten when it is classified
    rightly at one presentation and wrongly at the next. A row that was never learned counts as
    forgotten in every epoch, as in the authors' code (the paper calls it infinite). Runs are
    averaged, where the code adds them up, which ranks alike.
    Differs where a row was not seen in an epoch: it keeps its last state.
    For classifiers: of a language model's row, some tokens are right and others not.
    Cost: a whole training run.
    """

    name = "forgetting"

    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """See Difficulty."""
        correct = recorded(given, "correct", self.name)
        if not np.isin(correct[~np.isnan(correct)], (0, 1)).all():
            raise InputError(
                "The metric 'forgetting' needs a log whose 'correct' is 0 or 1, as a classifier's "
                "is: for a language model take another metric, like el2n or aum."
            )
        return mean(events(correct), axis=0)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"forgotten {columns['difficulty'][i]:.3g} times"


def events(correct: NDArray[np.float32]) -> NDArray[np.float64]:
    """(runs, n) forgetting events, from (runs, epochs, n) 0, 1 or NaN; NaN for rows never seen."""
    state = np.zeros(correct[:, 0].shape, dtype=bool)
    learned, count = state.copy(), np.zeros(state.shape)
    for now in np.moveaxis(correct, 1, 0):
        right = np.where(np.isnan(now), state, now == 1)
        count += state & ~right
        learned |= right
        state = right
    ran = (~np.isnan(correct).all(axis=2)).sum(axis=1, keepdims=True)  # a run's own epochs
    count = np.where(learned, count, ran)
    count[np.isnan(correct).all(axis=1)] = np.nan
    return count
