"""Masks beside the model: weights stay real parameters, and what is pruned is held at zero.

Names, checkpoints, tied weights and gradients of what is pruned stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_prune.core.plan import LayerPlan
from model_prune.core.target import UNITS, Dims
from model_prune.core.units import READER, places
from prune_core.errors import InputError

Masks = Mapping[str, Tensor]


def element_masks(layers: Sequence[LayerPlan]) -> dict[str, Tensor]:
    """The masks of a plan by parameter, "model.layers.3.mlp.down_proj.weight"."""
    return {
        f"model.layers.{i}.{matrix}.weight": mask
        for i, plan in enumerate(layers)
        for matrix, mask in plan.masks.items()
    }


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Zero what the masks leave out; raises InputError for a name or shape the model has not.

    All masks are applied, or none.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise InputError(
                f"The mask of '{name}', {tuple(mask.shape)}, fits no parameter of the model: masks "
                f"go with the model that they were made for."
            )
    for name, mask in masks.items():
        parameters[name].mul_(mask.to(parameters[name].device))


def hold(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Keep what is pruned at zero through training; `.remove()` of what is returned ends it.

    After every step of the optimiser the masked weights are zeroed again, and so is what the
    optimiser remembers of them, which would move them at the next step.
    """
    apply_masks(model, masks)
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        apply_masks(model, masks)
        for name, mask in masks.items():
            for value in optimizer.state.get(parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask.to(value.device))

    return optimizer.register_step_post_hook(after)


@contextmanager
def units_masked(model: Any, dims: Sequence[Dims], layers: Sequence[LayerPlan]) -> Iterator[None]:
    """While the block runs, cut units give nothing: the model computes what the cut one would.

    Biases and new weights of the plans are not looked at. Raises InputError for experts, whose
    absence changes what the router gives to the others.
    """
    if any("expert" in plan.units for plan in layers):
        raise InputError("Experts cannot be masked: apply the plan to a copy of the model.")
    handles = []
    for layer, sizes, plan in zip(model.model.layers, dims, layers, strict=True):
        for family in UNITS:
            if family in plan.units:
                reader = layer.get_submodule(READER[family])
                mask = reader.weight.new_zeros(reader.weight.shape[1])
                mask[places(family, READER[family], sizes, plan.units[family])] = 1
                handles.append(reader.register_forward_pre_hook(_times(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(mask: Tensor) -> Any:
    return lambda module, inputs: (inputs[0] * mask,)
