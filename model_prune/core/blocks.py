"""Removing whole layers, chosen by what they do to the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, walk
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.statistics import Statistic
from model_prune.core.work import Work


@dataclass(frozen=True)
class Blocks:
    """statistic: of a layer's input and output.   choose: layers to remove, by its totals."""

    statistic: Callable[[], Statistic]
    choose: Callable[[Sequence[Tensor]], Sequence[int]]

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        """What each layer loses: all or nothing."""
        assert calibration is not None, "checked by the caller"
        step = Step(
            lambda i, layer: {"block": {"signal": self.statistic()}},
            lambda i, layer, site, found: {"signal": found["signal"].total()},
        )
        walk(decoder, calibration, step, order="dense", work=work, progress=progress)
        layers = range(len(decoder.dims))
        removed = set(self.choose([work[i]["signal"] for i in layers]))
        return [LayerPlan(removed=i in removed) for i in layers]
