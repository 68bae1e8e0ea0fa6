"""Decoding and writing pruned pages on an x86 CPU: `pages.decode` and `pages.write`, compiled.

cpu.cpp is compiled where it first runs, some seconds, and kept under $PRUNEKIT_CACHE, or else
~/.cache/prunekit. Where that cannot be, a warning says so and `pages` does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_core.provenance import cpuinfo
from prune_core.storage import atomic_write
from rag_prune.kv import pages
from rag_prune.kv.pages import Storage
from rag_prune.kv.spec import STEP

_SOURCE = Path(__file__).with_name("cpu.cpp")
_ENTRIES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
_TASKS_PER_THREAD = 4  # of a decode step, so that threads end at about the same time
_PART = 512  # tokens of a task, at least, where a sequence is divided

# The instructions each build needs, as /proc/cpuinfo names them; the first that is there is taken.
_BUILDS = {
    "avx512": "avx2 fma f16c popcnt avx512f avx512bw avx512vl avx512dq",
    "avx2": "avx2 fma f16c popcnt",
}


class _Layout(ctypes.Structure):
    """`Layout` of cpu.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p if name in ("pages", "ring") else ctypes.c_int64)
        for name in [
            *("head_size", "block_size", "kept_keys", "kept_values", "packed_keys"),
            *("values_offset", "ids_offset", "recent", "sinks", "step", "window_slots", "kv_heads"),
            *("pages", "page_stride", "page_head_stride"),
            *("ring", "ring_stride", "ring_head_stride", "slots_per_block", "slot_bytes"),
            "threads",
        ]
    ]


# ------------------------------------------------------------------------------ running
def write(
    store: Storage,
    blocks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    keys: Tensor,
    values: Tensor,
) -> None:
    """`pages.write`: the same arguments, and the same bytes."""
    kernels = _kernels(store.dtype)
    if kernels is None:
        return pages.write(store, blocks, positions, lengths, rings, keys, values)
    blocks, positions, lengths = (_dense(x, torch.int32) for x in (blocks, positions, lengths))
    slots = None if rings is None or store.ring is None else _dense(rings, torch.int32)
    keys, values = _dense(keys, store.dtype), _dense(values, store.dtype)
    kernels.prunekit_write(
        _layout(store),
        len(blocks),
        *(x.data_ptr() for x in (blocks, positions, lengths)),
        *_rows(slots),
        *(y for x in (keys, values) for y in (x.data_ptr(), *_strides(x))),
    )


def decode(
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    scale: float,
) -> Tensor:
    """`pages.decode`: the same arguments, and the same result but for rounding."""
    kernels = _kernels(store.dtype)
    if kernels is None:
        return pages.decode(store, queries, table, lengths, rings, scale)
    lengths = _dense(lengths, torch.int32)
    parts = _parts(lengths, len(lengths) * store.pages.shape[1])
    return _decode(kernels, store, queries, table, lengths, rings, scale, parts)[0]


