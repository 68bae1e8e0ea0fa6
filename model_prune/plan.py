"""A plan for a whole model: printed, saved, compared, replayed; applied only when asked to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, Dims, family_of
from model_prune.core.units import kept_weights
from model_prune.core.work import Layers, Work
from prune_core.errors import InputError
from prune_core.storage import StrPath, atomic_folder, write_json

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model loses, layer by layer, and where that comes from.

    method, settings: the method's name and its fields.
    model: its name, type, fingerprint and the sizes of its layers, before.
    calibration: what was read for it; None where nothing was.
    layers: of each layer; made as they are asked for where the model is large.
    """

    method: str
    settings: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any] | None
    layers: Sequence[LayerPlan]

    @property
    def dims(self) -> list[Dims]:
        """Sizes of the layers before."""
        return [Dims(**sizes) for sizes in self.model["dims"]]

    def apply(self, model: nn.Module) -> nn.Module:
        """Prune a model of transformers in place, and give it back.

        Where units or layers are cut, or biases come in, the layers are replaced by smaller ones
        and the model becomes of a class that knows them; save_pretrained writes what it is then.

        Raises InputError for a model with layers of other sizes than the plan was made for.
        """
        from model_prune.decoders import apply_in_place

        config: Any = getattr(model, "config", None)
        family_of(config)
        found = [Dims.of(config, i) for i in range(config.num_hidden_layers)]
        if found != self.dims:
            raise InputError(
                f"The plan was made for '{self.model['name']}', a model of {len(self.dims)} layers "
                f"of other sizes than this one's {len(found)}: plan for this model."
            )
        pruned: nn.Module = apply_in_place(model, self.layers)
        return pruned

    def to_dict(self) -> dict[str, Any]:
        """Everything but masks and weights, of which the counts are given."""
        return {
            "format": FORMAT,
            "method": self.method,
            "settings": self.settings,
            "model": self.model,
            "calibration": self.calibration,
            "layers": [_summary(p, d) for p, d in zip(self.layers, self.dims, strict=True)],
        }

    def save(self, path: StrPath) -> None:
        """Write `path`, JSON to be read, and beside it a folder of the tensors to be replayed."""
        path = Path(path)
        with atomic_folder(_tensors(path), overwrite=True) as folder:
            work = Work(folder)
            for i, layer in enumerate(self.layers):
                work[i] = layer.tensors()
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: StrPath) -> Plan:
        """What `save` wrote; its tensors are read when asked for.

        Raises InputError for a file that is no plan, or lacks its tensors.
        """
        path = Path(path)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise ValueError(f"its format is {stored['format']!r}")
            fields = {k: stored[k] for k in ("method", "settings", "model", "calibration")}
            count = len(stored["layers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"Cannot read the plan '{path}' ({error}): give a file that Plan.save wrote."
            ) from error
        work = Work(_tensors(path))
        if not all(i in work for i in range(count)):
            raise InputError(f"The plan '{path}' needs the folder '{_tensors(path)}' beside it.")
        return cls(**fields, layers=Layers(work, count, LayerPlan.from_tensors))

    def compare(self, other: Plan) -> dict[str, float]:
        """How far two plans agree: of what either removes, the share that both remove.

        By matrix, like "layers.3.mlp.down_proj"; 1 where neither removes anything. Raises
        InputError for plans of models with other layers.
        """
        if self.dims != other.dims:
            raise InputError("The plans are for models of other sizes, so nothing can be compared.")
        shares = {}
        for i, (mine, theirs, dims) in enumerate(
            zip(self.layers, other.layers, self.dims, strict=True)
        ):
            for matrix in MATRICES:
                a, b = (~kept_weights(plan, dims, matrix) for plan in (mine, theirs))
                either = int((a | b).sum())
                shares[f"layers.{i}.{matrix}"] = int((a & b).sum()) / either if either else 1.0
        return shares


def _summary(plan: LayerPlan, dims: Dims) -> dict[str, Any]:
    return {
        "removed": plan.removed,
        "kept": {
            family: plan.units[family].tolist() if family in plan.units else dims.count(family)
            for family in dims.units
        },
        "zeros": {matrix: int((~mask).sum()) for matrix, mask in plan.masks.items()},
        "new_weights": sorted(plan.weights),
        "biases": sorted(plan.biases),
    }


def _tensors(path: Path) -> Path:
    return path.with_name(f"{path.stem}.tensors")
