"""EL2N: a row is hard as far as a young model's probabilities are from its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.metric import Columns, Difficulty, Given
from data_prune.training_log import early
from prune_core.errors import check_count


@dataclass(frozen=True, kw_only=True)
class EL2N(Difficulty):
    """Keep rows with a large error ‖softmax(f(x)) − onehot(y)‖₂ early in training, or a small one.

    Source: Paul et al., "Deep learning on a data diet" (NeurIPS 2021, arXiv:2107.07075),
    section 2: the expectation over initialisations, for which the paper takes the mean of ten runs
    (`training_log.runs`); one run works too and is noisier. Mislabelled rows have the largest
    errors of all: where there may be many, keep the easy end, or use CCS.
    Cost: the first epochs of training, once a run.

    epoch: after which the error is taken, from 1. By default the paper's 20, of 200, or the last
    one of a shorter log.
    """

    name = "el2n"
    epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch is not None:
            check_count("epoch", self.epoch)

    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """See Difficulty."""
        return early(given, "el2n", self.name, self.epoch)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"error norm {columns['difficulty'][i]:.3f} early in training"
