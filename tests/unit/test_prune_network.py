"""Channels of any network: found, masked, cut, and what stays because it must."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model_prune.core.units import MEMBERS, places
from model_prune.graph.network import Network
from prune_core.errors import InputError, UnknownName
from tiny_decoders import FAMILIES, LAYERS, dims_of, random_windows
from tiny_networks import NETS, Net, cacheless, half, images, out, settled


@pytest.fixture(scope="module", params=NETS)
def case(request):
    torch.manual_seed(0)
    model, example, expected = NETS[request.param]()
    model = settled(model)
    return Network(model, example), example, expected


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------ what is found
def test_channels_are_found(case):
    network, _, expected = case
    assert network.families
    assert network.stuck == {}
    if expected is not None:
        assert {family.name: family.channels for family in network.families} == expected


def test_masked_is_cut(case):
    network, example, _ = case
    for seed in range(3):
        kept = half(network, seed)
        masked, cut = network.masked(kept), network.cut(kept)
        expected = out(masked, example)
        torch.testing.assert_close(
            out(cut, example), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        assert not torch.allclose(expected, out(network.model, example), rtol=1e-3)
        assert weights(cut) < 0.9 * weights(network.model)


def test_one_family_alone_is_cut(case):
    network, example, _ = case
    for family in network.families:
        kept = {family.name: torch.arange(family.channels - 1)}
        expected = out(network.masked(kept), example)
        torch.testing.assert_close(
            out(network.cut(kept), example),
            expected,
            rtol=1e-5,
            atol=1e-5 * expected.abs().max().item(),
        )


def test_nothing_cut_is_the_same_and_the_model_is_left_alone(case):
    network, example, _ = case
    before = copy.deepcopy(network.model.state_dict())
    everything = {family.name: torch.arange(family.channels) for family in network.families}
    for model in (network.cut(everything), network.cut({}), network.masked({})):
        assert torch.equal(out(model, example), out(network.model, example))
    network.cut(half(network))
    after = network.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_cut_network_is_traced_and_cut_again(case):
    network, example, _ = case
    smaller = Network(network.cut(half(network)), example)
    assert {f.name for f in smaller.families} <= {f.name for f in network.families}
    kept = half(smaller, 1)
    expected = out(smaller.masked(kept), example)
    torch.testing.assert_close(
        out(smaller.cut(kept), example),
        expected,
        rtol=1e-5,
        atol=1e-5 * expected.abs().max().item(),
    )


def test_a_cut_network_trains(case):
    network, example, _ = case
    model = network.cut(half(network)).train()
    found = model(example)
    loss = (found if isinstance(found, torch.Tensor) else found.logits).square().mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_decoders_channels_are_the_units_that_are_declared(kind):
    model = cacheless(kind)
    network, dims = Network(model, random_windows(2, 12)), dims_of(model)
    assert len(network.families) == 2 * LAYERS
    declared = {
        (i, family): {
            (f"model.layers.{i}.{matrix}.weight", axis) for matrix, axis in MEMBERS[family].items()
        }
        for i in range(LAYERS)
        for family in MEMBERS
    }
    for (i, family), members in declared.items():
        (found,) = (f for f in network.families if members <= f.members.keys())
        others = found.members.keys() - members
        assert {name.rsplit(".", 1)[1] for name, _ in others} <= {"bias"}
        for matrix, axis in MEMBERS[family].items():
            positions = found.members[f"model.layers.{i}.{matrix}.weight", axis]
            for unit in range(dims[i].count(family)):
                expected = places(family, matrix, dims[i], torch.tensor([unit]))
                assert torch.equal(positions[unit], expected)


# ------------------------------------------------------------------ what stays
def members(network):
    return {member for family in network.families for member in family.members}


def test_inputs_outputs_and_what_is_averaged_over_stay():
    def run(self, x):
        return self.last(self.norm(self.first(x)) + self.second(x.mean(-1, keepdim=True)))

    model = Net(
        run,
        first=nn.Linear(6, 8),
        second=nn.Linear(1, 8),
        norm=nn.LayerNorm(8),
        last=nn.Linear(8, 4),
    )
    assert Network(model, torch.randn(2, 6)).families == []


def test_what_an_unknown_operator_reads_stays_and_it_is_named():
    def run(self, x):
        x = self.first(x)
        return self.last(x.sort(-1).values + self.second(x))

    model = Net(run, first=nn.Linear(6, 8), second=nn.Linear(8, 8), last=nn.Linear(8, 4))
    network = Network(model, torch.randn(2, 6))
    assert network.unknown == ["sort"]
    assert network.families == []


def test_a_shortcut_that_pads_its_channels_with_zeros():
    """As CIFAR's ResNets have: channels beside those of the shortcut stay."""

    def run(self, x):
        x = self.first(x)
        y = self.second(x) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.last(y.amax((2, 3)))

    model = Net(run, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 8, 1), last=nn.Linear(8, 3))
    network = Network(model.eval(), images())
    (family,) = network.families
    assert family.members["second.weight", 0].flatten().tolist() == [2, 3, 4, 5]
    kept = {family.name: torch.tensor([0, 3])}
    expected = out(network.masked(kept), images())
    torch.testing.assert_close(out(network.cut(kept), images()), expected)


def test_a_module_used_twice_is_cut_once_for_both():
    def run(self, x):
        return self.last(self.shared(self.shared(self.first(x)).relu()))

    model = Net(run, first=nn.Linear(6, 8), shared=nn.Linear(8, 8), last=nn.Linear(8, 4))
    network = Network(model, torch.randn(2, 6))
    (family,) = network.families
    assert family.members.keys() >= {("shared.weight", 0), ("shared.weight", 1)}
    kept = {family.name: torch.tensor([1, 2, 5])}
    x = torch.randn(3, 6)
    torch.testing.assert_close(out(network.cut(kept), x), out(network.masked(kept), x))


