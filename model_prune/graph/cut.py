"""Cutting for real: a layer's tensors without what its plan takes away.

Both functions are pure. Names are relative to the layer ("self_attn.q_proj.weight"), and units are
those of core/target.py: a KV group is its rows of k and v, the rows of q of the query heads that
read them, and their columns of o; a neuron is a row of gate and up and a column of down. What is
not named there (norms; q_norm and k_norm of Qwen3, which all heads share) stays as it is. An expert
is its part of the stacked FFNs, as transformers holds them, and its row of the router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, UNITS, Dims, Family
from model_prune.core.units import MEMBERS, places
from prune_core.errors import InputError, did_you_mean

# [experts, …] each: rows of the router, gates and ups one under the other, downs.
STACKED = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BIASED = ("self_attn.o_proj", "mlp.down_proj")  # which write the residual stream


def prune_state(state: Mapping[str, Tensor], plan: LayerPlan, dims: Dims) -> dict[str, Tensor]:
    """The tensors of a layer after its plan: weights, masks, biases, then units.

    state: by relative name, with the shapes of `dims`; it is not changed, and a tensor that the
    plan does not touch is returned itself. Each result has the dtype and device that the tensor
    had; a new bias those of its weight. Biases are summed in float32. `plan.removed` is not looked
    at: a removed layer has no tensors.

    Raises InputError for a plan or a state whose names or shapes do not fit, and for units that
    `dims_after` refuses.
    """
    kept = {family: _kept(plan, family, dims) for family in plan.units}
    if dims.experts:
        return _keep_experts(state, plan, dims)
    for part in (plan.weights, plan.masks):
        _check_names(part, MATRICES)
    _check_names(plan.biases, BIASED)
    after = dict(state)
    for matrix in MATRICES:
        name, shape = f"{matrix}.weight", dims.shape(matrix)
        _check_shape(f"The layer's '{name}'", after.get(name), shape)
        if matrix in plan.weights:
            _check_shape(f"The plan's weight of '{matrix}'", plan.weights[matrix], shape)
            after[name] = plan.weights[matrix].to(after[name])
        if matrix in plan.masks:
            _check_shape(f"The plan's mask of '{matrix}'", plan.masks[matrix], shape)
            after[name] = after[name].masked_fill(~plan.masks[matrix].to(after[name].device), 0)
    for matrix, bias in plan.biases.items():
        _check_shape(f"The plan's bias of '{matrix}'", bias, (dims.hidden,))
        weight, old = after[f"{matrix}.weight"], after.get(f"{matrix}.bias")
        total = bias.to(weight.device, torch.float32)
        after[f"{matrix}.bias"] = (total if old is None else total + old).to(weight.dtype)
    for family, units in kept.items():
        for matrix, axis in MEMBERS[family].items():
            _keep(after, matrix, places(family, matrix, dims, units), axis)
    return after


def no_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the output biases that a layer lacks, where other layers got some.

    state: as of `prune_state`.
    """
    missing = (matrix for matrix in BIASED if f"{matrix}.bias" not in state)
    return {
        f"{matrix}.bias": torch.zeros_like(state[f"{matrix}.weight"][:, 0]) for matrix in missing
    }


def dims_after(dims: Dims, plan: LayerPlan) -> Dims:
    """The sizes of a layer after its plan.

    Raises InputError for kept units that are not whole numbers, are not in ascending order, lie
    outside the layer, or are none at all.
    """
    left = {family: len(_kept(plan, family, dims)) for family in plan.units}
    if dims.experts:
        return replace(dims, experts=left.get("expert", dims.experts))
    groups, neurons = (left.get(family, dims.count(family)) for family in UNITS)
    return replace(dims, kv_groups=groups, heads=groups * dims.group, neurons=neurons)


def _kept(plan: LayerPlan, family: Family, dims: Dims) -> Tensor:
    _check_names(plan.units, dims.units)
    kept, count = plan.units[family], dims.count(family)
    if kept.ndim != 1 or kept.dtype != torch.int64:
        raise InputError(
            f"The kept units of '{family}' must be one row of int64, got {kept.dtype} of shape "
            f"{tuple(kept.shape)}: give their numbers."
        )
    if not len(kept):
        raise InputError(
            f"The plan keeps no '{family}' of a layer's {count}: keep one at least, or remove the "
            f"whole layer."
        )
    if bool((kept.diff() <= 0).any()) or kept[0] < 0 or kept[-1] >= count:
        raise InputError(
            f"The kept units of '{family}' must be in ascending order, each once, in "
            f"[0, {count - 1}]; got {kept[:8].tolist()}{' …' if len(kept) > 8 else ''} up to "
            f"{int(kept.max())}."
        )
    return kept


def _keep_experts(state: Mapping[str, Tensor], plan: LayerPlan, dims: Dims) -> dict[str, Tensor]:
    if plan.weights or plan.masks or plan.biases:
        raise InputError(
            "The plan changes weights of a mixture of experts, of which only whole experts can go: "
            "plan with a method of the family 'experts'."
        )
    after = dict(state)
    for name in STACKED:
        if name not in after or len(after[name]) != dims.experts:
            raise InputError(
                f"The layer's '{name}' must be of {dims.experts} experts: the plan and the layer "
                f"belong to different models."
            )
        if "expert" in plan.units:
            index = plan.units["expert"].to(after[name].device)
            after[name] = after[name].index_select(0, index)
    return after


def _keep(state: dict[str, Tensor], matrix: str, index: Tensor, axis: int) -> None:
    weight = state[f"{matrix}.weight"]
    index = index.to(weight.device)
    state[f"{matrix}.weight"] = weight.index_select(axis, index)
    if axis == 0 and f"{matrix}.bias" in state:
        state[f"{matrix}.bias"] = state[f"{matrix}.bias"].index_select(0, index)


def _check_names(given: Iterable[str], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"The plan names '{name}'. {did_you_mean(name, known)}")


def _check_shape(what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise InputError(f"{what} is missing: give all tensors of the layer.")
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{what} must have the shape {shape}, got {tuple(tensor.shape)}: the plan and the "
            f"layer belong to different models."
        )