def afar(
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    ring: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`pages.afar`: the same arguments, and the same result but for rounding.

    A head's queries are to the kernel so many heads that share a key, so that it reads a page once
    for several of them.
    """
    kernels = _kernels(store.dtype)
    if kernels is None:
        return pages.afar(store, queries, table, lengths, ring, scale)
    rows = len(lengths)
    out, log_sums = _decode(
        kernels,
        store,
        queries.flatten(1, 2),
        table.expand(rows, -1),
        _dense(lengths, torch.int32),
        None if ring is None else ring.expand(rows, -1),
        scale,
        parts=1,
        window=False,
    )
    return out.view(queries.shape), log_sums.view(queries.shape[:-1])


def _decode(
    kernels: Any,
    store: Storage,
    queries: Tensor,
    table: Tensor,
    lengths: Tensor,
    rings: Tensor | None,
    scale: float,
    parts: int,
    window: bool = True,
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = queries.shape
    asked, out = queries.float().contiguous(), torch.empty(queries.shape)
    log_sums = torch.empty(rows, heads)
    table = _dense(table, torch.int32)
    slots = None if rings is None or store.ring is None else _dense(rings, torch.int32)
    kernels.prunekit_decode(
        _layout(store, window),
        rows,
        heads,
        scale,
        parts,
        asked.data_ptr(),
        *_rows(table),
        lengths.data_ptr(),
        *_rows(slots),
        out.data_ptr(),
        log_sums.data_ptr(),
    )
    return out.to(queries.dtype), log_sums


def _parts(lengths: Tensor, pairs: int) -> int:
    """Into how many parts each sequence is divided, so that `pairs` of sequence and head are enough
    work for all threads."""
    if not pairs:
        return 1
    wanted = -(-torch.get_num_threads() * _TASKS_PER_THREAD // pairs)
    return max(1, min(wanted, int(lengths.max()) // _PART))


def _layout(store: Storage, window: bool = True) -> _Layout:
    """Without the window only sinks are read whole."""
    spec, ring = store.spec, store.ring
    here = (
        (0, 0, 0, 0) if ring is None else (ring.data_ptr(), *_strides(ring), store.slots_per_block)
    )
    return _Layout(
        spec.head_size,
        spec.block_size,
        spec.kept_keys,
        spec.kept_values,
        spec.packed_keys,
        spec.values_offset,
        spec.ids_offset,
        spec.recent if window else 0,
        spec.sinks,
        STEP if window else 1,
        spec.window_slots,
        store.pages.shape[1],
        store.pages.data_ptr(),
        *_strides(store.pages),
        *here,
        spec.slot_bytes,
        torch.get_num_threads(),
    )


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a type and with neighbours in the last dimension, copied only if that takes it."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """In bytes, of the first two dimensions."""
    return x.stride(0) * x.itemsize, x.stride(1) * x.itemsize


def _rows(x: Tensor | None) -> tuple[int | None, int]:
    """Where rows begin, and how many entries lie between them."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


# ------------------------------------------------------------------------------ building
class _NoKernel(Exception):
    """Why there is no library, and what to do."""


@cache
def _kernels(dtype: torch.dtype) -> Any:
    """The library for entries of a type; None, after a warning, if there cannot be one."""
    try:
        builds = available()
        if not builds:
            raise _NoKernel("it is compiled for x86 processors with AVX2, which this one is not.")
        return load(dtype, builds[0])
    except _NoKernel as error:
        _warn(str(error))
        return None


@cache  # one warning for all types of entries
def _warn(reason: str) -> None:
    warnings.warn(
        f"Attention over the pruned KV cache runs in plain torch, many times slower: {reason}",
        stacklevel=4,
    )


def available() -> list[str]:
    """The builds that this processor can run, best first: "avx512", "avx2"."""
    flags = cpuinfo().get("flags", "").split()
    return [name for name, needed in _BUILDS.items() if set(needed.split()) <= set(flags)]


def load(dtype: torch.dtype, build: str) -> Any:
    """The library of one build for entries of a type, compiled unless the cache has it.

    Raises _NoKernel.
    """
    failed = "no C++ compiler was found: install one, such as g++, or name one in $CXX."
    for compiler in _compilers():
        try:
            return _open(_compiled(compiler, dtype, build))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines() or ["nothing"]
            failed = (
                f"'{shlex.join(compiler)}' could not compile its kernel and said {said[0]!r}: "
                f"install a g++ that has OpenMP, or name one in $CXX."
            )
        except OSError as error:
            failed = (
                f"its kernel could not be kept or loaded ({error}): set PRUNEKIT_CACHE to a folder "
                f"that can be written and holds programs."
            )
    raise _NoKernel(failed)


def _compilers() -> list[list[str]]:
    named = shlex.split(os.environ.get("CXX", ""))
    found = [named] if named else []
    found += [["c++"], ["g++"], ["clang++"]]
    return [command for command in found if shutil.which(command[0])]


def _compiled(compiler: list[str], dtype: torch.dtype, build: str) -> Path:
    """The library's file, whose name says what it was made of."""
    flags = ["-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", f"-DENTRY={_ENTRIES[dtype]}"]
    flags += [f"-m{name}" for name in _BUILDS[build].split()]
    source = _SOURCE.read_text("utf-8")
    parts = [_run([*compiler, "--version"]), *compiler, *flags, source]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    root = os.environ.get("PRUNEKIT_CACHE") or Path.home() / ".cache" / "prunekit"
    path = Path(root, "kernels", f"{name}.so")
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder, "kernels.so")
            _run([*compiler, *flags, "-x", "c++", "-", "-o", str(new)], source)
            # Whole or not there, so that processes may build it at the same time.
            with atomic_write(path, "wb") as file:
                file.write(new.read_bytes())
    return path


def _run(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, check=True, capture_output=True, encoding="utf-8")
    return done.stdout


def _open(path: Path) -> Any:
    # Its OpenMP is the one that torch has loaded, under the same name, so that threads are shared.
    library = ctypes.CDLL(str(path))
    number, address = ctypes.c_int64, ctypes.c_void_p
    rows = (address, number)
    layout = ctypes.POINTER(_Layout)
    library.prunekit_decode.argtypes = [
        *(layout, number, number, ctypes.c_float, number),
        *(address, *rows, address, *rows, address, address),
    ]
    library.prunekit_write.argtypes = [
        *(layout, number, address, address, address, *rows),
        *(address, number, number) * 2,
    ]
    library.prunekit_decode.restype = library.prunekit_write.restype = None
    return library
