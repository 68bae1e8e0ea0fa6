"""Long work over the layers of a model: each layer's result is kept, so a stopped run goes on."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from safetensors.torch import load_file, save
from torch import Tensor

from prune_core.storage import atomic_write, check_fingerprint

Tensors = dict[str, Tensor]
T = TypeVar("T")


def trim() -> None:
    """Give memory that was freed back to the system, to be called after each layer.

    glibc keeps what lies between blocks in use, which over many layers adds up to several of them.
    """
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and no need
        if release is not None:
            release(0)


class Work:
    """The results of layers, as tensors: in a folder, or in memory without one.

    folder: made if need be; one that other work made is refused with an InputError.
    fingerprint: all that the results depend on, JSON-serialisable.
    """

    def __init__(self, folder: Path | None = None, fingerprint: Mapping[str, Any] = {}) -> None:
        self._folder = folder
        self._kept: dict[int, Tensors] = {}
        if folder is not None:
            check_fingerprint(folder, fingerprint, sorted(folder.glob("layer-*.safetensors")))

    def __contains__(self, layer: int) -> bool:
        return layer in self._kept if self._folder is None else self._path(layer).exists()

    def __getitem__(self, layer: int) -> Tensors:
        return self._kept[layer] if self._folder is None else load_file(self._path(layer))

    def __setitem__(self, layer: int, tensors: Tensors) -> None:
        if self._folder is None:
            self._kept[layer] = tensors
        else:
            with atomic_write(self._path(layer), "wb") as file:
                file.write(save({name: tensor.cpu() for name, tensor in tensors.items()}))

    def get(self, layer: int) -> Tensors:
        """The layer's result, or nothing."""
        return self[layer] if layer in self else {}  # noqa: SIM401

    def _path(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{layer:05d}.safetensors"

    def part(self, name: str) -> Work:
        """Another kind of results of the same work."""
        return Work() if self._folder is None else Work(self._folder / name)


class Layers(Sequence[T]):
    """What `read` makes of each layer's result, made when asked for: a model may be too large."""

    def __init__(self, work: Work, count: int, read: Callable[[Tensors], T]) -> None:
        self._work, self._count, self._read = work, count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._read(self._work[index % self._count])
