"""From one ONNX file to a smaller one, by SPA or OBSPA."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model_prune.core.allocate import check_share
from model_prune.core.work import Work
from model_prune.graph.importance import (
    Of,
    Reduce,
    by_chance,
    by_channel,
    grasp,
    lowest,
    magnitude,
    snip,
)
from model_prune.graph.network import Network
from model_prune.graph.onnx import OnnxNetwork
from model_prune.graph.readers import noise, obspa
from model_prune.prune import work_of
from prune_core.errors import InputError, unknown_name
from prune_core.page import write_page
from prune_core.provenance import provenance
from prune_core.recipe import parse_recipe
from prune_core.storage import StrPath, write_json

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of both methods.

    remove: share of `of` that goes.   rows: of data or noise that are read.
    """

    remove: float = 0.5
    of: Of = "parameters"
    rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("remove", self.remove)


@dataclass(frozen=True, kw_only=True)
class Spa(Settings):
    """Group importance by a criterion; see `graph.importance`."""

    criterion: Literal["magnitude", "snip", "grasp", "random"] = "magnitude"
    reduce: Reduce = "sum"


@dataclass(frozen=True, kw_only=True)
class Obspa(Settings):
    """The update without training; see `graph.readers.obspa`."""


METHODS: dict[str, Any] = {"spa": Spa, "obspa": Obspa}


@dataclass(frozen=True)
class OnnxReport:
    """What went, in numbers.

    families: (channels that stay, channels) by name.
    parameters, flops: before and after; flops of products, on the example the file is tried with.
    unknown, stuck: as of Network: why the others stay.
    """

    title: str
    families: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    unknown: tuple[str, ...]
    stuck: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        lines = [self.title, ""]
        lines += [f"{name}: {n} of {of} channels" for name, (n, of) in self.families.items()]
        if not self.families:
            lines.append("No channels can be cut.")
        lines.append("")
        lines += [f"{name}: {was} -> {now} ({change})" for name, was, now, change in self.totals]
        lines += [f"Stays whole: {name} ({said})" for name, said in self.stuck.items()]
        if self.unknown:
            lines.append(
                f"Stays, as nothing is known of these operators: {', '.join(self.unknown)}"
            )
        return "\n".join(lines)

    @property
    def totals(self) -> list[tuple[str, str, str, str]]:
        """Rows of (what, before, after, change)."""
        return [
            (name, f"{was:,}", f"{now:,}", f"−{1 - now / max(was, 1):.1%}")
            for name, (was, now) in (("parameters", self.parameters), ("FLOPs", self.flops))
        ]

    def save(self, path: StrPath, **more: Any) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, asdict(self) | more)

    def to_html(self, path: StrPath) -> None:
        """Write one page; see `write_page`."""
        levels = {name: round(10 * (1 - n / of)) for name, (n, of) in self.families.items()}
        write_page(
            path,
            Path(__file__).with_name("network.html.j2"),
            title=self.title,
            report=self,
            levels=levels,
        )


