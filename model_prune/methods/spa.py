"""SPA and OBSPA: coupled channels of any network, scored by any criterion, cut at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from model_prune.core.allocate import check_share
from model_prune.core.compensate import inverse_factor, least_squares, rise
from model_prune.core.mode import evaluating
from model_prune.core.statistics import Gram
from model_prune.graph.network import Family, Kept, Network
from prune_core.errors import InputError

Scores = Mapping[str, Tensor]  # of weights, by parameter, in its shape; higher ones are kept
Table = Mapping[str, Tensor]  # of channels, by family
Reduce = Literal["sum", "mean", "max", "l2"]
Of = Literal["parameters", "flops"]
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "l2": lambda x: x.square().sum(1).sqrt(),
}


# ------------------------------------------------------------------------------ criteria
def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """|w| of every parameter."""
    return {name: weight.detach().abs() for name, weight in model.named_parameters()}


def snip(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """|w · ∂loss/∂w|: how much the loss would change, to first order.

    Source: Lee et al., "SNIP" (2018, arXiv:1810.02340), equation 4; before training or after.
    """
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(loss(model), list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if slope is None else (weight * slope).detach().abs()
        for (name, weight), slope in zip(weights.items(), found, strict=True)
    }


def grasp(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """w · (H g): weights without which the gradient would grow are the first to go.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow"
    (GraSP, 2020, arXiv:2002.07376), equation 8, whose score this is with the sign turned, as here
    higher ones are kept.
    """
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(
        loss(model), list(weights.values()), create_graph=True, allow_unused=True
    )
    norm = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum() / 2
    found = torch.autograd.grad(norm, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if product is None else (weight * product).detach()
        for (name, weight), product in zip(weights.items(), found, strict=True)
    }


def by_channel(network: Network, scores: Scores, reduce: Reduce = "sum") -> dict[str, Tensor]:
    """Importance of every channel: over all weights of all its parameters, float64 [channels].

    Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955), section 3.2.
    """
    table = {}
    for family in network.families:
        parts = []
        for (name, dim), positions in family.members.items():
            if name in scores:
                rows = scores[name].movedim(dim, 0).double().cpu()
                parts.append(rows.reshape(len(rows), -1)[positions].flatten(1))
        table[family.name] = REDUCE[reduce](torch.cat(parts, 1))
    return table


# ------------------------------------------------------------------------------ how much
def lowest(
    network: Network, table: Table, remove: float, of: Of = "parameters", *, normalise: bool = True
) -> dict[str, Tensor]:
    """The channels that stay when those of lowest importance go, over the whole network.

    table: of the families that may be cut.
    remove: share of the network's parameters, or of the operations of a forward pass (those of
    products, as torch counts them), met with the first channel that does.
    normalise: divide the importance of each family by its mean, so that families can be compared.
    The best channel of each family stays.

    Raises InputError for a share out of [0, 1), and for more than there is to cut.
    """
    check_share("remove", remove)
    names = list(table)
    values = [np.asarray(table[name], dtype=np.float64).copy() for name in names]
    for value in values:
        if normalise and value.mean() != 0:
            value /= abs(value.mean())
        value[value.argmax()] = np.inf
    flat = np.concatenate(values) if values else np.zeros(0)
    order, ends = np.argsort(flat, kind="stable"), np.cumsum([len(v) for v in values])[:-1]
    target = (1 - remove) * network.size({}, of)

    def without(count: int) -> dict[str, Tensor]:
        stays = np.ones(len(flat), dtype=bool)
        stays[order[:count]] = False
        parts = np.split(stays, ends) if names else []
        return {
            name: torch.from_numpy(np.flatnonzero(part))
            for name, part in zip(names, parts, strict=True)
            if not part.all()
        }

    low, high = 0, int(np.isfinite(flat).sum())
    if network.size(without(high), of) > target:
        raise InputError(
            f"Without all channels that may go there would still be more than 1 - {remove:g} of "
            f"the {of}: remove less, or see what is stuck, {network.stuck or 'nothing'}, and which "
            f"operators are unknown, {network.unknown or 'none'}."
        )
    while low < high:  # the fewest that are enough
        middle = (low + high) // 2
        low, high = (
            (low, middle) if network.size(without(middle), of) <= target else (middle + 1, high)
        )
    return without(low)


# ------------------------------------------------------------------------------ OBSPA
@dataclass(frozen=True, eq=False)
class Readers:
    """The modules that read channels, and the second moments of what they read.

    weights: by parameter, as [out, columns].   grams: of its inputs, [columns, columns].
    each: columns of a position of the parameter's second dimension.
    """

    weights: dict[str, Tensor]
    grams: dict[str, Tensor]
    each: dict[str, int]

    @classmethod
    def of(cls, network: Network, inputs: Iterable[Any]) -> Readers:
        """Gather them over batches of inputs, each the arguments of the network's forward."""
        modules = {
            name: network.model.get_submodule(name.removesuffix(".weight"))
            for family in network.families
            for name, dim in family.members
            if dim == 1 and name.endswith(".weight")
        }
        modules = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
        grams = {name: Gram() for name in modules}
        model = network.model
        with torch.no_grad(), evaluating(model), _watching(modules, grams):
            for batch in inputs:
                model(*batch if isinstance(batch, list | tuple) else (batch,))
        weights = {name: model.get_parameter(name).detach().float() for name in modules}
        return cls(
            {name: weight.flatten(1) for name, weight in weights.items()},
            {name: gram.total() for name, gram in grams.items()},
            {name: weight[0, 0].numel() for name, weight in weights.items()},
        )

    def columns(self, name: str, positions: Tensor) -> Tensor:
        """Of positions [...]: [..., columns of all]."""
        inner = torch.arange(self.each[name])
        return (positions[..., None] * self.each[name] + inner).flatten(-2)

    def costs(self, family: Family) -> Tensor | None:
        """What the error of all readers rises by without a channel, float64 [channels].

        None where no reader is a linear layer or a convolution. Source: as of `obspa`.
        """
        total: Tensor | None = None
        for (name, dim), positions in family.members.items():
            if dim == 1 and name in self.weights:
                factor = inverse_factor(self.grams[name])
                columns = self.columns(name, positions)
                cost = rise(self.weights[name], factor.T @ factor, columns).double()
                total = cost if total is None else total + cost
        return total

    def refitted(self, network: Network, kept: Kept) -> dict[str, Tensor]:
        """Weights that make up for channels that go, by parameter; their columns are zero."""
        new = {}
        for (name, dim), gone in network.gone(kept).items():
            if dim == 1 and name in self.weights:
                weight = self.weights[name]
                stays = torch.ones(weight.shape[1], dtype=torch.bool)
                stays[self.columns(name, gone)] = False
                fitted = least_squares(weight, self.grams[name], stays.nonzero().flatten())
                new[name] = fitted.view(network.model.get_parameter(name).shape)
        return new


