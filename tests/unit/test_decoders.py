"""Decoders whose layers differ: pruned in place, saved, loaded, and still the same function."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_prune.core.plan import LayerPlan
from model_prune.core.target import Dims
from model_prune.decoders import (
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    apply_in_place,
    build_layer,
    pruned_config,
)
from prune_core.errors import InputError
from tiny_decoders import FAMILIES, VOCABULARY, biases, dims_of, mixed_plan, tiny_decoder, units

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


@torch.no_grad()
def mask(model, plan):
    """What a plan means, without cutting: zeros in place of units, hooks in place of the rest."""
    for layer, of, dims in zip(list(model.model.layers), plan, dims_of(model), strict=True):
        if of.removed:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in linear.parameters():
                    parameter.zero_()
            continue
        for family, kept in of.units.items():
            gone = torch.ones(dims.count(family), dtype=torch.bool)
            gone[kept] = False
            name, size = (
                ("mlp.down_proj", 1)
                if family == "neuron"
                else ("self_attn.o_proj", dims.group * dims.head_dim)
            )
            layer.get_submodule(name).weight[:, gone.repeat_interleave(size)] = 0
        for name, bias in of.biases.items():
            layer.get_submodule(name).register_forward_hook(lambda _m, _i, out, b=bias: out + b)
    return model


def pruned(family, **settings):
    return apply_in_place(tiny_decoder(family, **settings), mixed_plan())


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_masked_is_cut(family):
    dense = tiny_decoder(family)
    whole = logits(dense)
    masked = logits(mask(dense, mixed_plan()))
    cut = pruned(family)
    assert [(d.kv_groups, d.neurons) for d in dims_of(cut)] == [(2, 15), (3, 40), (1, 37)]
    torch.testing.assert_close(logits(cut), masked, atol=1e-5, rtol=1e-5)
    assert (whole - masked).abs().max() > 0.1


def test_a_saved_model_is_loaded_bit_for_bit(family, tmp_path):
    cut = pruned(family)
    assert type(cut).__name__ == f"Pruned{type(tiny_decoder(family)).__name__}"
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(cut)
    assert torch.equal(logits(loaded), logits(cut))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config._attn_implementation == "sdpa"
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["model_type"] == f"pruned_{family}"
    assert told["architectures"] == [type(cut).__name__]
    assert told["per_layer_config"]["0"] == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 15,
    }
    assert "1" not in told["per_layer_config"]  # it has the global sizes


def test_generation_with_a_cache_is_recomputation(family):
    cut = pruned(family)
    prompt = IDS[:, :8]
    told = cut.generate(
        prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
    )
    ids = prompt
    for _ in range(16):
        following = logits(cut, ids)[:, -1]
        following[:, 2] = -torch.inf  # the end, which may not come
        ids = torch.cat([ids, following.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(told, ids)
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1, 2]


def test_a_pruned_model_is_pruned_again(family, tmp_path):
    again = [
        LayerPlan(),
        LayerPlan(units=units(kv_group=[0, 2]), biases=biases(3)),
        LayerPlan(removed=True),
    ]
    cut = pruned(family)
    masked = logits(mask(pruned(family), again))
    apply_in_place(cut, again)
    torch.testing.assert_close(logits(cut), masked, atol=1e-5, rtol=1e-5)
    assert cut.config.output_bias
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(cut))


def test_alike_layers_need_no_class_of_ours(family, tmp_path):
    kept = units(neuron=[*range(20)])
    settings = {}
    if family == "qwen2":
        settings = {"head_dim": 8}  # 48 / 6
    else:
        kept |= units(kv_group=[0, 2])  # 48 % 4 == 0
    plan = [LayerPlan(units=kept)] * 3 + [LayerPlan(removed=True)]
    masked = logits(mask(tiny_decoder(family, **settings), plan))
    cut = apply_in_place(tiny_decoder(family, **settings), plan)
    assert cut.config.model_type == family
    assert type(cut) is type(tiny_decoder(family))
    cut.save_pretrained(tmp_path)
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(cut))
    torch.testing.assert_close(logits(loaded), masked, atol=1e-5, rtol=1e-5)


def test_layers_that_became_alike_return_to_the_stock_class():
    cut = apply_in_place(
        tiny_decoder("llama"),
        [LayerPlan(units=units(neuron=[1, 2, 3])), *[LayerPlan()] * 3],
    )
    assert type(cut) is PrunedLlamaForCausalLM
    apply_in_place(cut, [LayerPlan(removed=True), *[LayerPlan()] * 3])
    assert type(cut) is type(tiny_decoder("llama"))
    assert cut.model.config is cut.config
    logits(cut)


@pytest.mark.parametrize(
    ("settings", "kept", "stock"),
    [
        ({}, [0], True),  # 48 % 2 == 0
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, [0, 1, 2, 3, 4], False),  # 48 % 5
    ],
)
def test_stock_llama_takes_only_heads_that_divide_its_width(settings, kept, stock):
    model = tiny_decoder("llama", **settings)
    plan = [LayerPlan(units=units(kv_group=kept))] * 4
    masked = logits(mask(tiny_decoder("llama", **settings), plan))
    apply_in_place(model, plan)
    assert (model.config.model_type == "llama") == stock
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)


def test_heads_of_qwen2_follow_from_its_width_or_the_config_is_ours():
    dims = dims_of(tiny_decoder("qwen2", head_dim=8))
    config = tiny_decoder("qwen2", head_dim=8).config
    alike = pruned_config(config, dims, biases=False, kept_layers=range(4))
    assert alike.model_type == "qwen2"
    fewer = [Dims(d.hidden, 4, 2, d.head_dim, d.neurons) for d in dims]
    assert pruned_config(config, fewer, biases=False, kept_layers=range(4)).model_type == (
        "pruned_qwen2"
    )


def test_biases_that_stock_llama_can_have_stay_stock():
    settings = {"attention_bias": True, "mlp_bias": True}
    plan = [LayerPlan(biases=biases(i)) for i in range(4)]
    masked = logits(mask(tiny_decoder("llama", **settings), plan))
    model = apply_in_place(tiny_decoder("llama", **settings), plan)
    assert model.config.model_type == "llama"
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)
    assert apply_in_place(tiny_decoder("llama"), plan).config.model_type == "pruned_llama"


def test_element_masks_go_into_the_parameters_that_are_there(family):
    model = tiny_decoder(family)
    config, parameters = model.config, dict(model.named_parameters())
    half = torch.arange(40)[:, None] % 2 == torch.arange(48) % 2
    plan = [LayerPlan(masks={"mlp.up_proj": half}), *[LayerPlan()] * 3]
    apply_in_place(model, plan)
    assert model.config is config
    assert all(parameters[name] is p for name, p in model.named_parameters())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight != 0, half)
    assert weight.requires_grad


def test_nothing_to_do_changes_nothing(family):
    model = tiny_decoder(family)
    before = logits(model)
    assert torch.equal(logits(apply_in_place(model, [LayerPlan()] * 4)), before)


def test_training_goes_on_as_it_was():
    model = tiny_decoder("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    apply_in_place(model, mixed_plan())
    assert all(layer.training and layer.gradient_checkpointing for layer in model.model.layers)
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "model.layers.2.mlp.down_proj.bias" in with_gradient
    assert "model.layers.2.mlp.up_proj.weight" not in with_gradient
    assert "model.layers.2.mlp.gate_proj.weight" in with_gradient


@pytest.mark.parametrize("looked_at_before", [False, True])
def test_hidden_states_and_attentions_are_those_of_the_layers(looked_at_before):
    cut = tiny_decoder("llama", attn_implementation="eager")
    if looked_at_before:  # transformers puts its hooks in at first use
        cut(IDS, output_attentions=True, output_hidden_states=True)
    apply_in_place(cut, mixed_plan())
    out = cut(IDS, output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape[1:]) for a in out.attentions] == [(4, 24, 24), (6, 24, 24), (2, 24, 24)]
    assert len(out.hidden_states) == 4


def test_attention_can_be_chosen_afterwards():
    for cut in (pruned("llama"), PrunedLlamaForCausalLM(pruned("llama").config)):
        sdpa = logits(cut)
        cut.set_attn_implementation("eager")
        attentions = cut(IDS, output_attentions=True).attentions
        assert [a is not None for a in attentions] == [True] * 3
        torch.testing.assert_close(logits(cut), sdpa, atol=1e-5, rtol=1e-5)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was():
    model = tiny_decoder("llama")
    before = logits(model)
    plan = mixed_plan()
    plan[3].masks["mlp.up_proj"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match=r"mask of 'mlp\.up_proj'"):
        apply_in_place(model, plan)
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="plan is for 3 layers"):
        apply_in_place(model, plan[:3])
    with pytest.raises(InputError, match="keep one layer"):
        apply_in_place(model, [LayerPlan(removed=True)] * 4)
    gpt = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9)
    other = AutoModelForCausalLM.from_config(gpt)
    with pytest.raises(InputError, match="class GPT2LMHeadModel cannot be pruned in place"):
        apply_in_place(other, [LayerPlan()])


def test_a_config_with_half_a_group_is_refused():
    # huggingface_hub's error, which is no ValueError
    with pytest.raises(Exception, match="Layer 1 has 3 query heads for 2 KV heads"):
        PrunedLlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            per_layer_config={1: {"num_attention_heads": 3}},
        )


def test_a_layer_is_built_without_memory(family):
    cut = pruned(family)
    for i, layer in enumerate(cut.model.layers):
        built = build_layer(cut.config, i)
        assert {p.device.type for p in built.parameters()} == {"meta"}
        built.load_state_dict(layer.state_dict(), assign=True)
        x = torch.randn(1, 5, 48)
        places = cut.model.rotary_emb(x, torch.arange(5)[None])
        with torch.no_grad():
            ours = built(x, position_embeddings=places, attention_mask=None)
            theirs = layer(x, position_embeddings=places, attention_mask=None)
        assert torch.equal(ours, theirs)
        assert built.self_attn.config._attn_implementation == "sdpa"