def prune_onnx(
    source: StrPath,
    out: StrPath | None = None,
    *,
    method: str = "spa",
    data: StrPath | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> OnnxReport:
    """Prune an ONNX file into another one, and say what went.

    source: opset 13 or newer, 2 GB at most; its inputs and outputs keep their shapes.
    out: the file to write, and a report beside it (OUT with .json); None only looks.
    method: "spa" or "obspa", with the settings of `Spa` or `Obspa`.
    data: .npz with an array for each input, under its name, and "labels" for criteria that need a
    loss (class numbers, for cross-entropy on the first output); .npy for a single input. OBSPA does
    without, on noise.
    A run of OBSPA that was stopped goes on: what was found stays in `OUT.work` until OUT is there.

    Raises InputError for settings, data and files that do not fit, and for more than there is to
    cut; CheckpointError for a file that cannot be read; MissingExtra without the package onnx.
    """
    if method not in METHODS:
        raise unknown_name("method of ONNX files", method, METHODS)
    chosen = parse_recipe(settings, METHODS[method])
    if out is not None and Path(out).exists() and not overwrite:
        raise InputError(f"'{out}' exists: choose another name, or pass overwrite=True.")
    if out is not None and Path(out).suffix != ".onnx":
        raise InputError(f"An ONNX file is written as one: '{out}' must end in .onnx.")
    started = time.perf_counter()
    dense = OnnxNetwork.read(source)
    rows = Rows.read(data, dense, chosen.rows, chosen.seed) if data is not None else None
    network = Network(dense, *(rows.batch() if rows else dense.example()))
    about = {"method": method, "settings": asdict(chosen)}
    smaller: Any
    if isinstance(chosen, Obspa):
        read = rows.batches() if rows else _noise(dense, chosen)
        work = None
        if out is not None:
            files = {"file": _sha256(source), "data": data and _sha256(data)}
            work = Work(work_of(out), about | files)
        kept, smaller = obspa(network, read, chosen.remove, chosen.of, work=work, progress=progress)
    else:
        kept, smaller = _spa(network, chosen, rows)
    report = OnnxReport(
        f"{dense.name}: {method}, {chosen.remove:g} of {chosen.of}",
        {f.name: (len(kept.get(f.name, range(f.channels))), f.channels) for f in network.families},
        (network.size({}), network.size(kept)),
        (network.size({}, "flops"), network.size(kept, "flops")),
        tuple(network.unknown),
        network.stuck,
        time.perf_counter() - started,
    )
    if out is not None:
        smaller.write(out, {"prunekit": json.dumps(about)})
        report.save(Path(out).with_suffix(".json"), **about, provenance=provenance(chosen.seed))
        shutil.rmtree(work_of(out), ignore_errors=True)
    return report


def _sha256(path: StrPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _spa(network: Network, chosen: Spa, rows: Rows | None) -> tuple[dict[str, Tensor], Any]:
    model = network.model
    if chosen.criterion == "magnitude":
        scores = magnitude(model)
    elif chosen.criterion == "random":
        scores = by_chance(model, chosen.seed)
    elif rows is None or rows.labels is None:
        raise InputError(
            f"{chosen.criterion} goes by the gradient of a loss: give a .npz file with the inputs "
            f"and their 'labels'."
        )
    else:
        scores = (snip if chosen.criterion == "snip" else grasp)(model, rows.loss)
    kept = lowest(network, by_channel(network, scores, chosen.reduce), chosen.remove, chosen.of)
    return kept, network.cut(kept)


def _noise(model: Any, chosen: Obspa) -> Iterator[Any]:
    fixed = model.sizes_of(model.inputs[0].name)[0]
    return noise(model.example(), chosen.rows, fixed or BATCH, chosen.seed)


@dataclass(frozen=True, eq=False)
class Rows:
    """Data of a file's inputs.

    arrays: of each input in order, [rows, …].   labels: int64 [rows, …], or None.
    size: of the batches that are run.   few: the fewest that the file takes.
    """

    arrays: tuple[Tensor, ...]
    labels: Tensor | None
    size: int
    few: int

    @classmethod
    def read(cls, path: StrPath, network: OnnxNetwork, most: int, seed: int) -> Rows:
        """As many rows as are asked for, drawn by the seed; raises InputError for what is wrong."""
        try:
            found: Any = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"Cannot read '{path}' ({error}): give .npz or .npy.") from error
        inputs = network.example()
        names = [each.name for each in network.inputs]
        given = {names[0]: found} if isinstance(found, np.ndarray) else dict(found)
        labels = given.pop("labels", None)
        if given.keys() != set(names):
            raise InputError(
                f"'{path}' has the arrays {sorted(given)}, and {network.name} the inputs {names}: "
                f"give one for each."
            )
        arrays = []
        for name, example in zip(names, inputs, strict=True):
            array, wanted = given[name], network.sizes_of(name)
            fits = array.ndim == example.ndim and all(
                not w or w == n for w, n in zip(wanted[1:], array.shape[1:], strict=True)
            )
            if not fits:
                shown = [w or "any" for w in wanted[1:]]
                raise InputError(
                    f"'{name}' in '{path}' has the shape {list(array.shape)}, and the file takes "
                    f"rows of {shown}."
                )
            arrays.append(torch.from_numpy(array).to(example.dtype))
        count = len(arrays[0])
        fixed = network.sizes_of(names[0])[0]
        size = fixed or min(BATCH, count)
        if any(len(array) != count for array in arrays) or count < size:
            raise InputError(
                f"The arrays of '{path}' must have the same number of rows, {size} at least, got "
                f"{[len(array) for array in arrays]}."
            )
        if labels is not None and len(labels) != count:
            raise InputError(f"'{path}' has {count} rows and {len(labels)} labels.")
        order = np.random.default_rng(seed).permutation(count)
        drawn = torch.from_numpy(order[: max(1, min(most, count) // size) * size])
        told = None if labels is None else torch.from_numpy(labels)[drawn].long()
        return cls(tuple(array[drawn] for array in arrays), told, size, fixed or min(2, count))

    def batch(self) -> tuple[Tensor, ...]:
        """The first rows, as few as the file takes, to try things on."""
        return tuple(array[: self.few] for array in self.arrays)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """All rows."""
        yield from zip(*(torch.split(array, self.size) for array in self.arrays), strict=True)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the first output."""
        assert self.labels is not None, "checked by the caller"
        found = torch.cat([model(*batch)[0] for batch in self.batches()])
        return cross_entropy(found.flatten(0, -2).float(), self.labels.flatten())
