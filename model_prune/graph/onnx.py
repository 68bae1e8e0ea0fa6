"""An ONNX file in, a smaller ONNX file out.

    network = OnnxNetwork.read("net.onnx")
    found = Network(network, *network.example())
    smaller = found.cut(kept)       # any criterion's choice
    smaller.write("smaller.onnx")

The file's graph runs as a module of torch whose parameters are its initialisers under their own
names, so that all that holds for networks of torch holds for it. What is cut is taken out of the
file's own initialisers: nodes, names, metadata and versions stay as they are. Sizes that the graph
spells out (of Reshape, Expand, Split, Slice; the groups of a convolution) are mended where they
shrink: each is kept as a buffer with one number a position, which is traced and cut like a weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_prune.graph.onnx_operators import OPERATORS, numbers
from prune_core.errors import CheckpointError, InputError, require
from prune_core.storage import StrPath, atomic_write

LARGEST = 2**31 - 2**20  # bytes that one file of protobuf holds, with room for the graph
OLDEST = 13
SIZED = ("Reshape", "Expand", "Split", "Slice")  # whose sizes may shrink


class OnnxNetwork(nn.Module):
    """A file's graph as a module: `forward` takes its inputs in their order, gives its outputs.

    Parameters are its initialisers of floating point, buffers the statistics of its batch norms.
    """

    def __init__(self, proto: Any, name: str = "graph") -> None:
        """proto: onnx.ModelProto, not changed. Raises InputError for what is not supported."""
        super().__init__()
        from onnx.numpy_helper import to_array

        self.name, self._file = name, _File(proto)
        self._check()
        initialised = {tensor.name: tensor for tensor in proto.graph.initializer}
        statistics = {
            given
            for node in proto.graph.node
            if node.op_type == "BatchNormalization"
            for given in node.input[3:5]
        }
        factors = {
            given
            for node in proto.graph.node
            if node.op_type == "Resize"
            for given in node.input[1:]
        }
        self.constants: dict[str, Any] = {}
        self.paths: dict[str, str] = {}
        for i, (tensor_name, tensor) in enumerate(initialised.items()):
            array = to_array(tensor)
            if array.dtype.kind not in "fiubc":
                raise InputError(
                    f"{name} holds '{tensor_name}' as {array.dtype}, and numbers of float32, "
                    f"float64 and float16 are read here."
                )
            if array.dtype.kind != "f" or array.size < 2 or tensor_name in factors:
                self.constants[tensor_name] = array
            else:
                value = torch.from_numpy(np.array(array))
                made = value if tensor_name in statistics else nn.Parameter(value)
                self.paths[tensor_name] = _place(self, tensor_name, f"initializer_{i}", made)
        self.sizes = nn.Module()
        self.attributes = [_attributes(node) for node in proto.graph.node]
        said = {
            node.output[0]: own["value"]
            for node, own in zip(proto.graph.node, self.attributes, strict=True)
            if node.op_type == "Constant"
        }
        self.known: dict[str, Any] = self.constants | said
        self._measure()

    @classmethod
    def read(cls, path: StrPath) -> OnnxNetwork:
        """From a file, and the files of weights beside it that it names.

        Raises MissingExtra without the package onnx; CheckpointError for a file that cannot be
        read; InputError for more than 2 GB, and as the class.
        """
        onnx = require("onnx", extra="onnx", purpose="Reading ONNX files")
        try:
            proto = onnx.load(str(path))
        except Exception as error:  # protobuf's, the file system's and onnx's own
            raise CheckpointError(f"Cannot read '{path}' as ONNX ({error}).") from error
        size = sum(_bytes(tensor) for tensor in proto.graph.initializer)
        if size > LARGEST:
            raise InputError(
                f"'{path}' holds {size / 2**30:.1f} GiB of weights, and what is written here is "
                f"one file, of 2 GB at most: prune the network that it was exported from."
            )
        if proto.functions:
            from onnx.inliner import inline_local_functions

            proto = inline_local_functions(proto)
        _name_constants(proto.graph)
        return cls(proto, Path(path).name)

    @property
    def proto(self) -> Any:
        """onnx.ModelProto of the whole network, cut or not."""
        return self._file.proto

    def _check(self) -> None:
        opsets = {one.domain: one.version for one in self.proto.opset_import}
        version = opsets.get("", opsets.get("ai.onnx", 0))
        if version < OLDEST:
            raise InputError(
                f"{self.name} is of opset {version}, and {OLDEST} or newer is read here: convert "
                f"it with onnx.version_converter, or export it anew."
            )

    # -------------------------------------------------------------------- running
    @property
    def inputs(self) -> list[Any]:
        """onnx.ValueInfoProto of each input that is no initialiser."""
        known = {*self.paths, *self.constants}
        return [each for each in self.proto.graph.input if each.name not in known]

    def sizes_of(self, name: str) -> list[int]:
        """Of an input's axes; 0 where the file leaves one open."""
        (found,) = (each for each in self.inputs if each.name == name)
        return _type(found)[1]

    def example(self, batch: int = 2, open_size: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
        """Small inputs that the file says are of the right shape.

        Noise from N(0, 1); ones for whole numbers. An axis whose size the file leaves open is
        `batch` if it is the first, else `open_size`, and 8 times that of images.
        """
        draw = torch.Generator().manual_seed(seed)
        made = []
        for each in self.inputs:
            dtype, shape = _type(each)
            other = open_size * (8 if len(shape) > 3 else 1)
            sizes = [size or (batch if axis == 0 else other) for axis, size in enumerate(shape)]
            noise = torch.randn(sizes, generator=draw)
            made.append(noise.to(dtype) if dtype.is_floating_point else torch.ones(sizes).to(dtype))
        return tuple(made)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Raises InputError, naming the node, where an operator is used in a way not supported."""
        if len(inputs) != len(self.inputs):
            raise InputError(f"{self.name} takes {len(self.inputs)} inputs, got {len(inputs)}.")
        values: dict[str, Any] = {"": None, **self.constants}
        values |= {each.name: x for each, x in zip(self.inputs, inputs, strict=True)}
        values |= {name: _get(self, path) for name, path in self.paths.items()}
        for i, node in enumerate(self.proto.graph.node):
            given = [values[name] for name in node.input]
            try:
                found = self._node(i, node, given)
            except InputError as error:
                raise InputError(
                    f"{self.name}: {error}, at node '{node.name}' ({node.op_type}), which is not "
                    f"supported: a network of torch can be pruned as it is, see docs."
                ) from None
            outputs = found if isinstance(found, list | tuple) else [found]
            values |= dict(zip(node.output, outputs, strict=False))
        return tuple(_tensor(values[each.name]) for each in self.proto.graph.output)

    def _node(self, i: int, node: Any, given: list[Any]) -> Any:
        kind = node.op_type
        if kind in ("Shape", "Size") and isinstance(given[0], Tensor):
            shape = np.array(given[0].shape, dtype=np.int64)
            own = self.attributes[i]
            return shape[own.get("start", 0) : own.get("end")] if kind == "Shape" else shape.prod()
        if not any(isinstance(x, Tensor) for x in given):
            return self._host(i, node, given)
        if kind in SIZED:
            return self._sized(i, kind, given)
        if kind not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise InputError("an operator that is not known here")
        # What is known before the network runs is given as numbers where it says how, else as data.
        how = {"Clip", "Gather", "Pad", "Resize", "Squeeze", "Unsqueeze"}
        told = kind in how or kind.startswith("Reduce")
        rest = given[1:] if told else [_tensor(x) for x in given[1:]]
        return OPERATORS[kind](self.attributes[i], _tensor(given[0]), *rest)

    def _host(self, i: int, node: Any, given: list[Any]) -> Any:
        """What follows from the file alone, by onnx's own reference."""
        if node.op_type == "Constant":
            return self.attributes[i]["value"]
        from onnx.reference import ReferenceEvaluator

        opsets = {one.domain: one.version for one in self.proto.opset_import}
        single = ReferenceEvaluator(node, opsets=opsets)
        feeds = {name: x for name, x in zip(node.input, given, strict=True) if name}
        return single.run(None, feeds)

    # -------------------------------------------------------------------- sizes
    def _measure(self) -> None:
        """Run, and keep every size that may shrink as a buffer of one number a position.

        A size that is another with more rows is found out as the graph runs, and left to it.
        """
        self.dense: dict[str, int] = {}
        self.ranks: dict[int, int] = {}
        self.told: dict[int, list[int]] = {}
        self._measuring = True
        try:
            with torch.no_grad():
                self(*self.example(batch=3, open_size=7))
                others, self.told, self.dense = self.told, {}, {}
                self.sizes = nn.Module()
                self(*self.example())
        except (RuntimeError, IndexError, TypeError) as error:
            shapes = [tuple(x.shape) for x in self.example()]
            raise InputError(
                f"{self.name} cannot be run on an example of the sizes {shapes} ({error}): name "
                f"the sizes of its inputs in the file."
            ) from error
        self._measuring = False
        for i, shape in self.told.items():
            for axis, (one, other) in enumerate(zip(shape, others[i], strict=True)):
                if one != other and f"{i}_{axis}" in self.dense:
                    del self.dense[f"{i}_{axis}"]
                    delattr(self.sizes, f"{i}_{axis}")

    def _marked(self, key: str, x: Tensor, axis: int, value: Tensor | None = None) -> Tensor:
        """While measuring, keep a size; while tracing, say that it is that of this dimension."""
        size = x.shape[axis]
        if self._measuring and size > 1 and x.is_floating_point():
            self.sizes.register_buffer(key, torch.arange(size, dtype=x.dtype))
            self.dense[key] = size
        if key in self.dense and torch.compiler.is_exporting():
            shape = [1] * x.ndim
            shape[axis] = size
            size_of: Tensor = getattr(self.sizes, key)
            return x + size_of.view(shape)
        return x

    def _size(self, key: str) -> int:
        return len(getattr(self.sizes, key)) if key in self.dense else 1

    def shrunk(self, key: str) -> Tensor | None:
        """The positions that stay of a size, if any went."""
        if key not in self.dense:
            return None
        stays: Tensor = getattr(self.sizes, key)
        return stays if len(stays) < self.dense[key] else None

    def _sized(self, i: int, kind: str, given: list[Any]) -> Any:
        x = _tensor(given[0])
        if kind == "Slice":
            return self._slice(i, x, *given[1:])
        if kind == "Split":
            return self._split(i, x, *given[1:])
        shape = numbers(given[1])
        self.told[i] = told = list(shape)
        for axis in range(len(shape)):
            stays = self.shrunk(f"{i}_{axis}")
            shape[axis] = shape[axis] if stays is None else len(stays)
        if kind == "Reshape":
            if not self.attributes[i].get("allowzero", 0):
                shape = [size or x.shape[axis] for axis, size in enumerate(shape)]
            x = x.reshape(shape)
        else:
            x = x.expand(tuple(np.broadcast_shapes(tuple(x.shape), tuple(shape))))
        self.ranks[i] = x.ndim
        for axis, size in enumerate(told[-x.ndim :], x.ndim - len(told)):
            if size > 0:  # and not what is left, or as before
                x = self._marked(f"{i}_{axis}", x, axis)
        return x

    def _split(self, i: int, x: Tensor, sizes: Any = None) -> list[Tensor]:
        axis = self.attributes[i].get("axis", 0)
        outputs = len(self.proto.graph.node[i].output)
        whole = numbers(sizes) if sizes is not None else None
        if whole is None:
            # What would be unequal once channels are gone is known by its positions.
            each = -(-x.shape[axis] // outputs)
            whole = [each] * (outputs - 1) + [x.shape[axis] - each * (outputs - 1)]
        keys = [f"{i}_{k}" for k in range(outputs)]
        if any(self.shrunk(key) is not None for key in keys):
            whole = [self._size(key) for key in keys]
        parts = torch.split(x, whole, axis)
        return [self._marked(key, part, axis) for key, part in zip(keys, parts, strict=True)]

    def _slice(
        self, i: int, x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None
    ) -> Tensor:
        self.ranks[i] = x.ndim
        node = self.proto.graph.node[i]
        told = all(name in self.known for name in node.input[1:3])  # and not found out from sizes
        begin, stop = numbers(starts), numbers(ends)
        where = list(range(len(begin))) if axes is None else numbers(axes)
        pace = [1] * len(begin) if steps is None else numbers(steps)
        for start, end, axis, step in zip(begin, stop, where, pace, strict=True):
            axis = axis % x.ndim
            key = f"{i}_{axis}"
            stays = self.shrunk(key)
            size = x.shape[axis] if stays is None else self.dense[key]
            places = range(size)[start:end:step]
            if step != 1:
                x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
                continue
            first, last = _positions(stays, places)
            x = self._marked(key, x, axis) if told else x
            x = x.narrow(axis, first, last - first)
        return x

    # -------------------------------------------------------------------- writing
    def write(self, path: StrPath, about: Mapping[str, str] = {}) -> None:
        """The file with what is left of its weights, whole or not at all.

        about: added to its metadata.
        Raises InputError for more than 2 GB, and where the file would not do what this module does,
        in which case nothing is written.
        """
        proto = self.smaller()
        for key, value in about.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        example = self.example()
        with torch.no_grad():
            found, expected = OnnxNetwork(proto, self.name)(*example), self(*example)
        if not all(
            torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4)
            for a, b in zip(found, expected, strict=True)
        ):
            raise InputError(f"{self.name} cut would not give what its parts give: not written.")
        with atomic_write(path, "wb") as file:
            file.write(proto.SerializeToString())

    def smaller(self) -> Any:
        """onnx.ModelProto of what is left; what it said of sizes inside of the graph is gone."""
        from onnx.numpy_helper import from_array

        proto = copy.deepcopy(self.proto)
        tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        dense: dict[str, tuple[int, ...]] = {n: tuple(t.dims) for n, t in tensors.items()}
        for name, path in self.paths.items():
            value = _get(self, path).detach().cpu().numpy()
            tensors[name].CopyFrom(from_array(np.ascontiguousarray(value), name))
        for each in proto.graph.input:  # of old files, which name their weights there too
            if each.name in self.paths:
                shape = each.type.tensor_type.shape
                for dim, size in zip(shape.dim, tensors[each.name].dims, strict=True):
                    dim.dim_value = size
        del proto.graph.value_info[:]
        nodes = list(proto.graph.node)
        before = {name for node in nodes for name in node.input}
        del proto.graph.node[:]
        for i, node in enumerate(nodes):
            proto.graph.node.extend([*self._mended(i, node, proto.graph, dense), node])
        used = {name for node in proto.graph.node for name in node.input}
        left = [t for t in proto.graph.initializer if t.name in used or t.name not in before]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(left)
        return proto

    def _mended(
        self, i: int, node: Any, graph: Any, dense: Mapping[str, tuple[int, ...]]
    ) -> Sequence[Any]:
        """A node with the sizes of now, and nodes that have to go before it."""
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in self.paths:
            weight = _get(self, self.paths[node.input[1]])
            was = dense[node.input[1]]
            for attribute in node.attribute:
                if attribute.name == "group" and attribute.i > 1:
                    attribute.i = attribute.i * weight.shape[0] // was[0]
                if attribute.name == "kernel_shape":
                    assert list(attribute.ints) == list(weight.shape[2:])
        if node.op_type in ("Reshape", "Expand"):
            return self._mended_shape(i, node, graph)
        keys = [
            key for key in self.dense if key.startswith(f"{i}_") and self.shrunk(key) is not None
        ]
        if keys and node.op_type == "Split":
            sizes = [self._size(f"{i}_{k}") for k in range(len(node.output))]
            given = _added(graph, f"{node.output[0]}_sizes", np.array(sizes, dtype=np.int64))
            del node.input[1:]
            node.input.append(given)
            kept = [a for a in node.attribute if a.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        if keys and node.op_type == "Slice":
            known = self._known(node)
            axes = known[3] if len(known) > 3 and known[3] is not None else range(len(known[1]))
            bounds = []
            for start, end, axis in zip(known[1], known[2], axes, strict=True):
                key = f"{i}_{axis % self.ranks[i]}"
                if key in keys:
                    start, end = _positions(self.shrunk(key), range(self.dense[key])[start:end])
                bounds.append((start, end))
            for at, name in enumerate(("starts", "ends")):
                values = np.array([pair[at] for pair in bounds], dtype=np.int64)
                node.input[at + 1] = _added(graph, f"{node.output[0]}_{name}", values)
        return []

    def _mended_shape(self, i: int, node: Any, graph: Any) -> Sequence[Any]:
        """Put numbers where sizes shrank, and leave to the graph what it finds out as it runs."""
        from onnx.helper import make_node

        changed = {
            int(key.partition("_")[2]): len(stays)
            for key in self.dense
            if key.startswith(f"{i}_") and (stays := self.shrunk(key)) is not None
        }
        if not changed:
            return []
        known = self._known(node)[1]
        count = self.ranks[i] if known is None else len(known)
        values, chosen = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        for axis, size in changed.items():
            values[axis], chosen[axis] = size, True
        name = f"{node.output[0]}_shape"
        if known is not None:
            node.input[1] = _added(graph, name, np.where(chosen, values, known))
            return []
        parts = [_added(graph, f"{name}_{what}", x) for what, x in (("at", chosen), ("to", values))]
        where = make_node("Where", [*parts, node.input[1]], [name], name=name)
        node.input[1] = name
        return [where]

    def _known(self, node: Any) -> list[Any]:
        """Inputs of a node as numbers, None for those that are found out as the graph runs."""
        values = [self.known.get(name) for name in node.input]
        return [None if value is None else numbers(value) for value in values]


class _File:
    """What a file says, which copies of its network share."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto

    def __deepcopy__(self, memo: Any) -> _File:
        return self


def _name_constants(graph: Any) -> None:
    """Weights that stand in Constant nodes become initialisers under the same names."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        found = [a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
        if found and math.prod(found[0].dims) > 1:
            graph.initializer.add().CopyFrom(found[0])
            graph.initializer[-1].name = node.output[0]
        else:
            graph.node.append(node)


def _positions(stays: Tensor | None, places: range) -> tuple[int, int]:
    """Where a slice without gaps begins and ends among the positions that stay."""
    first, last = (places[0], places[-1] + 1) if places else (0, 0)
    if stays is None:
        return first, last
    return int((stays < first).sum()), int((stays < last).sum())


def _place(root: nn.Module, name: str, other: str, value: Tensor) -> str:
    """Hang a tensor into a tree of modules by its name, or if that is no path, by another."""
    *path, leaf = name.split(".")
    module, made = root, []
    for part in path:
        if not part or (hasattr(module, part) and part not in module._modules):
            return _place(root, other, other, value)
        if part not in module._modules:
            made.append((module, part))
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if not leaf or hasattr(module, leaf):
        return _place(root, other, other, value)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)
    return name


def _get(root: nn.Module, path: str) -> Any:
    where, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(where), leaf)


def _tensor(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value))


def _attributes(node: Any) -> dict[str, Any]:
    from onnx.helper import get_attribute_value
    from onnx.numpy_helper import to_array

    found = {}
    for attribute in node.attribute:
        value = get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        found[attribute.name] = to_array(value) if hasattr(value, "raw_data") else value
    if node.op_type == "Constant":
        (value,) = found.values()
        kind = np.float32 if isinstance(value, float) else None
        found = {"value": np.asarray(value, dtype=kind)}
    return found


def _type(value: Any) -> tuple[torch.dtype, list[int]]:
    """Of a ValueInfoProto; 0 for an axis whose size is left open."""
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    array = np.zeros(0, dtype=tensor_dtype_to_np_dtype(tensor.elem_type))
    return torch.from_numpy(array).dtype, [dim.dim_value for dim in tensor.shape.dim]


def _bytes(tensor: Any) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    each: int = tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(int(size) for size in tensor.dims) * each


def _added(graph: Any, name: str, value: Any) -> str:
    """A new initialiser under a name that is free."""
    from onnx.numpy_helper import from_array

    taken = {tensor.name for tensor in graph.initializer}
    while name in taken:
        name += "_"
    graph.initializer.append(from_array(np.asarray(value), name))
    return name
