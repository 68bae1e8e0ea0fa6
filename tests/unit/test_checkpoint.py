"""Checkpoints read layer by layer and written pruned: the same model as pruned in memory."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model_prune import checkpoint as module
from model_prune.checkpoint import open_checkpoint, write_checkpoint
from model_prune.core.plan import LayerPlan
from model_prune.decoders import apply_in_place
from prune_core.errors import CheckpointError, InputError
from tiny_decoders import FAMILIES, VOCABULARY, mixed_plan, tiny_decoder, units

MAPS = Path("/proc/self/maps")
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(folder_or_model):
    model = folder_or_model
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return model(IDS).logits


@pytest.fixture
def source(tmp_path):
    tiny_decoder("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def write(source, out, plan=None, **settings):
    plan = mixed_plan() if plan is None else plan
    write_checkpoint(source, out, plan, plan_json={"made": "so"}, progress=False, **settings)
    return out


class Once:
    """Plans that come from a file one by one, each once and in order."""

    def __init__(self, plans):
        self.plans, self.taken = plans, []

    def __len__(self):
        return len(self.plans)

    def __getitem__(self, i):
        self.taken.append(i)
        return self.plans[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_is_pruned_in_memory(family, dtype, tmp_path):
    dense = tiny_decoder(family).to(dtype)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    assert len([*(tmp_path / "dense").glob("*.safetensors")]) > 3
    out, plans = tmp_path / "out", Once(mixed_plan())
    write(tmp_path / "dense", out, plans)
    assert plans.taken == [0, 1, 2, 3]
    apply_in_place(dense, mixed_plan()).save_pretrained(tmp_path / "memory")
    written = load_file(out / "model.safetensors")
    expected = load_file(tmp_path / "memory" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert torch.equal(logits(out), logits(tmp_path / "memory"))
    configs = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "memory")]
    assert configs[0] == configs[1]
    assert json.loads((out / "prunekit.json").read_text()) == {"made": "so"}
    assert json.loads((out / "generation_config.json").read_text())


def test_a_written_checkpoint_is_pruned_again(source, tmp_path):
    first = write(source, tmp_path / "first")
    again = [LayerPlan(), LayerPlan(removed=True), LayerPlan(units=units(neuron=[5, 6]))]
    second = write(first, tmp_path / "second", again)
    model = apply_in_place(AutoModelForCausalLM.from_pretrained(first), again)
    assert torch.equal(logits(second), logits(model))


def test_shards_hold_no_more_than_they_may(source, tmp_path, monkeypatch):
    whole = write(source, tmp_path / "whole")
    monkeypatch.setattr(module, "SHARD", 30_000)
    out = write(source, tmp_path / "out")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(out / name).values()) for name in shards]
    assert len(shards) > 3
    assert max(sizes) <= 30_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert torch.equal(logits(out), logits(whole))
    assert open_checkpoint(out).names == open_checkpoint(whole).names


def test_an_untied_head_and_the_tokenizer_go_along(tmp_path):
    model = tiny_decoder("mistral", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "source" / name).write_text(name)
    for name in ("README.md", "modeling_evil.py", "pytorch_model.bin"):
        (tmp_path / "source" / name).write_text(name)
    out = write(tmp_path / "source", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prunekit.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    head = AutoModelForCausalLM.from_pretrained(out).lm_head.weight
    assert torch.equal(head, model.lm_head.weight)


def test_reading_gives_what_is_asked_for_in_memory_of_its_own(source):
    model = tiny_decoder("llama")
    stored = open_checkpoint(source)
    assert stored.config.model_type == "llama"
    assert "model.layers.3.mlp.up_proj.weight" in stored.names
    for i, layer in enumerate(model.model.layers):
        state = stored.layer_state(i)
        assert state.keys() == layer.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
        if MAPS.exists():  # mapped, all that was ever read would count as the process's memory
            assert str(source) not in MAPS.read_text()
    embedding = model.model.embed_tokens.weight
    ids = torch.tensor([7, 3, 3])
    assert torch.equal(stored.rows("model.embed_tokens.weight", ids), embedding[ids])
    assert torch.equal(stored.tensor("model.norm.weight"), model.model.norm.weight)
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        stored.tensor("lm_head.weight")


def test_what_old_checkpoints_have_beside_the_parameters_is_left_out(source, tmp_path):
    file = source / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    out = write(source, tmp_path / "out")
    assert not [name for name in open_checkpoint(out).names if "inv_freq" in name]


# ------------------------------------------------------------------------------ refusals
def edit_config(folder, **changes):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes))


def lacking(folder, name="model.layers.2.mlp.up_proj.weight"):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            CheckpointError,
            "pickles",
        ),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no weights"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
            CheckpointError,
            "cannot be read",
        ),
        (lacking, CheckpointError, r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"),
        (lambda f: edit_config(f, model_type="gpt2"), InputError, "'gpt2' cannot be pruned yet"),
        (lambda f: edit_config(f, model_type="nosuch"), CheckpointError, "nosuch"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
            InputError,
            "quantised",
        ),
        (lambda f: edit_config(f, intermediate_size=48), InputError, r"must have the shape \(48"),
    ],
)
def test_a_folder_that_cannot_be_pruned_leaves_nothing(damage, error, words, source, tmp_path):
    damage(source)
    with pytest.raises(error, match=words):
        write(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_shard_that_is_not_there_is_named(source):
    weights = dict.fromkeys(load_file(source / "model.safetensors"), "../model.safetensors")
    (source / "model.safetensors").rename(source.parent / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(CheckpointError, match=r"'\.\./model\.safetensors', which is not in"):
        open_checkpoint(source)


def test_plans_and_places_that_do_not_fit(source, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="plan is for 3 layers"):
        write(source, tmp_path / "out", mixed_plan()[:3])
    with pytest.raises(InputError, match="keep one layer"):
        write(source, tmp_path / "out", [LayerPlan(removed=True)] * 4)
    with pytest.raises(InputError, match="the model that is read"):
        write(source, source, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="is there already"):
        write(source, tmp_path / "full")
    usage = namedtuple("usage", "total used free")(0, 0, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"0\.0 GiB left: make room"):
        write(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    monkeypatch.undo()
    write(source, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "mine").exists()
