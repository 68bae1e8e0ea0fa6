"""Units of a layer and the rows and columns that each holds: what goes together when it is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from model_prune.core.plan import LayerPlan
from model_prune.core.target import Dims, Family
from prune_core.errors import InputError

# The matrices that hold a part of each unit: along their rows (0) or their columns (1).
MEMBERS: dict[Family, dict[str, int]] = {
    "kv_group": {
        "self_attn.q_proj": 0,
        "self_attn.k_proj": 0,
        "self_attn.v_proj": 0,
        "self_attn.o_proj": 1,
    },
    "neuron": {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
    "expert": {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
}
# The input that a family's outputs are, and the matrix that reads it.
SITE: dict[Family, str] = {"kv_group": "attn_out", "neuron": "mlp_mid"}
FAMILY: dict[str, Family] = {site: family for family, site in SITE.items()}
READER: dict[Family, str] = {"kv_group": "self_attn.o_proj", "neuron": "mlp.down_proj"}


def width(family: Family, matrix: str, dims: Dims) -> int:
    """Rows or columns of a matrix that one unit holds."""
    if family != "kv_group":
        return dims.neurons if family == "expert" else 1
    heads = 1 if matrix in ("self_attn.k_proj", "self_attn.v_proj") else dims.group
    return heads * dims.head_dim


def places(family: Family, matrix: str, dims: Dims, units: Tensor) -> Tensor:
    """Rows or columns of a matrix that belong to `units` (int64), in their order."""
    size = width(family, matrix, dims)
    offsets = torch.arange(size, device=units.device)
    return (units[:, None] * size + offsets).flatten()


def by_unit(family: Family, matrix: str, dims: Dims, weight: Tensor) -> Tensor:
    """A tensor shaped like the matrix as [units, everything that one holds]."""
    if MEMBERS[family][matrix] == 1:
        weight = weight.T
    return weight.reshape(dims.count(family), -1)


def kept_weights(plan: LayerPlan, dims: Dims, matrix: str) -> Tensor:
    """bool [out, in] of the dense layer: True where a weight of `matrix` is still there.

    Raises InputError for a mask of another shape.
    """
    shape = dims.shape(matrix)
    if plan.removed:
        return torch.zeros(shape, dtype=torch.bool)
    kept = torch.ones(shape, dtype=torch.bool)
    if matrix in plan.masks:
        if tuple(plan.masks[matrix].shape) != shape:
            raise InputError(
                f"The mask of '{matrix}' has the shape {tuple(plan.masks[matrix].shape)}, and the "
                f"dense matrix {shape}."
            )
        kept &= plan.masks[matrix].cpu()
    for family in dims.units:
        if matrix in MEMBERS[family] and family in plan.units:
            axis = MEMBERS[family][matrix]
            gone = torch.ones(dims.count(family), dtype=torch.bool)
            gone[plan.units[family].cpu()] = False
            stays = torch.ones(shape[axis], dtype=torch.bool)  # also what is of no unit
            stays[places(family, matrix, dims, gone.nonzero().flatten())] = False
            kept &= stays[:, None] if axis == 0 else stays
    return kept
