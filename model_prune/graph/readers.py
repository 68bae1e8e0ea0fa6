"""OBSPA: channels that cost their readers least go, and the readers make up for them.

Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from model_prune.core.compensate import inverse_factor, least_squares, rise
from model_prune.core.mode import evaluating
from model_prune.core.statistics import Gram
from model_prune.core.work import Tensors, Work
from model_prune.graph.importance import Of, lowest
from model_prune.graph.network import Kept, Network
from prune_core.errors import InputError


@dataclass(frozen=True, eq=False)
class Readers:
    """The weights that read channels, and the second moments of what they read.

    Those of linear layers and products, convolutions without groups, and recurrent cells.
    weights: by parameter, as [out, columns].   grams: of its inputs, [columns, columns].
    dims: the dimension of the parameter that reads.   each: columns of a position in it.
    work: of the moments and of what each reader's channels cost, so that a stopped run goes on.
    """

    weights: dict[str, Tensor]
    grams: dict[str, Tensor]
    dims: dict[str, int]
    each: dict[str, int]
    work: Work

    @classmethod
    def of(
        cls,
        network: Network,
        inputs: Iterable[Any],
        *,
        work: Work | None = None,
        progress: bool = True,
    ) -> Readers:
        """Gather them over batches of inputs, each the arguments of the network's forward."""
        work = work or Work()
        if 0 not in work:
            work[0] = _moments(network, inputs, progress)
        read = {key.partition(" "): gram for key, gram in work[0].items()}
        dims = {name: int(dim) for dim, _, name in read}
        moved = {
            name: network.model.get_parameter(name).detach().float().movedim(dim, 1)
            for name, dim in dims.items()
        }
        return cls(
            {name: weight.flatten(1) for name, weight in moved.items()},
            {name: gram.to(moved[name].device) for (_, _, name), gram in read.items()},
            dims,
            {name: weight[0, 0].numel() for name, weight in moved.items()},
            work,
        )

    def columns(self, name: str, positions: Tensor) -> Tensor:
        """Of positions [...]: [..., columns of all]."""
        inner = torch.arange(self.each[name])
        return (positions[..., None] * self.each[name] + inner).flatten(-2)

    def costs(self, network: Network, *, progress: bool = True) -> dict[str, Tensor]:
        """What the error of all readers rises by without a channel, by family, float64 [channels].

        Of families that something reads which is known here. Source: as of `obspa`.
        """
        total: dict[str, Tensor] = {}
        shown = tqdm(self.weights, "costs", unit="reader", disable=None if progress else True)
        for number, name in enumerate(shown, start=1):
            if number not in self.work:
                self.work[number] = self._costs(network, name)
            for family, cost in self.work[number].items():
                total[family] = total.get(family, 0) + cost
        return {f.name: total[f.name] for f in network.families if f.name in total}

    def _costs(self, network: Network, name: str) -> Tensors:
        """To one reader."""
        factor = inverse_factor(self.grams[name])
        inverse = factor.T @ factor
        return {
            family.name: rise(
                self.weights[name], inverse, self.columns(name, family.members[read])
            ).double()
            for family in network.families
            if (read := (name, self.dims[name])) in family.members
        }

    def refitted(self, network: Network, kept: Kept) -> dict[str, Tensor]:
        """Weights that make up for channels that go, by parameter; their columns are zero."""
        new = {}
        for (name, dim), gone in network.gone(kept).items():
            if self.dims.get(name) == dim:
                weight, shape = self.weights[name], network.model.get_parameter(name).shape
                stays = torch.ones(weight.shape[1], dtype=torch.bool)
                stays[self.columns(name, gone)] = False
                fitted = least_squares(weight, self.grams[name], stays.nonzero().flatten())
                moved = (*shape[dim : dim + 1], *shape[2:])
                new[name] = fitted.view(len(weight), *moved).movedim(1, dim)
        return new


def _moments(network: Network, inputs: Iterable[Any], progress: bool) -> Tensors:
    """By the dimension that reads and the parameter's name, "1 fc.weight"."""
    parameters = dict(network.model.named_parameters(remove_duplicate=False))
    members = (member for family in network.families for member in family.members)
    watch = _Watch({(id(parameters[n]), dim): n for n, dim in members if n in parameters})
    with torch.no_grad(), evaluating(network.model), watch:
        for batch in tqdm(inputs, "read", unit="batch", disable=None if progress else True):
            network.model(*batch if isinstance(batch, list | tuple) else (batch,))
    return {f"{dim} {name}": watch.grams[name].total() for name, dim in watch.dims.items()}


class _Watch(TorchFunctionMode):
    """Second moments of what weights of interest are multiplied with, whoever calls the product."""

    def __init__(self, names: Mapping[tuple[int, int], str]) -> None:
        super().__init__()
        self.names = names
        self.dims: dict[str, int] = {}
        self.grams: dict[str, Gram] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads = READS.get(getattr(func, "__name__", ""))
        for weight, dim, rows in reads(result, *args, **(kwargs or {})) if reads else ():
            name = self.names.get((id(weight), dim))
            if name is not None and self.dims.setdefault(name, dim) == dim:
                self.grams.setdefault(name, Gram()).update(rows())
        return result


