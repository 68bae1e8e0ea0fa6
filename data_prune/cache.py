"""What a model said of a text, kept by the text's hash: it is asked once.

The key says nothing of the data set, the batch or the number of workers: a data set that grew, or
a run that was stopped, asks only about texts that have no value yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prune.engine import Engine, shards
from prune_core.storage import StrPath, atomic_write, check_fingerprint

Array = NDArray[Any]


def keys_of(texts: list[str]) -> Array:
    """(n,) S32, the hexadecimal hash of each text."""
    return np.array(
        [
            hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            for t in texts
        ],
        dtype="S32",
    )


def cache_folder(given: StrPath | Literal[True]) -> Path:
    """The folder given, or, for True, `data` in $PRUNEKIT_CACHE or in ~/.cache/prunekit."""
    root = os.environ.get("PRUNEKIT_CACHE") or Path.home() / ".cache" / "prunekit"
    return Path(root, "data") if given is True else Path(given)


class Cache:
    """Values of one kind, each one or a row of float32 numbers, by key.

    A piece is two files, its values and then, which makes it whole, its keys.

    folder: of all kinds; None keeps nothing.   about: all that a value depends on besides its key,
    JSON-serialisable: the model's name and the hash of its weights, how texts are cut.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder: Path | None = None
        if folder is not None:
            named = json.dumps(dict(about), sort_keys=True)
            digest = hashlib.blake2b(named.encode(), digest_size=8).hexdigest()
            self._folder = folder / f"{about['kind']}-{digest}"
            check_fingerprint(self._folder, about, self._pieces())

    @classmethod
    def of(cls, source: Any, kind: str, folder: Path | None) -> Cache:
        """The values of one kind that a callable gives; kept only if it has a `fingerprint`, by
        which it is known again."""
        about = getattr(source, "fingerprint", None)
        return cls(folder if about else None, {"kind": kind, **(about or {})})

    @property
    def keeps(self) -> bool:
        """Whether values are kept for the next run."""
        return self._folder is not None

    def fill(
        self,
        keys: Array,
        compute: Callable[[list[int]], Array],
        engine: Engine,
        *,
        size: int,
        desc: str,
    ) -> NDArray[np.float32]:
        """(n,) or (n, width) values for n keys in any order; computed where there are none yet.

        compute: gives the values of the keys at these places; called with at most `size` of them,
        each key once, in an order that depends on nothing but the keys.
        """
        unique, first, back = np.unique(keys, return_index=True, return_inverse=True)
        have, values = self._load(unique)
        # Shards are of all the keys, so that a run that goes on computes in the same company.
        missing = [
            [i for i in range(part.start, part.stop) if not have[i]]
            for part in shards(len(unique), size)
        ]
        missing = [part for part in missing if part]
        work = _Compute(compute, first)
        for part, piece in zip(missing, engine.map(work, missing, desc), strict=True):
            piece = np.asarray(piece, dtype=np.float32)
            if values is None:
                values = np.empty((len(unique), *piece.shape[1:]), np.float32)
            values[part] = piece
            self._save(unique[part], piece)
        assert values is not None  # there is a key, so there is a value
        return values[back]

    def missing(self, keys: Array) -> NDArray[np.int64]:
        """The first place of each key that has no value yet, ascending."""
        unique, first = np.unique(keys, return_index=True)
        return np.sort(first[~self._load(unique)[0]])

    def _pieces(self) -> list[Path]:
        return sorted(self._folder.glob("*.keys.npy")) if self._folder else []

    def _load(self, unique: Array) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
        have = np.zeros(len(unique), dtype=bool)
        values: NDArray[np.float32] | None = None
        for path in self._pieces():
            stored = _read(path)
            piece = _read(path.with_name(path.name.replace(".keys.", ".values.")))
            if stored is None or piece is None or len(stored) != len(piece):
                path.unlink()  # a damaged piece is computed again
                continue
            at = np.searchsorted(unique, stored).clip(max=len(unique) - 1)
            known = unique[at] == stored
            if values is None:
                values = np.empty((len(unique), *piece.shape[1:]), np.float32)
            values[at[known]] = piece[known]
            have[at[known]] = True
        return have, values

    def _save(self, keys: Array, values: NDArray[np.float32]) -> None:
        if self._folder is None:
            return
        name = hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
        for what, array in (("values", values), ("keys", keys)):
            with atomic_write(self._folder / f"{name}.{what}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)


class _Compute:
    """`compute` on places among the unique keys, which the engine can send to other processes."""

    def __init__(self, compute: Callable[[list[int]], Array], first: NDArray[np.int64]) -> None:
        self.compute, self.first = compute, first

    def __call__(self, part: list[int]) -> Array:
        return self.compute(self.first[part].tolist())


def _read(path: Path) -> Array | None:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError):
        return None
