"""A decoder-only model as a calibration pass sees it: one layer at a time, each a private copy.

The model may be in memory, or a folder larger than memory, of which one layer is read at a time.
Layers are computed in float32 on a CPU and in the model's own dtype on a GPU.
"""

from __future__ import annotations

import copy
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from model_prune.checkpoint import open_checkpoint
from model_prune.core.linear import hasten, multiply
from model_prune.core.target import Dims, family_of
from model_prune.decoders import build_layer, build_rotary
from prune_core.errors import InputError
from prune_core.storage import StrPath


class Decoder(ABC):
    """Config, layers and embeddings of a model that is not changed."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        family_of(config)
        self.config = config
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.dims = [Dims.of(config, i) for i in range(config.num_hidden_layers)]

    @staticmethod
    def of(model: nn.Module | StrPath, device: str | None = None) -> Decoder:
        """A model of transformers, or a folder with its config.json and safetensors.

        device: of a folder's layers: a GPU if there is one. A loaded model stays where it is.
        Raises InputError for what is no supported model, CheckpointError for a folder that
        cannot be read.
        """
        if isinstance(model, nn.Module):
            return _Loaded(model)
        return _Stored(Path(model), torch.device(device or default_device()))

    @abstractmethod
    def state(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one layer, in the model's dtype, to be read only."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """int64 [windows, tokens] -> [windows, tokens, hidden], in the dtype of computing."""

    @abstractmethod
    def _end(self) -> tuple[Tensor, Tensor]:
        """Weights of the norm after the layers, [hidden], and of the head, [vocabulary, hidden]."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Differs between models of different weights."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call the model."""

    @abstractmethod
    def whole(self) -> nn.Module:
        """The model in memory, in the dtype of computing, for what cannot go layer by layer.

        It may be the one that was given, so it is to be left as it was.
        """

    @property
    @abstractmethod
    def to_load(self) -> int:
        """Bytes that `whole` takes beside what is in memory already."""

    def layer(self, index: int) -> nn.Module:
        """A copy of one layer, to be changed at will; raises InputError for NaN and infinity."""
        layer, state = build_layer(self.config, index), self.state(index)
        for name in state:  # one after another, so that what was read does not stay beside the copy
            state[name] = state[name].detach().to(self.device, self.dtype, copy=True)
            if not state[name].isfinite().all():
                raise InputError(
                    f"'{name}' of layer {index} has NaN or infinity in it: the model is broken."
                )
        layer.load_state_dict(state, assign=True)
        hasten(layer)
        frozen: nn.Module = layer.eval().requires_grad_(False)
        return frozen

    def head(self) -> Callable[[Tensor], Tensor]:
        """What makes of the last layer's output [..., hidden] logits [..., vocabulary]."""
        norm, weight = (x.detach().to(self.device, self.dtype).contiguous() for x in self._end())
        eps = self.config.rms_norm_eps
        return lambda hidden: multiply(rms_norm(hidden, norm.shape, norm, eps), weight)

    def rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to tokens - 1."""
        positions = torch.arange(tokens, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cosines, sines = build_rotary(self.config).to(self.device)(like, positions)
        return cosines, sines


class _Loaded(Decoder):
    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(getattr(model, "model", None), "layers"):
            raise InputError(
                f"Only causal language models of transformers can be pruned, got "
                f"{type(model).__name__}: load one with AutoModelForCausalLM.from_pretrained."
            )
        first = next(model.parameters())
        super().__init__(config, first.device, first.dtype)
        self._model: Any = model
        self._as_computed = first.dtype == self.dtype

    def state(self, layer: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._model.model.layers[layer].state_dict()
        return state

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._model.model.embed_tokens(ids.to(self.device))
        return embedded.to(self.dtype)

    def _end(self) -> tuple[Tensor, Tensor]:
        return self._model.model.norm.weight, self._model.lm_head.weight

    def whole(self) -> nn.Module:
        model: nn.Module = self._model
        return model if self._as_computed else copy.deepcopy(model).to(self.dtype)

    @property
    def to_load(self) -> int:
        weights = sum(parameter.numel() for parameter in self._model.parameters())
        return 0 if self._as_computed else weights * self.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for parameter in self._model.parameters():
            # A sum and a sum of squares differ where weights do, and take no time.
            for part in parameter.detach().flatten().split(1 << 20):  # a copy of all is large
                exact = part.double()
                digest.update(f"{exact.sum():.17g} {exact.square().sum():.17g}".encode())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        path = str(self.config.name_or_path or type(self._model).__name__)
        return Path(path).name


class _Stored(Decoder):
    def __init__(self, folder: Path, device: torch.device) -> None:
        self._checkpoint = open_checkpoint(folder)
        super().__init__(self._checkpoint.config, device, self._checkpoint.dtype)
        self._folder = folder

    def state(self, layer: int) -> dict[str, Tensor]:
        return self._checkpoint.layer_state(layer)

    def embed(self, ids: Tensor) -> Tensor:
        used, places = torch.unique(ids, return_inverse=True)
        rows = self._checkpoint.rows("model.embed_tokens.weight", used)
        return rows.to(self.device, self.dtype)[places.to(self.device)]

    def _end(self) -> tuple[Tensor, Tensor]:
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self._checkpoint.tensor("model.norm.weight"), self._checkpoint.tensor(head)

    def whole(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=self.dtype, use_safetensors=True
        )
        return model.to(self.device)

    @property
    def to_load(self) -> int:
        return self._checkpoint.nbytes * self.dtype.itemsize // self._checkpoint.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        return self._checkpoint.fingerprint

    @property
    def name(self) -> str:
        return self._folder.resolve().name


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        about = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", about)
    return int(found[1]) * 1024 if found else None


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
