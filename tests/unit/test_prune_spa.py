"""SPA: importance of coupled channels, exact targets, and what OBSPA makes up for."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.graph.importance import by_channel, grasp, lowest, magnitude, snip
from model_prune.graph.network import Network
from model_prune.graph.readers import Readers, noise, obspa, settle
from model_prune.methods.spa import SPA, Importance
from prune_core.errors import InputError
from tiny_decoders import random_windows
from tiny_networks import cacheless


def convolutional(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 5),
    ).eval()


def images(count=6, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return Network(convolutional(), images(2))


# ------------------------------------------------------------------ importance
def test_a_channels_importance_is_over_all_its_weights(network):
    scores = magnitude(network.model)
    table = by_channel(network, scores)
    model = network.model
    expected = torch.stack(
        [
            model[0].weight[c].abs().sum()
            + model[0].bias[c].abs()
            + model[1].weight[c].abs()
            + model[1].bias[c].abs()
            + model[3].weight[:, c].abs().sum()
            for c in range(8)
        ]
    ).double()
    torch.testing.assert_close(table["0"], expected.detach())
    flat = model[7].weight.view(5, 12, 4)
    expected = torch.stack(
        [
            model[3].weight[c].abs().sum() + model[3].bias[c].abs() + flat[:, c].abs().sum()
            for c in range(12)
        ]
    ).double()
    torch.testing.assert_close(table["3"], expected.detach())


@pytest.mark.parametrize(
    ("reduce", "of"),
    [
        ("mean", lambda x: x.mean()),
        ("max", lambda x: x.max()),
        ("l2", lambda x: x.square().sum().sqrt()),
    ],
)
def test_other_ways_to_reduce(network, reduce, of):
    model = network.model
    channel = torch.cat(
        [
            model[0].weight[3].abs().flatten(),
            model[0].bias[3:4].abs(),
            model[1].weight[3:4].abs(),
            model[1].bias[3:4].abs(),
            model[3].weight[:, 3].abs().flatten(),
        ]
    )
    channel = channel.detach().double()
    table = by_channel(network, magnitude(model), reduce)
    assert float(table["0"][3]) == pytest.approx(float(of(channel)))


def loss(model):
    return F.cross_entropy(model(images()), torch.arange(6) % 5)


def test_snip_and_grasp_are_their_formulas(network):
    model = copy.deepcopy(network.model)
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss(model), list(weights.values()), create_graph=True)
    for name, slope in zip(weights, slopes, strict=True):
        torch.testing.assert_close(snip(model, loss)[name], (weights[name] * slope).abs().detach())
    # H g by a difference of gradients.
    step, shifted = 1e-3, copy.deepcopy(model)
    with torch.no_grad():
        for weight, slope in zip(shifted.parameters(), slopes, strict=True):
            weight += step * slope
    after = torch.autograd.grad(loss(shifted), list(shifted.parameters()))
    found = grasp(model, loss)
    for (name, weight), was, now in zip(weights.items(), slopes, after, strict=True):
        product = (weight * (now - was) / step).detach()
        torch.testing.assert_close(found[name], product, rtol=0.1, atol=2e-3)
    assert all(weight.grad is None for weight in model.parameters())


# ------------------------------------------------------------------ how much
@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_the_target_is_met_by_the_fewest_channels(network, of, share):
    table = by_channel(network, magnitude(network.model))
    kept = lowest(network, table, share, of)
    model = network.cut(kept)
    size = network.size(kept, of)
    if of == "parameters":
        assert size == sum(p.numel() for p in model.parameters())
    assert size <= (1 - share) * network.size({}, of)
    # With the best of those that went back again, it is too much.
    gone = [
        (float(table[name][c] / table[name].mean()), name, c)
        for name, stays in kept.items()
        for c in sorted(set(range(len(table[name]))) - set(stays.tolist()))
    ]
    if gone:
        _, name, channel = max(gone)
        more = kept | {name: torch.cat([kept[name], torch.tensor([channel])]).sort().values}
        assert network.size(more, of) > (1 - share) * network.size({}, of)
    else:
        assert share == 0


def test_families_are_compared_by_their_means_and_never_emptied(network):
    table = {"0": torch.arange(1.0, 9), "3": 1000 * torch.arange(1.0, 13)}
    kept = lowest(network, table, 0.7)
    assert all(len(stays) > 1 for stays in kept.values())
    assert set(kept) == {"0", "3"}
    alone = lowest(network, table, 0.7, normalise=False)
    assert alone["0"].tolist() == [7]  # all but the best go first, being lower by far


def test_more_than_there_is_is_refused(network):
    table = by_channel(network, magnitude(network.model))
    with pytest.raises(InputError, match=r"still be more than 1 - 0\.99 of the parameters"):
        lowest(network, table, 0.99)
    with pytest.raises(InputError, match=r"remove is a share in \[0, 1\)"):
        lowest(network, table, 30)


# ------------------------------------------------------------------ OBSPA
def patches(x):
    """By hand: what the second convolution multiplies its weights with."""
    x = F.pad(x, (1, 1, 1, 1))
    rows = [
        x[:, :, i : i + 3, j : j + 3].flatten(1)
        for i in range(0, x.shape[2] - 2, 2)
        for j in range(0, x.shape[3] - 2, 2)
    ]
    return torch.cat(rows)


def test_second_moments_are_those_of_what_is_multiplied(network):
    x = images()
    readers = Readers.of(network, [x[:4], (x[4:],)])
    assert set(readers.weights) == {"3.weight", "7.weight"}
    with torch.no_grad():
        hidden = network.model[:3](x)
        last = network.model[:7](x)
    rows = patches(hidden)
    torch.testing.assert_close(readers.grams["3.weight"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(readers.grams["7.weight"], last.T @ last, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in network.model.modules())


def refit_error(rows, weight, gone):
    """Σ of squares that the best refit without some columns leaves, by numpy, as it is damped."""
    damping = 0.01 * rows.square().sum(0).mean()
    rows = torch.cat([rows, damping.sqrt() * torch.eye(rows.shape[1])])
    kept = [j for j in range(weight.shape[1]) if j not in gone]
    x, target = rows.double().numpy(), (rows @ weight.T).double().numpy()
    fit = x[:, kept] @ np.linalg.lstsq(x[:, kept], target, rcond=None)[0]
    return float(((target - fit) ** 2).sum())


def test_a_channels_cost_is_what_the_best_refit_without_it_loses(network):
    x = images(64)
    readers = Readers.of(network, [x])
    with torch.no_grad():
        hidden, last = network.model[:3](x), network.model[:7](x)
    rows, weight = patches(hidden), network.model[3].weight.detach().flatten(1)
    found = readers.costs(network)["0"]
    for channel in (0, 3, 7):
        columns = set(range(9 * channel, 9 * channel + 9))
        expected = refit_error(rows, weight, columns) / 2
        assert float(found[channel]) == pytest.approx(expected, rel=1e-2)
    weight = network.model[7].weight.detach()
    found = readers.costs(network)["3"]
    for channel in (1, 11):
        columns = set(range(4 * channel, 4 * channel + 4))
        expected = refit_error(last, weight, columns) / 2
        assert float(found[channel]) == pytest.approx(expected, rel=1e-2)


def test_refitting_brings_the_output_nearer(network):
    x = images(64)
    readers = Readers.of(network, [x])
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        kept = {
            family.name: torch.randperm(family.channels, generator=draw)[: family.channels // 2]
            .sort()
            .values
            for family in network.families
        }
        with torch.no_grad():
            dense = network.model(x)
            plain = (network.cut(kept)(x) - dense).square().mean()
            refit = (network.cut(kept, readers.refitted(network, kept))(x) - dense).square().mean()
        assert refit < 0.7 * plain


def test_obspa_is_its_parts_and_nearer_than_magnitude(network):
    x = images(64)
    readers = Readers.of(network, [x])
    kept = lowest(network, readers.costs(network), 0.4, "flops")
    expected = network.cut(kept, readers.refitted(network, kept))
    _, found = obspa(network, [x], 0.4, "flops")
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))
        dense = network.model(x)
        other = network.cut(
            lowest(network, by_channel(network, magnitude(network.model)), 0.4, "flops")
        )
        far = (other(x) - dense).square().mean()
        assert (found(x) - dense).square().mean() < 0.5 * far
    assert math.isfinite(float(far))


def test_noise_will_do_for_data():
    network = Network(convolutional(), images(2))
    _, model = obspa(network, [torch.rand(64, 3, 8, 8)], 0.4)
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * network.size({})
    assert model(images()).isfinite().all()


# ------------------------------------------------------------------ other readers
def test_products_of_every_form_are_read():
    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell = nn.Linear(6, 8), nn.GRUCell(8, 7)
            self.matrix = nn.Parameter(torch.randn(7, 5))
            self.line, self.head = nn.Conv1d(5, 9, 3, padding="same"), nn.Linear(9, 3)

        def forward(self, x):
            x, state, states = torch.relu(self.first(x)), None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                states.append(state)
            x = torch.stack(states, 1) @ self.matrix
            return self.head(self.line(x.transpose(1, 2)).relu().amax(2))

    torch.manual_seed(0)
    model, x = Forms().eval(), torch.randn(32, 5, 6)
    network = Network(model, x[:2])
    readers = Readers.of(network, [x])
    assert set(readers.grams) == {
        *("cell.weight_ih", "cell.weight_hh", "matrix", "line.weight", "head.weight"),
    }
    with torch.no_grad():
        inner, state, before, after = torch.relu(model.first(x)), torch.zeros(32, 7), [], []
        for step in inner.unbind(1):
            before.append(state)
            state = model.cell(step, state)
            after.append(state)
        before, after = torch.cat(before), torch.stack(after, 1)
        product = F.pad((after @ model.matrix).transpose(1, 2), (1, 1))
        line = product.unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(-1, 15)
    for name, rows in {
        "cell.weight_ih": inner.flatten(0, 1),
        "cell.weight_hh": before,
        "matrix": after.flatten(0, 1),
        "line.weight": line,
    }.items():
        torch.testing.assert_close(readers.grams[name], rows.T @ rows, rtol=1e-4, atol=1e-3)
    kept, cut = obspa(network, [x], 0.4)
    with torch.no_grad():
        dense, plain = model(x), network.cut(kept)(x)
        assert (cut(x) - dense).square().mean() < 0.5 * (plain - dense).square().mean()


def test_a_whole_sequence_is_read_as_its_cell_is():
    torch.manual_seed(0)
    x = torch.randn(16, 5, 6)

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0])

    model = Sequence().eval()
    readers = Readers.of(Network(model, x[:2]), [x])
    with torch.no_grad():
        states = model.cell(x)[0]
    before = F.pad(states, (0, 0, 1, 0))[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        readers.grams["cell.weight_hh_l0"], before.T @ before, rtol=1e-4, atol=1e-4
    )


def test_noise_is_shaped_like_the_example_and_refused_for_tokens():
    batches = list(noise((torch.zeros(1, 3, 4), torch.zeros(1, 2)), 70, 32))
    assert [tuple(x.shape for x in batch) for batch in batches] == [
        ((n, 3, 4), (n, 2)) for n in (32, 32, 6)
    ]
    with pytest.raises(InputError, match="such as tokens"):
        next(noise((torch.zeros(1, 3, dtype=torch.int64),), 4))


def test_settled_norms_are_those_of_what_is_seen():
    model, x = convolutional().eval(), images(40)
    with torch.no_grad():
        seen = model[0](x)
    before = copy.deepcopy(model.state_dict())
    assert settle(model, [x[:20], x[20:]]) is model
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, seen.var((0, 2, 3)), rtol=0.05, atol=1e-3)
    assert model[1].momentum == 0.1
    same = {n: torch.equal(t, before[n]) for n, t in model.state_dict().items()}
    assert {n for n, equal in same.items() if not equal} == {
        f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }


# ------------------------------------------------------------------ on decoders
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "grasp"])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_a_decoders_units_score_what_its_channels_do(criterion, reduce):
    """By two ways: units that are declared, and channels that are found in the graph."""
    model = cacheless("llama")
    windows = random_windows(4, 12)

    def mean_loss(model):
        return model(input_ids=windows, labels=windows, use_cache=False).loss

    for name, parameter in model.named_parameters():  # units' criteria go by matrices alone
        parameter.requires_grad_(name.endswith("proj.weight"))
    network = Network(model, windows[:2])
    scores = {
        "magnitude": lambda: magnitude(model),
        "snip": lambda: snip(model, mean_loss),
        "grasp": lambda: grasp(model, mean_loss),
    }[criterion]()
    by_graph = by_channel(network, scores, reduce)
    decoder = Decoder.of(model)
    table = Importance(criterion, reduce).table(decoder, Calibration(windows), [], False)
    assert sum(len(scored) for scored in table) == len(network.families)
    for i, scored in enumerate(table):
        for family, matrix in (("kv_group", "self_attn.q_proj"), ("neuron", "mlp.gate_proj")):
            member = (f"model.layers.{i}.{matrix}.weight", 0)
            (found,) = (f for f in network.families if member in f.members)
            expected = by_graph[found.name].float()
            scale = float(expected.abs().max())
            torch.testing.assert_close(scored[family], expected, rtol=1e-3, atol=1e-4 * scale)


def test_by_magnitude_no_text_is_read():
    model = cacheless("llama")
    plan = SPA(remove=0.3, criterion="magnitude").plan(model, progress=False)
    assert plan.calibration is None
    with pytest.raises(InputError, match="spa reads calibration text"):
        SPA(remove=0.3).plan(model, progress=False)