Read = tuple[Tensor, int, Callable[[], Tensor]]  # a weight, the dimension that reads, and what


def _of_linear(_: Any, x: Tensor, weight: Tensor, *__: Any, **___: Any) -> Iterator[Read]:
    yield weight, 1, lambda: x.flatten(0, -2).float()


def _of_product(_: Any, x: Tensor, weight: Tensor, **__: Any) -> Iterator[Read]:
    if isinstance(weight, Tensor) and weight.ndim == 2:
        yield weight, 0, lambda: x.flatten(0, -2).float()


def _of_convolution(
    _: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Read]:
    dims = weight.ndim - 2
    if groups > 1 or dims > 2:
        return

    def rows() -> Tensor:
        """Patches, [positions of the output, columns]; a sequence is an image of one row."""
        steps, apart = (_each(value, dims) for value in (stride, dilation))
        size = tuple(weight.shape[2:])
        if isinstance(padding, str):
            whole = [
                a * (k - 1) if padding == "same" else 0 for a, k in zip(apart, size, strict=True)
            ]
            around = [n for w in reversed(whole) for n in (w // 2, w - w // 2)]
        else:
            around = [n for w in reversed(_each(padding, dims)) for n in (w, w)]
        padded = pad(x.float(), around)
        if dims == 1:
            padded, size, steps, apart = padded[:, :, None], (1, *size), (1, *steps), (1, *apart)
        patches = unfold(padded, size, apart, stride=steps)
        return patches.transpose(1, 2).flatten(0, 1)

    yield weight, 1, rows


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _of_cell(
    _: Any, x: Tensor, state: Any, weight_ih: Tensor, weight_hh: Tensor, *__: Any, **___: Any
) -> Iterator[Read]:
    before = state[0] if isinstance(state, list | tuple) else state
    yield weight_ih, 1, lambda: x.float()
    yield weight_hh, 1, lambda: before.float()


def _of_sequence(
    result: Any, x: Tensor, state: Any, weights: Any, *settings: Any, **_: Any
) -> Iterator[Read]:
    """Of several layers or directions only what the first reads is seen from outside."""
    if not isinstance(weights, list | tuple):
        return  # a sequence that is packed
    _, layers, _, _, bidirectional, batch_first = settings
    yield weights[0], 1, lambda: x.flatten(0, -2).float()
    if layers == 1 and not bidirectional:
        first = state[0] if isinstance(state, list | tuple) else state
        after = result[0].transpose(0, 1) if batch_first else result[0]
        yield weights[1], 1, lambda: torch.cat([first, after[:-1]]).flatten(0, -2).float()


READS: dict[str, Callable[..., Iterator[Read]]] = {
    "linear": _of_linear,
    "matmul": _of_product,
    "addmm": lambda result, bias, x, weight, **_: _of_product(result, x, weight),
    **dict.fromkeys(("conv1d", "conv2d"), _of_convolution),
    **dict.fromkeys(("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"), _of_cell),
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), _of_sequence),
}


def obspa(
    network: Network,
    inputs: Iterable[Any],
    remove: float,
    of: Of = "parameters",
    *,
    work: Work | None = None,
    progress: bool = True,
) -> tuple[dict[str, Tensor], nn.Module]:
    """Cut a trained network without training: what stays is refitted to what the whole layer gave.

    inputs: batches for its forward: of data like that it was trained on, of other data, or `noise`.
    work: a folder for what was found, so that a stopped run goes on after it.
    Source: Wang et al., "Structurally prune anything" (OBSPA, 2024, arXiv:2403.18955), section 3.3.
    Differs: columns that stay are refitted at once, which is where one update after another ends.

    Returns the channels that stay, by family, and the smaller network. Raises InputError as
    `lowest`.
    """
    readers = Readers.of(network, inputs, work=work, progress=progress)
    kept = lowest(network, readers.costs(network, progress=progress), remove, of)
    return kept, network.cut(kept, readers.refitted(network, kept))


def noise(example: Sequence[Tensor], rows: int, batch: int = 32, seed: int = 0) -> Iterator[Any]:
    """Batches of as many rows of noise from N(0, 1), shaped like an example: for no data at all.

    Raises InputError for inputs that are whole numbers, of which noise would say nothing.
    """
    if not all(x.is_floating_point() for x in example):
        raise InputError(
            "Noise stands in for data where all inputs are of floating point; these have whole "
            "numbers, such as tokens: give some data."
        )
    draw = torch.Generator().manual_seed(seed)
    for start in range(0, rows, batch):
        count = min(batch, rows - start)
        yield tuple(torch.randn(count, *x.shape[1:], generator=draw).to(x) for x in example)


@torch.no_grad()
def settle(model: nn.Module, inputs: Iterable[Any]) -> nn.Module:
    """Give a cut network's batch norms the statistics of what they see now; no weight is changed.

    inputs: batches for its forward. Returns the model.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(norm, norm.momentum) for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # an average over all batches
            norm.train()
        for batch in inputs:
            model(*batch if isinstance(batch, list | tuple) else (batch,))
    for norm, momentum in before:
        norm.momentum = momentum
    return model
