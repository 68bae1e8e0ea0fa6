"""A plan: what goes from each layer, to be looked at, saved, compared and replayed.

A plan holds whole numbers and tensors, never thresholds, so applying it has no surprises. What
one layer loses is a `LayerPlan`; masks and weights in it have the dense layer's shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_prune.core.target import Family


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one decoder layer loses, applied in this order.

    weights: new weights of whole matrices, by name ("mlp.down_proj"), dense shape.
    masks: bool [out, in] by name, True where the weight stays.
    biases: float32 [hidden], added to those of "self_attn.o_proj" and "mlp.down_proj"; a layer
    that has none gets one.
    units: the kept units of a family, ascending (int64); a family that is absent stays whole.
    removed: the whole layer goes, and nothing else of this counts.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    units: dict[Family, Tensor] = field(default_factory=dict)
    removed: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors that safetensors can hold; masks as packed bits."""
        return {
            **{f"weight.{name}": weight.contiguous() for name, weight in self.weights.items()},
            **{f"mask.{name}": pack(mask) for name, mask in self.masks.items()},
            **{f"bias.{name}": bias.contiguous() for name, bias in self.biases.items()},
            **{f"unit.{family}": kept for family, kept in self.units.items()},
            "removed": torch.tensor(self.removed),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerPlan:
        """What `tensors` gave; none at all say that nothing goes."""
        parts: Any = {"weight": {}, "mask": {}, "bias": {}, "unit": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if name:
                parts[kind][name] = unpack(tensor) if kind == "mask" else tensor
        return cls(
            weights=parts["weight"],
            masks=parts["mask"],
            biases=parts["bias"],
            units=parts["unit"],
            removed=bool(tensors.get("removed", False)),
        )


def pack(mask: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in / 8) + 1]; the last byte of a row: bits unused."""
    columns = mask.shape[1]
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8))
    bits = padded.view(mask.shape[0], -1, 8) << torch.arange(
        8, dtype=torch.uint8, device=mask.device
    )
    rows = bits.sum(-1).to(torch.uint8)
    return torch.nn.functional.pad(rows, (0, 1), value=-columns % 8)


def unpack(rows: Tensor) -> Tensor:
    """The mask that `pack` was given."""
    unused = int(rows[0, -1])
    shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)
    bits = (rows[:, :-1, None] >> shifts) & 1
    return bits.bool().flatten(1)[:, : bits.shape[1] * 8 - unused]
