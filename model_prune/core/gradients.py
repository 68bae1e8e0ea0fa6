"""Gradients of the language-modelling loss, for criteria that need the whole model at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder, free_memory
from model_prune.core.mode import evaluating
from model_prune.core.target import MATRICES
from prune_core.errors import InputError

BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of the loss, by matrix like "layers.3.mlp.down_proj", in the weights' shapes.

    mean: gradient of the mean loss over windows.
    squares: mean over windows of the squared gradient of each; empty unless asked for.
    """

    mean: dict[str, Tensor]
    squares: dict[str, Tensor]


def gradients(
    model: Any, calibration: Calibration, *, squares: bool = False, progress: bool = True
) -> Gradients:
    """Of all matrices of all layers; the model and its `.grad` are as before afterwards.

    Windows count alike, whatever the batch. Squares take one window at a time.

    Raises InputError where the loss is not finite.
    """
    weights = _matrices(model)
    mean = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    square = {name: torch.zeros_like(total) for name, total in mean.items()} if squares else {}
    count, tokens = calibration.windows.shape
    batch = 1 if squares else max(1, BATCH_TOKENS // tokens)
    with evaluating(model), differentiable(model, weights.values()), torch.enable_grad():
        for windows, loss in _losses(model, calibration, batch, progress):
            found = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                mean[name] += gradient.float() * (windows / count)
                if squares:
                    square[name] += gradient.float().square() / count
    return Gradients(mean, square)


def curvature(
    model: Any, calibration: Calibration, direction: Mapping[str, Tensor], *, progress: bool = True
) -> dict[str, Tensor]:
    """The Hessian of the mean loss times a direction, by matrix; all else as of `gradients`."""
    weights = _matrices(model)
    product = {
        name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
    }
    count, tokens = calibration.windows.shape
    batch = max(1, BATCH_TOKENS // tokens)
    # Fused attention has no second derivative.
    with (
        evaluating(model),
        differentiable(model, weights.values()),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        for windows, loss in _losses(model, calibration, batch, progress):
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            parts = zip(weights, slopes, strict=True)
            along = torch.stack([(slope.float() * direction[name]).sum() for name, slope in parts])
            found = torch.autograd.grad(along.sum(), list(weights.values()))
            for name, part in zip(weights, found, strict=True):
                product[name] += part.float() * (windows / count)
    return product


def _matrices(model: Any) -> dict[str, nn.Parameter]:
    return {
        f"layers.{i}.{matrix}": layer.get_submodule(matrix).weight
        for i, layer in enumerate(model.model.layers)
        for matrix in MATRICES
    }


def _losses(
    model: Any, calibration: Calibration, batch: int, progress: bool
) -> Iterator[tuple[int, Tensor]]:
    """Of every batch of windows: how many they are, and their mean loss."""
    device, shown = next(model.parameters()).device, None if progress else True
    for windows in tqdm(
        torch.split(calibration.windows, batch), desc="gradients", unit="batch", disable=shown
    ):
        ids = windows.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not loss.isfinite():
            raise InputError(
                f"The loss on the calibration text is {loss.item()}: look for NaN or infinity in "
                f"the model's weights, and load it in float32."
            )
        yield len(windows), loss


def check_memory(decoder: Decoder, *, squares: bool, progress: bool) -> None:
    """Say what gradients take before anything is loaded; raise InputError if there is not enough.

    That is the model, unless it is loaded as it computes; the gradients of one batch and their
    mean, of the size of the layers' matrices; and with squares as much again. Activations come on
    top.
    """
    matrices = sum(each.weights for each in decoder.dims)
    sums = matrices * 4 * (2 if squares else 1) + matrices * decoder.dtype.itemsize
    needed, free = decoder.to_load + sums, free_memory(decoder.device)
    said = (
        f"Gradients of '{decoder.name}' need the whole model: {needed / 2**30:.1f} GiB beside what "
        f"is loaded, and the activations of {BATCH_TOKENS} tokens."
    )
    if free is not None and free < needed:
        raise InputError(
            f"{said} {free / 2**30:.1f} GiB are free: take a method that goes layer by layer, such "
            f"as flap or cfsp, or a larger machine."
        )
    if progress:
        tqdm.write(said, file=sys.stderr)


@contextmanager
def differentiable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients of these weights alone, while the block runs."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, was in asked:
            parameter.requires_grad_(was)
