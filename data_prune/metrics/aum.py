"""AUM, the area under the margin: mislabelled rows are those that training keeps arguing with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prune.metric import Columns, Difficulty, Given
from data_prune.training_log import mean, recorded
from prune_core.errors import check_count


@dataclass(frozen=True, kw_only=True)
class AUM(Difficulty):
    """Keep rows whose margin stays small or negative in training, or those of large margin.

    Source: Pleiss et al., "Identifying mislabeled data using the area under the margin ranking"
    (NeurIPS 2020, arXiv:2001.10528): the mean over epochs of the label's logit less the largest
    other one. Difficulty is its negative. Rows of the lowest AUM are mislabelled or ambiguous, so
    keep="easy" is the paper's use; its threshold, by an extra class of rows that are mislabelled
    on purpose, is not here: the budget decides.
    Differs: several runs are averaged, and epochs in which a row was not seen are left out.
    Cost: a training run, or the first half of one.

    epochs: the first ones, of which the mean is taken; all by default. The authors train half as
    long for it as for a model (150 epochs of 300), before wrong labels are learned by heart.
    """

    name = "aum"
    epochs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None:
            check_count("epochs", self.epochs)

    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """See Difficulty."""
        margins = recorded(given, "margin", self.name)[:, : self.epochs]
        return -mean(mean(margins, axis=1), axis=0)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"area under the margin {-columns['difficulty'][i]:.3g}"
