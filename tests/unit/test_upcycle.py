"""A dense model becomes a mixture of experts: the same function first, then trained in parts."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines import upcycle as module
from pipelines.upcycle import Upcycling, encode, upcycle
from prune_core.errors import InputError
from tiny import NOUNS, PLACES, toy_tokenizer
from tiny_decoders import LAYERS, tiny_decoder

RECIPE = Upcycling(layers=2, experts=5, epochs=1, tokens=24, batch=2)
FAMILIES = {
    "where": [(f"where is the {noun} ?", f"it is in {PLACES[0]}") for noun in NOUNS[:6]],
    "what": [(f"what is in {place} ?", f"the {NOUNS[0]}") for place in PLACES[:6]],
}


def tokenizer():
    toy = toy_tokenizer()
    toy.eos_token = toy.sep_token
    return toy


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder, toy = tmp_path_factory.mktemp("dense"), tokenizer()
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    tiny_decoder("llama", vocab_size=len(toy), **heads).save_pretrained(folder)
    toy.save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_before_training_it_is_the_dense_model(dense, tmp_path):
    still = replace(RECIPE, epochs=0, router_epochs=0)
    mixture = load(upcycle(dense, tmp_path / "mixture", FAMILIES, still, progress=False))
    assert mixture.config.mlp_only_layers == list(range(LAYERS - 2))
    assert mixture.config.num_experts == 5
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, load(dense)(ids).logits)


def test_experts_and_routers_alone_are_trained(dense, tmp_path):
    out = upcycle(dense, tmp_path / "mixture", FAMILIES, RECIPE, progress=False)
    assert not out.with_name("mixture.work").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, out))
    same = [name for name in before if name in after]
    assert all(torch.equal(before[name], after[name]) for name in same)
    ups = [after[f"model.layers.2.mlp.experts.{e}.up_proj.weight"] for e in range(5)]
    assert not any(torch.equal(up, before["model.layers.2.mlp.up_proj.weight"]) for up in ups)
    assert not any(torch.equal(ups[0], up) for up in ups[1:])
    assert after["model.layers.2.mlp.gate.weight"].abs().max() > 0
    assert after["model.layers.2.mlp.shared_expert.up_proj.weight"].abs().max() == 0


def test_a_stopped_run_goes_on_and_ends_the_same(dense, tmp_path, monkeypatch):
    straight = upcycle(dense, tmp_path / "straight", FAMILIES, RECIPE, progress=False)
    branch, made = module._Training.branch, []

    def stopped(self, expert):
        if expert == 3:
            raise KeyboardInterrupt
        return branch(self, expert)

    with monkeypatch.context() as patch:
        patch.setattr(module._Training, "branch", stopped)
        with pytest.raises(KeyboardInterrupt):
            upcycle(dense, tmp_path / "again", FAMILIES, RECIPE, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            module._Training, "branch", lambda self, e: (made.append(e), branch(self, e))[1]
        )
        again = upcycle(dense, tmp_path / "again", FAMILIES, RECIPE, progress=False)
    assert made == [3, 4]
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_row_tells_where_its_answer_begins():
    toy = tokenizer()
    row = encode(toy, " where is it ? ", f" {PLACES[0]} ")
    assert toy.decode(row.ids[row.start : -1]).strip() == PLACES[0]
    assert row.ids[-1] == toy.eos_token_id


def test_what_cannot_be_made_is_refused(dense, tmp_path):
    with pytest.raises(InputError, match="5 experts cannot specialise in 1 families"):
        upcycle(dense, tmp_path / "out", {"what": FAMILIES["what"]}, RECIPE, progress=False)
    few = FAMILIES | {"what": FAMILIES["what"][:2]}
    with pytest.raises(InputError, match="'what' has 2 rows of at most 24 tokens"):
        upcycle(dense, tmp_path / "out", few, RECIPE, progress=False)
    for family in ("qwen2", "llama"):  # of which this one's heads are wider than hidden / heads
        tiny_decoder(family).save_pretrained(tmp_path / family)
        tokenizer().save_pretrained(tmp_path / family)
        with pytest.raises(InputError, match="Only a Llama without biases, whose heads"):
            upcycle(tmp_path / family, tmp_path / "out", FAMILIES, RECIPE, progress=False)
