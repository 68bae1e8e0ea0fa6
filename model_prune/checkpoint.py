"""Checkpoint folders: read layer by layer, and written pruned, without the whole model in memory.

    config.json                   stock where that says it all, else one of decoders.py's
    model.safetensors             or shards with model.safetensors.index.json, as transformers'
    prunekit.json                 what was done
    tokenizer, generation_config  copied

Only safetensors are read, never pickles, and no code that comes with a folder is run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig

from model_prune.core.plan import LayerPlan
from model_prune.core.target import Dims, family_of
from model_prune.core.work import trim
from model_prune.decoders import build_layer, pruned_config
from model_prune.graph.cut import dims_after, no_biases, prune_state
from model_prune.mixtures import stored
from prune_core.errors import CheckpointError, InputError
from prune_core.storage import StrPath, atomic_folder, save_tensors, write_json

SHARD = 1 << 28  # bytes; what writing holds, beside a layer
LAYERS = "model.layers."
# What goes along with the weights; all else in the folder is about the model before.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder whose weights are read when they are asked for; nothing stays open in between.

    config: of transformers.
    files: in which file of the folder a tensor is, by the tensor's name.

    All methods raise CheckpointError for a file that is damaged or gone.
    """

    folder: Path
    config: Any
    files: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self.files)

    @property
    def nbytes(self) -> int:
        """Of the files that hold the weights."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's matrices."""
        return self.rows(f"{LAYERS}0.self_attn.o_proj.weight", torch.tensor([0])).dtype

    @property
    def fingerprint(self) -> str:
        """Differs between models of other configs or weights: a hash of the start of every tensor.

        Training moves all of a tensor, so the start of each tells models apart without reading
        them whole.
        """
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for name in sorted(set(self.files.values())):
            with open(self.folder / name, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = file.read(size)
                digest.update(header)
                for about in json.loads(header).values():
                    if "data_offsets" in about:
                        file.seek(8 + size + about["data_offsets"][0])
                        digest.update(file.read(min(4096, about["data_offsets"][1])))
        return digest.hexdigest()

    def layer_state(self, i: int) -> dict[str, Tensor]:
        """The tensors of decoder layer `i`, by their name in it ("mlp.down_proj.weight").

        Each has memory of its own, and the dtype of the file.
        """
        family, dims = family_of(self.config), Dims.of(self.config, i)
        state: dict[str, Tensor] = {}
        for name, like in build_layer(self.config, i).state_dict().items():
            for part, index in stored(family, name, dims).items():
                tensor = self.tensor(f"{LAYERS}{i}.{part}")
                if index is ...:
                    state[name] = tensor
                    continue
                whole = state.setdefault(name, torch.empty(like.shape, dtype=tensor.dtype))
                whole[index] = tensor
        return state

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises CheckpointError if there is none so named."""
        return self._read(name, None)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a matrix, [len(ids), columns], reading no others from the disk."""
        return self._read(name, ids)

    def _read(self, name: str, ids: Tensor | None) -> Tensor:
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor '{name}': it is not whole.")
        # Mapped, pages that were read count as memory until the file is closed: of a whole tensor
        # these are too many, of some rows they are only those.
        backend = "pread" if ids is None else "mmap"
        try:
            with safe_open(self.folder / self.files[name], "pt", backend=backend) as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor if ids is None else tensor[ids]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{name}' cannot be read from {self.folder / self.files[name]} ({error}): the "
                f"file is damaged, so download it again."
            ) from error


