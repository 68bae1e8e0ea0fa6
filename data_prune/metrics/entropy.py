"""Entropy: a row is hard as far as a trained model wavers between the classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.metric import Columns, Difficulty, Given
from data_prune.training_log import mean, recorded


@dataclass(frozen=True, kw_only=True)
class Entropy(Difficulty):
    """Keep rows of which the trained model is least sure, or surest; labels play no part.

    Source: Coleman et al., "Selection via proxy: efficient data selection for deep learning"
    (ICLR 2020, arXiv:1906.11829): −Σ p log p of the model's probabilities, here in nats, as it
    was when the row was last seen; the mean over runs.
    Cost: a training run, whose model may be a small proxy; of its log only the end is read.
    """

    name = "entropy"

    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """See Difficulty."""
        entropy = recorded(given, "entropy", self.name)
        last = entropy[:, -1].copy()
        for before in np.moveaxis(entropy[:, -2::-1], 1, 0):
            last = np.where(np.isnan(last), before, last)
        return mean(last, axis=0)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"entropy {columns['difficulty'][i]:.3g} nats after training"