@contextmanager
def _watching(modules: Mapping[str, Any], grams: Mapping[str, Gram]) -> Iterator[None]:
    def watch(gram: Gram) -> Callable[[Any, Any], None]:
        return lambda module, args: gram.update(_rows(module, args[0]))

    handles = [
        module.register_forward_pre_hook(watch(grams[name])) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(module: Any, x: Tensor) -> Tensor:
    """What a layer multiplies its weights with, [rows, columns]."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2).float()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = pad(x.float(), module._reversed_padding_repeated_twice, mode=mode)
    patches = unfold(padded, module.kernel_size, module.dilation, stride=module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def obspa(
    network: Network, inputs: Iterable[Any], remove: float, of: Of = "parameters"
) -> nn.Module:
    """Cut a trained network without training: what stays is refitted to what the whole layer gave.

    inputs: batches for its forward: of data like that it was trained on, of other data, or noise.
    Source: Wang et al., "Structurally prune anything" (OBSPA, 2024, arXiv:2403.18955), section 3.3.
    Differs: columns that stay are refitted at once, which is where one update after another ends.

    Raises InputError as `lowest`.
    """
    readers = Readers.of(network, inputs)
    costs = {family.name: readers.costs(family) for family in network.families}
    table = {name: cost for name, cost in costs.items() if cost is not None}
    kept = lowest(network, table, remove, of)
    return network.cut(kept, readers.refitted(network, kept))
