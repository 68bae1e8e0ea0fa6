"""Wanda, SparseGPT and FLAP by the loops of their official codes, as peers to measure against.

Written anew for the transformers of today after reading locuslab/wanda, IST-DASLab/sparsegpt and
CASIA-IVA-Lab/FLAP, with what costs them time: one window at a time, two buffers of hidden states,
an explicit causal mask, a hook and statistics of its own for every matrix, every layer run twice
(before and after it is pruned), whole sorts, a loop over the groups of n:m and a factorisation
for every matrix. Selections compare as theirs do: SparseGPT and FLAP remove what is not above a
threshold, one more than counted and all ties. Two things differ: float32 on the CPU, where theirs
load half precision on a GPU, and FLAP's units, KV groups with their own cost, where theirs are
query heads of 128 without GQA.

Each function takes a causal language model of Llama's form and int64 windows [n, T], and gives
the seconds of each phase: `forward` (layers), `statistics` (in the hooks) and `solve`. Wanda and
SparseGPT make weights zero in place.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Seconds = dict[str, float]

GROUPS = (  # of true_sequential, in their order
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)


class Norms:
    """Wanda's: the squared norm of each input column, a running mean over windows."""

    def __init__(self, linear: nn.Linear) -> None:
        self.squares = torch.zeros(linear.in_features)
        self.windows = 0

    def add(self, x: Tensor) -> None:
        """x: [T, in] of one window."""
        self.squares *= self.windows / (self.windows + 1)
        self.windows += 1
        self.squares += torch.norm(x.t(), dim=1) ** 2 / self.windows


class Gram:
    """SparseGPT's: 2 X^T X / windows, rescaled with each window."""

    def __init__(self, linear: nn.Linear) -> None:
        self.gram = torch.zeros(linear.in_features, linear.in_features)
        self.windows = 0

    def add(self, x: Tensor) -> None:
        self.gram *= self.windows / (self.windows + 1)
        self.windows += 1
        columns = (2 / self.windows) ** 0.5 * x.t()
        self.gram += columns.matmul(columns.t())


class Fluctuation:
    """FLAP's recursion: its "old" mean is the new one, and the first window adds nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        self.mean = torch.zeros(linear.in_features)
        self.fluctuation = torch.zeros(linear.in_features)
        self.windows = 0

    def add(self, x: Tensor) -> None:
        seen = self.windows + 1
        self.mean *= self.windows / seen
        self.mean += x.mean(0) / seen
        if self.windows:
            self.fluctuation *= (self.windows - 1) / self.windows
            self.fluctuation += ((x - self.mean) * (x - self.mean)).sum(0) / seen
        self.windows = seen


Kind = type[Norms] | type[Gram] | type[Fluctuation]


class Run:
    """One pass over a model's layers: the two buffers, what every layer is called with, a clock."""

    def __init__(self, model: Any, windows: Tensor) -> None:
        body, (count, length) = model.model, windows.shape
        self.layers = body.layers
        self.seconds: Seconds = dict.fromkeys(("forward", "statistics", "solve"), 0.0)
        self.inputs = torch.zeros(count, length, model.config.hidden_size)
        with self.clock("forward"):
            for j in range(count):
                self.inputs[j] = body.embed_tokens(windows[j : j + 1])[0]
            self.outputs = torch.zeros_like(self.inputs)
            places = torch.arange(length)[None]
            above = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
            self.call = {
                "attention_mask": above[None, None],
                "position_ids": places,
                "position_embeddings": body.rotary_emb(self.inputs[:1], places),
            }

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Counts the time inside as the phase's."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def forward(self, layer: nn.Module) -> None:
        """inputs -> outputs."""
        hooked = self.seconds["statistics"]
        with self.clock("forward"):
            for j in range(len(self.inputs)):
                self.outputs[j] = layer(self.inputs[j : j + 1], **self.call)[0]
        self.seconds["forward"] -= self.seconds["statistics"] - hooked

    def collect(self, layer: nn.Module, linears: dict[str, nn.Linear], kind: Kind) -> Any:
        """Statistics by matrix, of one forward of the layer."""
        found = {name: kind(linear) for name, linear in linears.items()}

        def hook(name: str) -> Callable[..., None]:
            def add(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
                with self.clock("statistics"):
                    found[name].add(inputs[0][0])

            return add

        handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
        self.forward(layer)
        for handle in handles:
            handle.remove()
        return found

    def swap(self) -> None:
        """The outputs are the next layer's inputs."""
        self.inputs, self.outputs = self.outputs, self.inputs


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of a layer by name, in the modules' order."""
    return {n: module for n, module in layer.named_modules() if isinstance(module, nn.Linear)}


def lowest_in_groups(scores: Tensor, nm: tuple[int, int], removed: Tensor, start: int) -> None:
    """Marks in `removed` the lowest of the group of columns that begins at `start`."""
    keep, block = nm
    group = scores[:, start : start + block]
    chosen = torch.topk(group, block - keep, dim=1, largest=False)[1]
    removed.scatter_(1, start + chosen, True)


def lowest(weight: Tensor, squares: Tensor, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    """Of one matrix the weights that Wanda removes, bool [out, in]; squares: norms² of inputs."""
    scores = weight.abs() * torch.sqrt(squares)
    removed = torch.zeros_like(scores, dtype=torch.bool)
    if nm:
        for start in range(0, scores.shape[1], nm[1]):
            lowest_in_groups(scores, nm, removed, start)
    else:
        order = torch.sort(scores, dim=-1, stable=True)[1]
        removed.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    return removed


@torch.no_grad()
def wanda(
    model: Any, windows: Tensor, sparsity: float, nm: tuple[int, int] | None = None
) -> Seconds:
    """nm: keep n of m, instead of `sparsity`."""
    run = Run(model, windows)
    for layer in run.layers:
        linears = linears_of(layer)
        statistics = run.collect(layer, linears, Norms)
        with run.clock("solve"):
            for name, linear in linears.items():
                weight = linear.weight
                weight[lowest(weight, statistics[name].squares, sparsity, nm)] = 0
        run.forward(layer)
        run.swap()
    return run.seconds


def sweep(
    weight: Tensor, gram: Tensor, sparsity: float, nm: tuple[int, int] | None, blocksize: int = 128
) -> Tensor:
    """The weights of one matrix, pruned, with damping .01."""
    weight = weight.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], blocksize):
        end = min(start + blocksize, weight.shape[1])
        block, own = weight[:, start:end].clone(), upper[start:end, start:end]
        errors, gone = torch.zeros_like(block), removed[:, start:end]
        if not nm:
            scores = block**2 / own.diagonal() ** 2
            threshold = torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
            gone |= scores <= threshold
        for j in range(end - start):
            if nm and j % nm[1] == 0:
                lowest_in_groups(block**2 / own.diagonal() ** 2, nm, gone, j)
            kept = torch.where(gone[:, j], 0, block[:, j])
            errors[:, j] = (block[:, j] - kept) / own[j, j]
            block[:, j:] -= errors[:, j : j + 1].matmul(own[j : j + 1, j:])
            block[:, j] = kept  # the update leaves it there but for rounding
        weight[:, start:end] = block
        weight[:, end:] -= errors.matmul(upper[start:end, end:])
    return weight


