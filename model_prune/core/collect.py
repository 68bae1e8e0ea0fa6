"""The calibration pass: through a model layer by layer, gathering what methods ask for.

One layer is in memory at a time, besides the activations between layers. Which inputs a layer
sees differs between papers, so it is named:

    dense    those of the whole model; nothing is pruned until all layers are seen
    layer    those that the pruned layers before it give; a layer is pruned at once (Wanda,
             SparseGPT), from statistics of its own dense weights
    staged   the same, and within a layer q, k, v are pruned before o's inputs are gathered, and so
             on (SparseGPT's "true sequential"); each matrix meets each token only once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.statistics import Statistic
from model_prune.core.target import SITES
from model_prune.core.work import Tensors, Work, trim
from prune_core.errors import InputError

Order = Literal["dense", "layer", "staged"]
Watched = Mapping[str, Mapping[str, Statistic]]
BATCH_TOKENS = 2048
KEPT = 1 << 30  # bytes of a matrix's inputs that "staged" keeps; more are computed again


@dataclass(frozen=True)
class Step:
    """What a method does with one layer.

    watch(i, layer): the statistics it wants of layer i, by site and name. Besides SITES there is
    "block", whose statistics take the layer's inputs and outputs side by side, float32
    [windows, tokens, 2 · hidden]; under "dense" only.
    solve(i, layer, site, statistics): what comes of a site, as tensors; the layer is not changed.
    apply(i, layer, tensors): change the layer as `solve` decided. Not called under "dense".
    """

    watch: Callable[[int, nn.Module], Watched]
    solve: Callable[[int, nn.Module, str, Mapping[str, Any]], Tensors]
    apply: Callable[[int, nn.Module, Tensors], None] = lambda i, layer, tensors: None


def walk(
    decoder: Decoder,
    calibration: Calibration,
    step: Step,
    *,
    order: Order,
    work: Work,
    progress: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    until: int | None = None,
) -> None:
    """Take every layer, or those before `until`, through `step`; results are in `work`, by layer.

    Layers that `work` holds already are only passed through, pruned as they were, so that a pass
    that was stopped goes on with the same activations.

    Raises InputError for activations that are not finite, naming the layer.
    """
    layers = range(len(decoder.dims))[:until]
    if all(i in work for i in layers):
        return
    with torch.no_grad():
        run = _Pass(decoder, calibration, batch_tokens)
        for i in tqdm(layers, desc="calibrating", unit="layer", disable=None if progress else True):
            layer = decoder.layer(i)
            if i in work:
                if order != "dense":
                    step.apply(i, layer, work[i])
                run.forward(i, layer)
            else:
                sweep = {"dense": run.dense, "layer": run.layer, "staged": run.staged}[order]
                work[i] = sweep(i, layer, step)
            del layer  # before the next is made, so that there is never more than one
            trim()


class _Pass:
    """The activations between two layers, and the ways to take a layer over them."""

    def __init__(self, decoder: Decoder, calibration: Calibration, batch_tokens: int) -> None:
        windows = calibration.windows
        count, tokens = windows.shape
        self._rotary = decoder.rotary(tokens)
        sizes = (count, tokens, decoder.config.hidden_size)
        self._hidden = torch.empty(sizes, dtype=decoder.dtype, device=decoder.device)
        for part, ids in zip(torch.split(self._hidden, 64), torch.split(windows, 64), strict=True):
            part.copy_(decoder.embed(ids))
        per_batch = max(1, batch_tokens // tokens)
        self._batches = [slice(i, min(i + per_batch, count)) for i in range(0, count, per_batch)]

    def forward(self, i: int, layer: nn.Module) -> None:
        """Through the layer as it is."""
        for batch in self._batches:
            self._advance(batch, layer, {})
        self._check(i)

    def dense(self, i: int, layer: nn.Module, step: Step) -> Tensors:
        watched = step.watch(i, layer)
        block = watched.get("block", {})
        for batch in self._batches:
            before = self._hidden[batch].clone() if block else None
            self._advance(batch, layer, watched)
            for statistic in block.values():
                assert before is not None
                statistic.update(torch.cat([before, self._hidden[batch]], -1).float())
        self._check(i)
        result: Tensors = {}
        for site, statistics in watched.items():
            result |= _solve(i, layer, step, site, statistics)
        return result

    def layer(self, i: int, layer: nn.Module, step: Step) -> Tensors:
        watched = step.watch(i, layer)
        for batch in self._batches:
            for site, x in _inputs(layer, self._hidden[batch], self._rotary):
                _observe(watched, site, x)
        result: Tensors = {}
        for site in SITES:
            if site in watched:
                result |= _solve(i, layer, step, site, watched[site])
        step.apply(i, layer, result)
        self.forward(i, layer)
        return result

    def staged(self, i: int, layer: Any, step: Step) -> Tensors:
        watched = step.watch(i, layer)
        result: Tensors = {}

        def prune(site: str) -> None:
            if site in watched:
                tensors = _solve(i, layer, step, site, watched[site])
                step.apply(i, layer, tensors)
                result.update(tensors)

        for batch in self._batches:
            _observe(watched, "attn_in", layer.input_layernorm(self._hidden[batch]))
        prune("attn_in")
        attended = self._observed(
            watched,
            "attn_out",
            lambda hidden: attend(layer, layer.input_layernorm(hidden), self._rotary),
        )
        prune("attn_out")
        for batch in self._batches:
            self._hidden[batch] += layer.self_attn.o_proj(attended(batch))
            _observe(watched, "mlp_in", layer.post_attention_layernorm(self._hidden[batch]))
        prune("mlp_in")
        gated = self._observed(
            watched,
            "mlp_mid",
            lambda hidden: middle(layer, layer.post_attention_layernorm(hidden)),
        )
        prune("mlp_mid")
        for batch in self._batches:
            self._hidden[batch] += layer.mlp.down_proj(gated(batch))
        self._check(i)
        return result

    def _observed(
        self, watched: Watched, site: str, compute: Callable[[Tensor], Tensor]
    ) -> Callable[[slice], Tensor]:
        """Gather a site's inputs; what is returned gives those of a batch once more."""
        kept: dict[int, Tensor] = {}
        for batch in self._batches:
            x = compute(self._hidden[batch])
            _observe(watched, site, x)
            if x.nbytes * len(self._batches) <= KEPT:
                kept[batch.start] = x

        def again(batch: slice) -> Tensor:
            if batch.start in kept:
                return kept.pop(batch.start)
            return compute(self._hidden[batch])

        return again

    def _advance(self, batch: slice, layer: Any, watched: Watched) -> None:
        """The hidden states of a batch through the layer, in place."""
        hidden = self._hidden[batch]
        for site, x in _inputs(layer, hidden, self._rotary, into=hidden):
            _observe(watched, site, x)

    def _check(self, i: int) -> None:
        if not self._hidden.isfinite().all():
            raise InputError(
                f"The activations after layer {i} are not finite: look for NaN or infinity in its "
                f"weights, and compute in float32."
            )