def test_tied_weights_stay_tied():
    def run(self, ids):
        return self.head(self.narrow(self.table(ids)).relu() @ self.wide.weight.T)

    table = nn.Embedding(10, 6)
    model = Net(
        run, table=table, narrow=nn.Linear(6, 5), wide=nn.Linear(5, 6), head=nn.Linear(6, 10)
    )
    model.head.weight = table.weight
    network = Network(model, torch.randint(10, (2, 4)))
    kept = {family.name: torch.arange(2) for family in network.families}
    cut = network.cut(kept)
    assert cut.head.weight is cut.table.weight
    ids = torch.randint(10, (3, 4))
    torch.testing.assert_close(out(cut, ids), out(network.masked(kept), ids))


def test_code_with_sizes_of_its_own_is_tried_and_left_whole():
    def run(self, x):
        y = self.first(x).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        return self.last(self.second(y).relu())

    model = Net(run, first=nn.Linear(6, 8), second=nn.Linear(8, 5), last=nn.Linear(5, 4))
    network = Network(model, torch.randn(2, 6))
    assert [family.name for family in network.families] == ["second"]
    assert list(network.stuck) == ["first"]
    assert "shapes cannot be multiplied" in network.stuck["first"]


def test_a_part_of_channels_by_its_own_numbers_is_found_out():
    """Without a channel before it, the same numbers would be of others."""

    def run(self, x):
        return self.last(self.first(x)[:, :4])

    network = Network(Net(run, first=nn.Linear(6, 8), last=nn.Linear(4, 2)), torch.randn(2, 6))
    assert list(network.stuck) == ["first"]
    (family,) = network.families  # those that nobody reads
    assert family.members["first.weight", 0].flatten().tolist() == [4, 5, 6, 7]


def test_torchs_own_attention_keeps_its_heads():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    network = Network(layer, torch.randn(2, 5, 16))
    assert [family.name for family in network.families] == ["linear1"]


def test_halves_that_are_cut_by_their_place_stay():
    """They would be of one size no more, and torch's chunk makes them so."""

    def run(self, x):
        first, second = self.first(x).chunk(2, 1)
        return self.one(first) + self.other(second)

    model = Net(run, first=nn.Linear(4, 8), one=nn.Linear(4, 3), other=nn.Linear(4, 3))
    network = Network(model, torch.randn(2, 4))
    assert network.families == []
    assert set(network.stuck) == {"first", "first#2"}


def test_shuffled_groups_stay_whole():
    """As ShuffleNet's."""

    def run(self, x):
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        x = self.grouped(x.reshape(batch, channels, height, width))
        return self.head(torch.relu(x).mean((2, 3)))

    model = Net(
        run,
        first=nn.Conv2d(3, 8, 1),
        grouped=nn.Conv2d(8, 8, 3, groups=2),
        head=nn.Linear(8, 3),
    )
    assert [f for f in Network(model, images()).families if f.channels > 1] == []


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_sequence_with_projections_stays():
    cell = nn.LSTM(5, 8, batch_first=True, proj_size=4)
    model = Net(lambda self, x: self.head(self.cell(x)[0][:, -1]), cell=cell, head=nn.Linear(4, 3))
    assert Network(model, torch.randn(2, 4, 5)).families == []


TRANSFORMERS = {
    # model, example, families, what is stuck
    "gpt2": lambda: (
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False)),
        (random_windows(2, 12) % 64,),
        {"mlp.c_fc"},
        {"attn.c_attn"},
    ),
    "t5": lambda: (
        T5EncoderModel(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        (random_windows(2, 12) % 64,),
        {"SelfAttention.q", "DenseReluDense.wi"},
        set(),
    ),
    "clip": lambda: (
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
            )
        ),
        (images(),),
        {"self_attn.k_proj", "mlp.fc1"},
        set(),
    ),
    "whisper": lambda: (
        WhisperEncoder(
            WhisperConfig(
                d_model=32,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=16,
            )
        ),
        (torch.randn(2, 8, 32),),
        {"conv1", "fc1"},
        {"self_attn.k_proj"},  # its code has the number of heads in it
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_can_be_cut_of_other_transformers(name):
    torch.manual_seed(0)
    model, example, families, stuck = TRANSFORMERS[name]()
    network = Network(model.eval(), *example)
    assert network.unknown == []

    def ends(names):
        return {
            next(end for end in families | stuck if f".{one}".endswith(f".{end}")) for one in names
        }

    assert ends(f.name for f in network.families) == families
    assert ends(network.stuck) == stuck
    kept = half(network)
    cut, masked = network._run(network.cut(kept)), network._run(network.masked(kept))
    for found, expected in zip(cut, masked, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


# ------------------------------------------------------------------ refusals
def test_what_cannot_be_traced_is_refused():
    def run(self, x):
        return self.first(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match=r"torch\.export cannot trace Net .* its forward must not"):
        Network(Net(run, first=nn.Linear(6, 6)), torch.randn(2, 6))


def test_channels_that_are_not_there_are_refused():
    network = Network(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))
    with pytest.raises(UnknownName, match="Unknown family of channels '1'"):
        network.cut({"1": torch.tensor([0])})
    for kept in ([], [6], [-1]):
        with pytest.raises(InputError, match="Of '0' channels of 0 to 5 may stay"):
            network.cut({"0": torch.tensor(kept, dtype=torch.int64)})


def test_training_goes_on_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)).train()
    network = Network(model, torch.randn(2, 4))
    assert all(module.training for module in model.modules())
    assert network.cut({"0": torch.arange(3)}).training
