"""A cut network in a file, and back."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from model_prune.graph.network import Network
from model_prune.graph.saved import load_cut, save_cut
from prune_core.errors import CheckpointError, InputError
from tiny_networks import NETS, half, out, settled


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("mobilenet", "decoder")])
def test_saved_and_loaded_is_the_same(name, tmp_path):
    torch.manual_seed(0)
    model, example, _ = NETS[name]()
    model = settled(model)
    network = Network(model, example)
    kept = half(network)
    cut = network.cut(kept)
    save_cut(tmp_path / "cut.safetensors", model, cut, kept)
    other, _, _ = NETS[name]()  # as its code makes it, with other weights
    before = {n: t.clone() for n, t in other.state_dict().items()}
    loaded = load_cut(tmp_path / "cut.safetensors", other.eval())
    assert torch.equal(out(loaded, example), out(cut, example))
    assert type(loaded) is type(model)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    # A cut network that is cut again is saved like the first.
    again = Network(loaded, example)
    kept = half(again, 1)
    save_cut(tmp_path / "again.safetensors", loaded, again.cut(kept), kept)
    assert torch.equal(
        out(load_cut(tmp_path / "again.safetensors", loaded), example),
        out(again.cut(kept), example),
    )


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 6), nn.Linear(6, 12)
            self.outer, self.head = nn.Linear(12, 6), nn.Linear(6, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.outer(self.inner(self.table(ids)).relu()))

    model, ids = Tied(), torch.randint(20, (2, 5))
    network = Network(model, ids)
    kept = half(network)
    cut = network.cut(kept)
    save_cut(tmp_path / "cut.safetensors", model, cut, kept)
    loaded = load_cut(tmp_path / "cut.safetensors", Tied())
    assert loaded.head.weight is loaded.table.weight
    assert torch.equal(out(loaded, ids), out(cut, ids))


def vit(**settings):
    given = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    given |= {"image_size": 16, "patch_size": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**(given | settings)))


def test_a_model_of_transformers_comes_back_by_its_config(tmp_path):
    model, x = vit().eval(), torch.randn(2, 3, 16, 16)
    network = Network(model, x)
    kept = half(network)
    model.config.save_pretrained(tmp_path)
    save_cut(tmp_path / "cut.safetensors", model, network.cut(kept), kept)
    built = ViTForImageClassification(ViTConfig.from_pretrained(tmp_path)).eval()
    loaded = load_cut(tmp_path / "cut.safetensors", built)
    assert torch.equal(out(loaded, x), out(network.cut(kept), x))


def test_another_network_is_refused(tmp_path):
    model, x = vit(), torch.randn(2, 3, 16, 16)
    network = Network(model, x)
    save_cut(tmp_path / "cut.safetensors", model, network.cut(half(network)), half(network))
    for other in (vit(intermediate_size=64), vit(num_hidden_layers=2), nn.Linear(4, 4)):
        with pytest.raises(InputError, match=r"was cut from another network: its '.*' was"):
            load_cut(tmp_path / "cut.safetensors", other)


def test_files_that_are_none_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("plain.safetensors", "text.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="no network that save_cut wrote"):
            load_cut(tmp_path / name, nn.Linear(2, 2))