def _inputs(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], into: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each site with its input [windows, tokens, in]; the layer's output goes `into` a tensor.

    Without `into` the last matrix, whose output nobody reads, is not multiplied. A mixture of
    experts has no "mlp_mid": each expert has its own.
    """
    x = layer.input_layernorm(hidden)
    yield "attn_in", x
    x = attend(layer, x, rotary)
    yield "attn_out", x
    hidden = hidden + layer.self_attn.o_proj(x)
    x = layer.post_attention_layernorm(hidden)
    yield "mlp_in", x
    if hasattr(layer.mlp, "experts"):
        if into is not None:
            torch.add(hidden, layer.mlp(x), out=into)
        return
    x = middle(layer, x)
    yield "mlp_mid", x
    if into is not None:
        torch.add(hidden, layer.mlp.down_proj(x), out=into)


def attend(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The heads' outputs side by side, [windows, tokens, heads · head_dim]: o's input."""
    attention = layer.self_attn
    o_proj, attention.o_proj = attention.o_proj, nn.Identity()
    try:
        heads, _ = attention(x, position_embeddings=rotary, attention_mask=None)
    finally:
        attention.o_proj = o_proj
    result: Tensor = heads
    return result


def middle(layer: Any, x: Tensor) -> Tensor:
    """act(gate) * up, [windows, tokens, neurons]: down's input."""
    mlp = layer.mlp
    result: Tensor = mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x))
    return result


def _observe(watched: Watched, site: str, x: Tensor) -> None:
    for statistic in watched.get(site, {}).values():
        statistic.update(x.flatten(0, -2).float())


def _solve(
    i: int, layer: nn.Module, step: Step, site: str, statistics: Mapping[str, Statistic]
) -> Tensors:
    for statistic in statistics.values():
        if not statistic.total().isfinite().all():
            raise InputError(
                f"The inputs of {', '.join(SITES.get(site, (site,)))} in layer {i} are not finite: "
                f"look for NaN or infinity in the layer's weights, and compute in float32."
            )
    return step.solve(i, layer, site, statistics)
