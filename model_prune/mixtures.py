"""Mixtures of experts on the disk and in memory.

transformers holds the experts of a layer in two stacked tensors, and their files, like vLLM, know
each expert's matrices by name. Both forms of a layer are told here, one from the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_prune.core.target import Dims


@dataclass(frozen=True)
class _Names:
    """Of a family's files: the part of a layer that is the mixture, and an expert's matrices."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


_OWN = {"mixtral": _Names("block_sparse_moe", "w1", "w3", "w2")}


def stored(family: str, name: str, dims: Dims) -> dict[str, Any]:
    """Where the tensor `name` of a layer is in files: which name holds which part of it.

    name: relative to the layer, as the layer's state_dict has it.   dims: of the layer.
    A part is an index into the tensor; `...` is all of it.
    """
    if not dims.experts or not name.startswith("mlp."):
        return {name: ...}
    names, inside = _OWN.get(family, _Names()), name.removeprefix("mlp.")
    prefix = f"{names.block}.experts."
    if inside == "experts.gate_up_proj":
        halves = {names.gate: slice(0, dims.neurons), names.up: slice(dims.neurons, None)}
        return {
            f"{prefix}{expert}.{matrix}.weight": (expert, rows)
            for expert in range(dims.experts)
            for matrix, rows in halves.items()
        }
    if inside == "experts.down_proj":
        return {f"{prefix}{e}.{names.down}.weight": e for e in range(dims.experts)}
    return {f"{names.block}.{inside}": ...}
