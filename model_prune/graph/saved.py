"""A cut network in a file: its tensors, and what it was cut from.

    save_cut("smaller.safetensors", network.model, smaller, kept)
    smaller = load_cut("smaller.safetensors", build())      # the code that made the dense network

A network of torch is code and tensors. The code makes the dense network, as it did before; the file
says which shapes its tensors have now. Nothing of it is run, and no pickle is read.
"""

from __future__ import annotations

import copy
import json

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from model_prune.graph.network import Kept, all_tensors, replace
from prune_core.errors import CheckpointError, InputError
from prune_core.storage import StrPath, atomic_write


def save_cut(path: StrPath, dense: nn.Module, smaller: nn.Module, kept: Kept) -> None:
    """Write a network that was cut from `dense`; the file is whole or not there.

    kept: recorded, for those who want to know which channels they are.
    """
    about = {
        "dense": _shapes(dense),
        "kept": {name: stays.tolist() for name, stays in kept.items()},
    }
    written = {id(tensor): (name, tensor) for name, tensor in reversed(_state(smaller).items())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in written.values()}
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, {"format": "pt", "prunekit": json.dumps(about)}))


def load_cut(path: StrPath, dense: nn.Module) -> nn.Module:
    """The network that was saved, made of a copy of the dense one, whose weights do not matter.

    Raises CheckpointError for a file that `save_cut` did not write, InputError where `dense` is not
    like the network that was cut.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["prunekit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            was = about["dense"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is no network that save_cut wrote ({error!r}): give such a file."
        ) from error
    now = _shapes(dense)
    for name in [*was, *now]:
        if was.get(name) != now.get(name):
            raise InputError(
                f"'{path}' was cut from another network: its '{name}' was {was.get(name, 'absent')}"
                f", and is {now.get(name, 'absent')} here. Make the dense network as it was made."
            )
    model = copy.deepcopy(dense)
    replace(model, tensors)
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What is saved: parameters, and buffers but those that a network makes anew."""
    kept = model.state_dict().keys()
    return {name: tensor for name, tensor in all_tensors(model).items() if name in kept}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in _state(model).items()}