def open_checkpoint(folder: StrPath) -> Checkpoint:
    """Look at a folder's config and the names of its tensors; no weight is read.

    Raises CheckpointError for a folder that is none, whose weights are pickles, or which lacks
    tensors that its config asks for; InputError for an architecture that cannot be pruned, and
    for a quantised model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"'{folder}' has no config.json: give the folder of a model, as transformers writes it."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    family = family_of(config)
    checkpoint = Checkpoint(folder, config, _files(folder))
    for i in range(config.num_hidden_layers):
        dims = Dims.of(config, i)
        state = build_layer(config, i).state_dict()
        for name in (part for whole in state for part in stored(family, whole, dims)):
            if f"{LAYERS}{i}.{name}" not in checkpoint.files:
                raise CheckpointError(
                    f"{folder} has no tensor '{LAYERS}{i}.{name}', which its config.json asks for: "
                    f"it is not whole, or not a causal language model's."
                )
    return checkpoint


def _files(folder: Path) -> dict[str, str]:
    single, index = "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if (folder / single).is_file():
            with safe_open(folder / single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for name in sorted(set(files.values())):
                if Path(name).name != name or not (folder / name).is_file():
                    raise CheckpointError(
                        f"{index} names the file '{name}', which is not in the folder: download it."
                    )
            return dict(files)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {error}") from error
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        raise CheckpointError(
            f"The weights in {folder} are pickles, which can run code and are never loaded: load "
            f"the model with transformers where you trust it, and save_pretrained it."
        )
    raise CheckpointError(f"{folder} has no weights: there is no {single}.")


def write_checkpoint(
    source: StrPath,
    out: StrPath,
    layers: Sequence[LayerPlan],
    *,
    plan_json: dict[str, Any],
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a folder's model as it is after the plans of its layers, in the dtype that it has.

    source: a folder, pruned before or not.   out: appears whole or not at all.
    layers: a plan a layer; each is taken once, in order, so they may come from a file one by one.
    plan_json: what prunekit.json shall hold.

    In memory are a layer, its plan, and the tensors of one shard, some 256 MiB, or the embeddings.

    Raises CheckpointError and InputError as `open_checkpoint` and `prune_state` do, and InputError
    for another number of plans, plans that keep no layer, a folder `out` that holds files (unless
    `overwrite`) or is `source`, and a disk without the space that the model takes now.
    """
    source, out = Path(source), Path(out)
    checkpoint = open_checkpoint(source)
    count = checkpoint.config.num_hidden_layers
    if len(layers) != count:
        raise InputError(
            f"The plan is for {len(layers)} layers, and {source} has {count}: they belong to "
            f"different models."
        )
    check_output(checkpoint, out, overwrite)
    with atomic_folder(out, overwrite) as temporary:
        writer = ShardWriter(temporary)
        for name in checkpoint.names:
            if not name.startswith(LAYERS):
                writer.add(name, checkpoint.tensor(name))
        config = _write_layers(checkpoint, layers, writer, progress)
        writer.close()
        config.save_pretrained(temporary)
        for pattern in COPIED:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, temporary / path.name)
        write_json(temporary / "prunekit.json", plan_json)


def _write_layers(
    checkpoint: Checkpoint, layers: Sequence[LayerPlan], writer: ShardWriter, progress: bool
) -> Any:
    """All layers into the writer; returns the config that they need."""
    dims: list[Dims] = []
    kept: list[int] = []
    unbiased: dict[str, Tensor] = {}  # zeros for layers without a bias, should others get one
    biases, family = False, family_of(checkpoint.config)
    for i in tqdm(range(len(layers)), "layers", disable=None if progress else True):
        plan = layers[i]
        if plan.removed:
            continue
        before, state = Dims.of(checkpoint.config, i), checkpoint.layer_state(i)
        prefix = f"{LAYERS}{len(kept)}."
        there = state.keys()
        state = prune_state(state, plan, before)
        biases |= state.keys() != there
        dims.append(dims_after(before, plan))
        for name, tensor in state.items():
            for part, index in stored(family, name, dims[-1]).items():
                writer.add(prefix + part, tensor[index])
        if not before.experts:
            unbiased |= {prefix + name: zeros for name, zeros in no_biases(state).items()}
        kept.append(i)
        del plan, state  # or they stay while the next ones are read
        trim()
    if biases:
        for name, zeros in unbiased.items():
            writer.add(name, zeros)
    return pruned_config(checkpoint.config, dims, biases=biases, kept_layers=kept)


class ShardWriter:
    """Tensors, written as transformers names its files, each as soon as it is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[list[str]] = []
        self.sizes: list[int] = []
        self.waiting: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write this tensor now or later; it must not change until then."""
        waiting = sum(tensor.nbytes for tensor in self.waiting.values())
        if self.waiting and waiting + tensor.nbytes > SHARD:
            self._write()
        self.waiting[name] = tensor.contiguous()

    def _write(self) -> None:
        self.shards.append(list(self.waiting))
        self.sizes.append(sum(tensor.nbytes for tensor in self.waiting.values()))
        save_tensors(self._path(len(self.shards)), self.waiting)
        self.waiting = {}

    def close(self) -> None:
        """Write what waits, and give the files their names, which tell how many there are."""
        self._write()
        total = len(self.shards)
        if total == 1:
            self._path(1).rename(self.folder / "model.safetensors")
            return
        files: dict[str, str] = {}
        for number, names in enumerate(self.shards, start=1):
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            self._path(number).rename(self.folder / name)
            files |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": sum(self.sizes)}, "weight_map": files}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


def check_output(checkpoint: Checkpoint, out: StrPath, overwrite: bool) -> None:
    """Raise InputError where a pruned model cannot be written, before anything is computed.

    That is over the model that is read, in a folder that holds files unless `overwrite`, and on a
    disk without the space that the model takes now.
    """
    out = Path(out).resolve()
    if out == checkpoint.folder.resolve():
        raise InputError(f"'{out}' is the model that is read: write to another folder.")
    if out.exists() and not (overwrite and out.is_dir()) and (out.is_file() or any(out.iterdir())):
        raise InputError(
            f"'{out}' is there already: choose another folder, or overwrite it on purpose."
        )
    parent = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < checkpoint.nbytes:
        raise InputError(
            f"The pruned model takes up to {checkpoint.nbytes / 2**30:.1f} GiB, and the disk of "
            f"'{parent}' has {free / 2**30:.1f} GiB left: make room, or choose another disk."
        )
