"""OWL: layers with more outlying weights keep more; which weights go is another method's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from model_prune.core.allocate import around, check_least
from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, walk
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise
from model_prune.core.plan import LayerPlan
from model_prune.core.statistics import SquaredNorm
from model_prune.core.target import SITES, place_of
from model_prune.core.work import Work
from model_prune.method import Elements
from model_prune.methods.magnitude import Magnitude
from model_prune.methods.sparsegpt import SparseGPT
from model_prune.methods.wanda import Wanda
from prune_core.errors import InputError

_BASES: dict[str, type[Elements]] = {"wanda": Wanda, "sparsegpt": SparseGPT, "magnitude": Magnitude}


@dataclass(frozen=True, kw_only=True)
class OWL(Elements):
    """Share the zeros out over the layers by their outliers, then prune with another method.

    A layer's outlier share D is that of its scores |W_ij| · ‖x_j‖ above M times their mean, on
    the dense model's inputs. Scaled to [0, 2λ] and centred, it is taken from the layer's sparsity.

    Source: Yin et al., "Outlier weighed layerwise sparsity (OWL)" (2023, arXiv:2310.05175),
    section 4; M = 5 and λ = 0.08 as its README has them for LLaMA.
    Defaults: 128 windows of 2,048 tokens.
    Differs: layers that are all alike get the same share, where the code divides by zero; shares
    that would leave [0, 1) are clipped and the total stays exact.
    Cost: one forward pass more than the method that prunes.

    base: the method that prunes, with its own defaults.
    """

    name = "owl"
    windows = 128
    tokens = 2048
    base: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("outlier", self.outlier, 0)
        check_least("spread", self.spread, 0)
        if self.pattern or self.sparsities:
            raise InputError(
                "OWL finds each layer's share of zeros, so pattern and sparsities cannot say it "
                "too: leave them out."
            )

    def recipe(self, decoder: Decoder) -> _Weighed:
        """See Method."""
        return _Weighed(self)

    def outliers(self, scores: Sequence[torch.Tensor]) -> float:
        """D of one layer: the share of its matrices' scores above `outlier` times their mean."""
        count = sum(part.numel() for part in scores)
        bound = self.outlier * sum(float(part.double().sum()) for part in scores) / count
        return sum(int((part > bound).sum()) for part in scores) / count


@dataclass(frozen=True)
class _Weighed:
    method: OWL

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        method = self.method
        assert calibration is not None, "checked by the caller"
        norms = work.part("norms")
        step = Step(
            lambda i, layer: {site: {"inputs": SquaredNorm()} for site in SITES},
            lambda i, layer, site, found: {site: found["inputs"].norm},
        )
        walk(decoder, calibration, step, order="dense", work=norms, progress=progress)
        targets = method.shares(decoder)
        layers = sorted({place_of(name)[0] for name in targets})
        shares = around(
            [method.outliers(self._scores(decoder, i, norms[i], targets)) for i in layers],
            method.share,
            method.spread,
        )
        base = _BASES[method.base](
            targets=method.targets,
            sparsities={f"layers.{i}.*": float(s) for i, s in zip(layers, shares, strict=True)},
        )
        recipe = base.recipe(decoder)
        assert isinstance(recipe, Elementwise)
        return recipe.layers(decoder, calibration, work.part("pruned"), progress)

    @staticmethod
    def _scores(
        decoder: Decoder, i: int, norms: Mapping[str, Any], targets: Mapping[str, float]
    ) -> list[torch.Tensor]:
        state = decoder.state(i)
        return [
            state[f"{matrix}.weight"].float().abs()
            * norms[site].to(state[f"{matrix}.weight"].device)
            for site, matrices in SITES.items()
            for matrix in matrices
            if f"layers.{i}.{matrix}" in targets
        ]
