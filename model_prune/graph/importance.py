"""SPA: importance of coupled channels of any network, by any criterion, and how many go.

Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_prune.core.allocate import check_share
from model_prune.graph.network import Network
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
    """|w · ∂loss/∂w|: how much the loss would change, to first order; of trained parameters.

    Source: Lee et al., "SNIP" (2018, arXiv:1810.02340), equation 4; before training or after.
    """
    weights = _trained(model)
    found = torch.autograd.grad(loss(model), list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if slope is None else (weight * slope).detach().abs()
        for (name, weight), slope in zip(weights.items(), found, strict=True)
    }


def grasp(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """w · (H g): weights without which the gradient would grow are the first to go.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow"
    (GraSP, 2020, arXiv:2002.07376), equation 8, whose score this is with the sign turned, as here
    higher ones are kept. H and g are of the parameters that are trained.
    """
    weights = _trained(model)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        slopes = torch.autograd.grad(
            loss(model), list(weights.values()), create_graph=True, allow_unused=True
        )
        squares = [slope.square().sum() for slope in slopes if slope is not None]
        norm = torch.stack(squares).sum() / 2
        found = torch.autograd.grad(norm, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if product is None else (weight * product).detach()
        for (name, weight), product in zip(weights.items(), found, strict=True)
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def by_chance(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Of every weight a number drawn uniformly: the baseline of all others."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=draw) for name, weight in model.named_parameters()
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
        if not parts:
            raise InputError(
                f"Nothing of the channels of '{family.name}' has a score: all their parameters are "
                f"frozen."
            )
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
    normalise: divide the importance of each family by its mean size, so that families compare.
    The best channel of each family stays.

    Raises InputError for a share out of [0, 1), and for more than there is to cut.
    """
    check_share("remove", remove)
    names = list(table)
    values = [np.asarray(table[name], dtype=np.float64).copy() for name in names]
    for value in values:
        if normalise and value.any():
            value /= np.abs(value).mean()  # of a score with signs the mean may be next to nothing
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