@torch.no_grad()
def sparsegpt(
    model: Any,
    windows: Tensor,
    sparsity: float,
    nm: tuple[int, int] | None = None,
    true_sequential: bool = False,
) -> Seconds:
    """As `wanda`; true_sequential runs the layer anew before each of GROUPS."""
    run = Run(model, windows)
    for layer in run.layers:
        linears = linears_of(layer)
        for names in GROUPS if true_sequential else (tuple(linears),):
            chosen = {name: linears[name] for name in names}
            statistics = run.collect(layer, chosen, Gram)
            with run.clock("solve"):
                for name, linear in chosen.items():
                    linear.weight.copy_(sweep(linear.weight, statistics[name].gram, sparsity, nm))
        run.forward(layer)
        run.swap()
    return run.seconds


@torch.no_grad()
def flap(model: Any, windows: Tensor, remove: float) -> tuple[dict[str, Tensor], Seconds]:
    """Which units stay, bool, by "layers.0.kv_group" and "layers.0.neuron"; nothing is cut.

    remove: of the layers' weights, over both families and all layers (AL-AM, WIFV).
    """
    run, config = Run(model, windows), model.config
    attention, mlp = [], []
    for layer in run.layers:
        linears = linears_of(layer)
        chosen = {name: linears[name] for name in ("self_attn.o_proj", "mlp.down_proj")}
        statistics = run.collect(layer, chosen, Fluctuation)
        with run.clock("solve"):
            heads, neurons = (
                statistics[name].fluctuation * linear.weight.pow(2).sum(0)
                for name, linear in chosen.items()
            )
            attention.append(heads**2)
            mlp.append(neurons)
        run.swap()
    with run.clock("solve"):
        groups = config.num_key_value_heads
        units = standard(attention).unflatten(1, (groups, -1)).mean(2)
        scores = torch.cat([units.flatten(), standard(mlp).flatten()])
        size = run.layers[0].self_attn.head_dim
        cost = (2 * config.num_attention_heads // groups + 2) * size / 3  # in neurons
        ranked, order = torch.sort(scores, descending=True)
        costs = torch.where(order < units.numel(), cost, 1.0)
        spent = torch.cumsum(costs, 0)
        threshold = ranked[torch.argmin(torch.abs(spent - costs.sum() * (1 - remove)))]
        kept = scores > threshold
        masks = {}
        for i, mask in enumerate(kept[: units.numel()].view_as(units)):
            masks[f"layers.{i}.kv_group"] = mask
        for i, mask in enumerate(kept[units.numel() :].view(len(run.layers), -1)):
            masks[f"layers.{i}.neuron"] = mask
    return masks, run.seconds


def standard(rows: list[Tensor]) -> Tensor:
    """Each layer's columns, less their mean, over their deviation."""
    values = torch.stack(rows)
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
