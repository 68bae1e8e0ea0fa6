"""PreMoe: of every layer's experts those stay that a task's tokens are sent to."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, Watched, walk
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.work import Tensors, Work
from model_prune.method import Method
from prune_core.errors import InputError

Score = Literal["probability", "frequency", "random"]


@dataclass(frozen=True, kw_only=True)
class PreMoe(Method):
    """Keep the experts of highest expected selection score on a task's text, as many a layer.

    Source: Pei et al., "PreMoe: lightening MoEs on constrained memory by expert pruning and
    retrieval" (2025, arXiv:2505.17639): TCESS, the mean over tokens of what the router says of an
    expert where it is among the `top` of the token and not below `threshold`.
    Defaults: half of the experts; the model's own number of experts a token, no threshold (the
    code has 1, and none). The code reads 2,048 windows of 2,048 tokens; here 128 are.
    Differs: the score is the router's probability, not its raw logit: negative logits would put an
    expert that is used below one that never is.
    Cost: one forward pass over the calibration text.

    keep: experts that stay in every layer.
    score: "frequency" counts the tokens that choose an expert; "random" draws, by `seed`.
    top: of a token's experts, how many count; those that the model takes by default.
    threshold: a token does not count for an expert whose share among these `top` is below.
    """

    name = "premoe"
    windows = 128
    tokens = 2048
    mixtures: ClassVar[bool] = True
    keep: int | None = None
    score: Score = "probability"
    top: int | None = None
    threshold: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("top", self.top)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold is a probability in [0, 1), got {self.threshold:g}.")

    def recipe(self, decoder: Decoder) -> PreMoe:
        """See Method; raises InputError for fewer experts than a token goes to, or too many."""
        self.kept(decoder)
        return self

    def kept(self, decoder: Decoder) -> int:
        """How many experts stay in each layer; errors as of `recipe`."""
        dims = next(each for each in decoder.dims if each.experts)
        keep = max(dims.experts // 2, dims.active) if self.keep is None else self.keep
        if not dims.active <= keep <= dims.experts:
            raise InputError(
                f"The model sends a token to {dims.active} of {dims.experts} experts, so keep "
                f"must be between these numbers, got {keep}."
            )
        if self.top is not None and self.top > dims.experts:
            raise InputError(f"top counts {self.top} experts a token, of {dims.experts}: lower it.")
        return keep

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        """What each layer loses."""
        scores = self.scores(decoder, calibration, work, progress)
        return self.choose(decoder, scores)

    def scores(
        self,
        decoder: Decoder,
        calibration: Calibration | None,
        work: Work,
        progress: bool,
        until: int | None = None,
    ) -> list[Tensors]:
        """Of every layer (before `until`): "probability" and "frequency", float64 [experts].

        Means over tokens: what `top` and `threshold` let through, and how often the model itself
        chooses an expert. A layer that is no mixture has nothing.
        """
        assert calibration is not None, "checked by the caller"
        step = Step(self._watch, lambda i, layer, site, found: found["selection"].means())
        walk(decoder, calibration, step, order="dense", work=work, progress=progress, until=until)
        return [work[i] for i in range(len(decoder.dims))[:until]]

    def choose(self, decoder: Decoder, scores: Sequence[Mapping[str, Tensor]]) -> list[LayerPlan]:
        """The plan of every layer, by its scores."""
        keep, plans, unused = self.kept(decoder), [], []
        for i, (dims, found) in enumerate(zip(decoder.dims, scores, strict=True)):
            if not dims.experts:
                plans.append(LayerPlan())
                continue
            idle = (found["frequency"] == 0).nonzero().flatten().tolist()
            if idle:
                unused.append(f"layer {i}: {', '.join(map(str, idle))}")
            best = ranking(self._scores(i, found))[:keep]
            plans.append(LayerPlan(units={"expert": best.sort().values}))
        if unused:
            logging.getLogger(__name__).warning(
                "No token of the calibration text is sent to some experts, which rank last: %s.",
                "; ".join(unused),
            )
        return plans

    def _watch(self, i: int, layer: Any) -> Watched:
        if not hasattr(layer.mlp, "experts"):
            return {}
        return {"mlp_in": {"selection": Selection(layer.mlp.gate, self.top, self.threshold)}}

    def _scores(self, i: int, found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if self.score == "random":
            stream = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {i}".encode()))
            return (torch.rand(len(found["frequency"]), generator=stream),)
        if self.score == "frequency":
            return found["frequency"], found["probability"]
        return found["probability"], found["frequency"]


def ranking(scores: Sequence[Tensor]) -> Tensor:
    """Experts from best to last, int64: by the first score, ties by the next, then by position."""
    order = torch.arange(len(scores[0]))
    for score in reversed(scores):
        order = order[score[order].argsort(descending=True, stable=True)]
    return order


class Selection:
    """What a router says of its experts over the tokens that it sends to them.

    router: of transformers; it gives logits, weights and chosen experts.
    top, threshold: as of PreMoe.
    """

    def __init__(self, router: Any, top: int | None = None, threshold: float = 0.0) -> None:
        self._router, self._top, self._threshold = router, top, threshold
        self._tokens = 0
        self._sums = torch.zeros(2, router.num_experts, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """x: the mixture's inputs, float32 [tokens, hidden]."""
        logits, _, chosen = self._router(x.to(self._router.weight.dtype))
        probabilities = logits.float().softmax(-1)
        highest, experts = probabilities.topk(self._top or chosen.shape[1], -1)
        counts = highest / highest.sum(-1, keepdim=True) >= self._threshold
        selected = torch.zeros_like(probabilities).scatter_(-1, experts, highest * counts)
        often = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
        self._tokens += len(x)
        self._sums += torch.stack([selected.double().sum(0), often.double().sum(0)]).cpu()

    def total(self) -> Tensor:
        """float64 [2, experts]: sums of probabilities, and of choices."""
        return self._sums

    def means(self) -> Tensors:
        """Over all tokens, float64 [experts] each."""
        probability, frequency = self._sums / self._tokens
        return {"probability": probability.clone(), "frequency": frequency.clone()}
