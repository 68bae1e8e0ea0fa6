"""Checkpoint folders: a stock token classifier, plus a `prunekit` section in its config.json.

    config.json           the encoder's own configuration; "prunekit": the Settings below
    model.safetensors     the token classifier's state dict, float32 or rows of int8
    tokenizer.json …      as transformers writes them

Only safetensors are read and no code that comes with a folder is ever run. In the int8 form a
matrix `x` is stored as `x` (int8) and `x.scale` (float32, one number a row), so that value = int8 ·
scale; docs/context-training.md has what that costs.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from scipy.special import expit
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from prune_core.errors import CheckpointError, InputError
from prune_core.recipe import parse_recipe
from prune_core.storage import atomic_folder, save_tensors
from rag_prune.context.model import PrunerModel
from rag_prune.context.sentences import SPLITTER

ENGINES = ("provence", "late", "both")


@dataclass(frozen=True)
class Calibration:
    """Turns an engine's sentence logits into probabilities: sigmoid(scale · logit + shift)."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(expit(self.scale * logits + self.shift))


@dataclass(frozen=True)
class Settings:
    """What a checkpoint was trained for.

    Attributes:
        window: Tokens that one pass reads, question and special tokens included.
        method: The engine that `ContextPruner` uses unless told otherwise.
        splitter: Version of the sentence splitter that the thresholds hold for.
        calibration: For each engine, fitted on held-back titles so that `threshold=0.1` keeps the
            stated share of evidence sentences.
    """

    window: int = 320
    method: Literal["provence", "late", "both"] = "provence"
    splitter: str = SPLITTER
    calibration: dict[str, Calibration] = field(
        default_factory=lambda: {engine: Calibration() for engine in ENGINES}
    )

    def __post_init__(self) -> None:
        if self.window < 16:
            raise InputError(f"window must be at least 16 tokens, got {self.window}: try 320.")
        if set(self.calibration) != set(ENGINES):
            raise InputError(
                f"calibration must have {', '.join(ENGINES)}, got {', '.join(self.calibration)}: "
                "give one for each engine."
            )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded pruner: network (float32, evaluation mode), fast tokenizer, settings.

    `fingerprint` names the weights, so that vectors made by others are not mistaken for its own.
    `multiply_in` is the type that matrices are multiplied in; all else stays float32.
    """

    model: PrunerModel
    tokenizer: Any
    settings: Settings
    fingerprint: str
    multiply_in: torch.dtype = torch.float32


def save(
    folder: Path,
    model: PrunerModel,
    tokenizer: Any,
    settings: Settings,
    *,
    int8: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all.

    Raises:
        InputError: The folder exists, is not empty and shall not be overwritten.
    """
    state = {k: v.detach().contiguous() for k, v in model.classifier.state_dict().items()}
    with atomic_folder(folder, overwrite) as temporary:
        model.classifier.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text())
        config["architectures"] = [type(model.classifier).__name__]
        config["prunekit"] = asdict(settings) | {"late": model.late.tolist()}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(temporary / "model.safetensors", _to_int8(state) if int8 else state)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: A missing or foreign folder, weights that are not safetensors, a config
            that asks for remote code, or tensors that do not fit; the message says which.
    """
    config = read_config(folder)
    if not isinstance(config.get("prunekit", {}), dict):
        raise CheckpointError(
            f"{folder / 'config.json'} and its 'prunekit' section must be JSON objects."
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for remote code (auto_map), which prunekit never runs. "
            "Use a checkpoint in a stock architecture."
        )
    if "prunekit" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} has no 'prunekit' section, so {folder} is not a prunekit "
            "pruner. Train one with `prunekit context train`; a token classifier of LLMLingua-2's "
            "kind loads with method='llmlingua2'."
        )
    weights = weight_files(folder)
    settings, late = read_section(config["prunekit"], str(folder))
    try:
        network = AutoModelForTokenClassification.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    state: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    model = PrunerModel(network)
    try:
        for file in weights:
            data = file.read_bytes()
            digest.update(data)
            state |= load_weights(data)
        network.load_state_dict(_from_int8(state), strict=True)
        model.load_state_dict({"late": late}, strict=False)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json: {error}"
        ) from error
    return Checkpoint(model.float().eval(), tokenizer, settings, digest.hexdigest()[:16])


def is_pruner(folder: Path) -> bool:
    """Whether the folder's config.json has our section; CheckpointError where there is none."""
    return "prunekit" in read_config(folder)


def read_section(section: dict[str, Any], where: str) -> tuple[Settings, Tensor]:
    """The `prunekit` section of a config.json: the settings, and the weights of `late`, (2, 3).

    `where` is the checkpoint's name in errors. Raises CheckpointError for a damaged section, and
    for one whose thresholds hold for another sentence splitter.
    """
    section = dict(section)
    try:
        late = torch.tensor(section.pop("late"), dtype=torch.float32)
        settings = parse_recipe(section, Settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The 'prunekit' section in the config.json of {where} cannot be read ({error}), so it "
            "was damaged or made by another version. Train the checkpoint again."
        ) from error
    if settings.splitter != SPLITTER:
        raise CheckpointError(
            f"{where} was trained with the sentence splitter '{settings.splitter}', and this "
            f"version of prunekit has '{SPLITTER}': its thresholds would not hold. Train it again."
        )
    return settings, late


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises CheckpointError where there is none to be read."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}. Name a checkpoint folder, or leave it out."
        )
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} and its 'prunekit' section must be JSON objects.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors; raises CheckpointError where it has none, or only pickles."""
    if weights := sorted(folder.glob("*.safetensors")):
        return weights
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    found = (
        f"only {', '.join(sorted(pickles))}, which can run code when read" if pickles else "none"
    )
    raise CheckpointError(
        f"{folder} must hold its weights as *.safetensors; found {found}. "
        "Convert the weights to safetensors first."
    )


def _to_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim == 2 and value.shape[0] > 2:
            scale = value.abs().amax(1).clamp(min=1e-12) / 127
            out[name] = (value / scale.unsqueeze(1)).round().to(torch.int8)
            out[f"{name}.scale"] = scale
        else:
            out[name] = value
    return out


def _from_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.float() * state[f"{name}.scale"].unsqueeze(1)
        if value.dtype == torch.int8
        else value
        for name, value in state.items()
        if not name.endswith(".scale")
    }
