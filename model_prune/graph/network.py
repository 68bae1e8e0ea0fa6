"""Any network of torch: its families of channels, masked or cut out of its own modules."""

from __future__ import annotations

import copy
import itertools
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from model_prune.core.mode import evaluating
from model_prune.graph.channels import Trace, Traced
from model_prune.graph.operators import CONSTANTS, COPIES, MOVES, RULES
from prune_core.errors import InputError, unknown_name

Member = tuple[str, int]  # a parameter or buffer by its name, and one of its dimensions


@dataclass(frozen=True, eq=False)
class Family:
    """Channels that are made and read by the same parameters.

    members: the positions of each channel in a dimension of a tensor, int64 [channels, positions].
    """

    name: str
    members: Mapping[Member, Tensor]

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(next(iter(self.members.values())))

    def __str__(self) -> str:
        kinds = ("rows", "columns")
        places = (f"{name} ({kinds[dim] if dim < 2 else dim})" for name, dim in self.members)
        return f"{self.channels} channels of {', '.join(places)}"


Kept = Mapping[str, Tensor]  # by family, the channels that stay, ascending; absent: all


class Network:
    """A network and the families of channels that can be cut out of it.

    model: it is traced in evaluation, and left as it was.
    example: arguments of its forward, small ones, as it is run on them a few times.
    unknown: operators that no rule is known for; what they read stays.
    stuck: families that cannot be cut, as the network's own code has fixed sizes in it, and what
    it said when it was tried.

    Raises InputError for a network that torch.export cannot trace.
    """

    def __init__(self, model: nn.Module, *example: Any, **named: Any) -> None:
        self.model, self._example, self._named = model, example, named
        trace, tensors = _traced(model, example, named)
        self.unknown = sorted(trace.unknown)
        self.stuck: dict[str, str] = {}
        self.families = self._that_can_be_cut(_families(trace, tensors))

    def family(self, name: str) -> Family:
        """By its name; raises UnknownName for one that is not there."""
        for family in self.families:
            if family.name == name:
                return family
        raise unknown_name("family of channels", name, [family.name for family in self.families])

    def size(self, kept: Kept, of: Literal["parameters", "flops"] = "parameters") -> int:
        """What is left: parameters, or operations of products in a forward pass on the example."""
        if of == "flops":
            counter = FlopCounterMode(display=False)
            with counter:
                self._run(self.cut(kept))
            return int(counter.get_total_flops())
        gone = self.gone(kept)
        return sum(
            math.prod(size - len(gone.get((name, dim), ())) for dim, size in enumerate(p.shape))
            for name, p in self.model.named_parameters()
        )

    def masked(self, kept: Kept) -> nn.Module:
        """A copy in which all weights of the channels that go are zero."""
        model = copy.deepcopy(self.model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for (name, dim), positions in self.gone(kept).items():
                if name in parameters:
                    parameters[name].index_fill_(dim, positions.to(parameters[name].device), 0)
        return model

    def cut(self, kept: Kept, weights: Mapping[str, Tensor] = {}) -> nn.Module:
        """A copy without the channels that go: the same classes with smaller tensors.

        weights: new values of whole parameters, before anything is cut.
        """
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight)
        parts = itertools.groupby(sorted(self.gone(kept).items()), lambda part: part[0][0])
        gone = {name: {dim: at for (_, dim), at in members} for name, members in parts}
        tensors = all_tensors(model)
        replace(model, {name: _without(tensors[name], at) for name, at in gone.items()})
        return model

    def gone(self, kept: Kept) -> dict[Member, Tensor]:
        """Positions that go; raises InputError for channels that are not there, or no family."""
        gone: dict[Member, Tensor] = {}
        for name, stays in kept.items():
            family = self.family(name)
            mask = torch.ones(family.channels, dtype=torch.bool)
            if not len(stays) or stays.min() < 0 or stays.max() >= family.channels:
                raise InputError(
                    f"Of '{name}' channels of 0 to {family.channels - 1} may stay, and one at "
                    f"least: got {stays.tolist()}."
                )
            mask[stays] = False
            for member, positions in family.members.items():
                more = positions[mask].flatten()
                gone[member] = torch.cat([gone[member], more]) if member in gone else more
        return gone

    # -------------------------------------------------------------------- trial
    def _that_can_be_cut(self, families: list[Family]) -> list[Family]:
        """Try: code that reshapes to sizes of its own stays behind when tensors get smaller."""
        self.families = families
        found = self._passing(families)
        together = self._trial(found) if self.stuck else None
        if together is not None:  # what each could do without, all together cannot
            self.stuck |= {family.name: together for family in found}
            return []
        return found

    def _passing(self, families: list[Family]) -> list[Family]:
        said = self._trial(families)
        if said is None:
            return families
        if len(families) == 1:
            self.stuck[families[0].name] = said
            return []
        half = len(families) // 2
        return self._passing(families[:half]) + self._passing(families[half:])

    def _trial(self, families: Sequence[Family]) -> str | None:
        """What is wrong without every second channel of each, and without other shares of them."""
        trials = (
            {f.name: torch.arange(0, f.channels, 2) for f in families},
            {
                f.name: torch.arange(f.channels // 2 if i % 2 == 0 else 1 % f.channels, f.channels)
                for i, f in enumerate(families)
            },
        )
        try:
            for kept in trials:
                cut, masked = self._run(self.cut(kept)), self._run(self.masked(kept))
                if not all(
                    a.shape == b.shape
                    and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
                    for a, b in zip(cut, masked, strict=True)
                ):
                    return "what comes out is not what it is when they are zero"
        except (RuntimeError, ValueError, IndexError, AttributeError, AssertionError) as error:
            return _first_line(error)
        return None

    @torch.no_grad()
    def _run(self, model: nn.Module) -> list[Tensor]:
        leaves, _ = tree_flatten(model.eval()(*self._example, **self._named))
        return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def replace(model: nn.Module, smaller: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of others, and say in the modules' attributes what sizes they have.

    smaller: by name; of tensors of several names one will do, and they stay one.
    """
    tensors = all_tensors(model)
    made = {id(tensors[name]): tensor for name, tensor in smaller.items()}
    changed = {}
    for name, tensor in tensors.items():
        if id(tensor) in made:
            where, _, leaf = name.rpartition(".")
            new = made[id(tensor)]
            if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                new = made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            changed[where] = model.get_submodule(where)
            setattr(changed[where], leaf, new)
    for module in changed.values():
        _resize(module)


def _without(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    smaller = tensor.detach()
    for dim, positions in gone.items():
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stays[positions] = False
        smaller = smaller.index_select(dim, stays.nonzero().flatten().to(tensor.device))
    return smaller


def _resize(module: nn.Module) -> None:
    """Say in a module's attributes what sizes its tensors have."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        if module.transposed:
            module.in_channels, module.out_channels = module.weight.shape[:2]
        else:
            written = module.weight.shape[0]
            if module.groups > 1:  # whole groups went
                module.groups = module.groups * written // module.out_channels
            module.out_channels = written
            module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _NormBase):
        module.num_features = len(module.running_mean if module.weight is None else module.weight)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        module.input_size, module.hidden_size = (
            getattr(module, f"weight_{kind}_l0").shape[1] for kind in ("ih", "hh")
        )
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = (
            matrix.shape[1] for matrix in (module.weight_hh, module.weight_ih)
        )


# ------------------------------------------------------------------------------ tracing
def _traced(
    model: nn.Module, example: Sequence[Any], named: Mapping[str, Any]
) -> tuple[Trace, dict[str, Traced]]:
    """The trace, and the tensors of the model by their names."""
    try:
        with evaluating(model), torch.no_grad(), warnings.catch_warnings():
            # nn.LSTM and its kin list their weights anew, which export says and undoes.
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            program = torch.export.export(model, tuple(example), dict(named), strict=False)
    except Exception as error:  # torch.export raises errors of every kind
        raise InputError(
            f"torch.export cannot trace {type(model).__name__} ({_first_line(error)}): its forward "
            f"must not depend on what its inputs say, and the example must be arguments that it "
            f"takes."
        ) from error
    trace, tensors, shared = Trace(), {}, {}
    own = all_tensors(model)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in own:
                tensor = own[spec.target]
                if id(tensor) not in shared:
                    numbers = tensor.is_floating_point()  # and no list of positions
                    shared[id(tensor)] = trace.new(tensor.shape) if numbers else _stays(tensor)
                values[node] = tensors[spec.target] = shared[id(tensor)]
            else:
                values[node] = _stays(node.meta.get("val"))
        elif node.op == "call_function":
            args, kwargs = (map_arg(x, values.__getitem__) for x in (node.args, node.kwargs))
            values[node] = _result(trace, node, args, kwargs)
        elif node.op == "output":
            trace.opaque(_leaves(map_arg(node.args, values.__getitem__)), ())
        else:
            values[node] = _stays(node.meta.get("val"))
    # Two names of one tensor are traced as one, and are to be cut as one.
    for name, tensor in own.items():
        if id(tensor) in shared:
            tensors[name] = shared[id(tensor)]
    return trace, tensors


def _result(trace: Trace, node: Any, args: Any, kwargs: Any) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    value, inputs = node.meta.get("val"), _leaves((args, kwargs))
    outputs, _ = tree_flatten(value)
    if not any(isinstance(x, Tensor) for x in outputs):
        return value  # a size
    name = _called(node.target)
    shape = tuple(value.shape) if isinstance(value, Tensor) else value
    if name in CONSTANTS:
        return trace.new(shape)
    if not inputs:
        return _stays(value)
    if name in COPIES:
        return args[0]
    if name in MOVES and isinstance(args[0], Traced):
        move = torch.reshape if name in ("view", "_unsafe_view") else node.target
        return trace.moved(args[0], lambda counted: move(counted, *args[1:], **kwargs))
    if name in RULES:
        return RULES[name](trace, shape, *args, **kwargs)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return trace.pointwise(inputs, shape)
    if any(labels is not None for x in inputs for labels in x.labels):
        trace.unknown.add(name)
    trace.opaque(inputs, ())
    return _stays(value)


def _called(target: Any) -> str:
    """An operator's name, whatever its types, in place or not."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).removesuffix("_")


def _stays(value: Any) -> Any:
    """Tensors of which nothing may be cut."""
    return tree_map_only(Tensor, lambda x: Traced(tuple(x.shape), [None] * x.ndim), value)


def _leaves(values: Any) -> list[Traced]:
    leaves, _ = tree_flatten(values, is_leaf=lambda x: isinstance(x, Traced))
    return [leaf for leaf in leaves if isinstance(leaf, Traced)]


def _families(trace: Trace, tensors: Mapping[str, Traced]) -> list[Family]:
    """Channels by what they are made of; what only one tensor knows of stays."""
    channels = trace.channels()
    found: dict[int, dict[Member, NDArray[np.int64]]] = {}
    for name, tensor in tensors.items():
        for dim, labels in enumerate(tensor.labels):
            if labels is not None:
                of = channels[labels]
                order = np.argsort(of, kind="stable")
                numbers, starts = np.unique(of[order], return_index=True)
                for number, at in zip(numbers, np.split(order, starts[1:]), strict=True):
                    if number:
                        found.setdefault(int(number), {})[name, dim] = at
    alike: dict[Any, list[dict[Member, NDArray[np.int64]]]] = {}
    for number in sorted(found):
        members = found[number]
        if len({id(tensors[name]) for name, _ in members}) > 1:
            kind = tuple((member, len(at)) for member, at in members.items())
            alike.setdefault(kind, []).append(members)
    families: list[Family] = []
    for group in alike.values():
        stacked = {
            member: torch.from_numpy(np.stack([members[member] for members in group]))
            for member in group[0]
        }
        families.append(Family(_name(stacked, families), stacked))
    return families


def _name(members: Mapping[Member, Tensor], others: Sequence[Family]) -> str:
    """After the tensor that comes first, and where there are several of it, a number."""
    first = next(iter(members))[0].removesuffix(".weight")
    same = sum(other.name.split("#")[0] == first for other in others)
    return f"{first}#{same + 1}" if same else first
