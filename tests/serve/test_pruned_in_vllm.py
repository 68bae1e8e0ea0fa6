"""Pruned checkpoints in vLLM, found by the entry point: its greedy tokens are transformers'."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import engine
from model_prune.checkpoint import open_checkpoint, write_checkpoint
from model_prune.core.plan import LayerPlan
from model_prune.core.target import Dims
from model_prune.decoders import apply_in_place
from tiny_decoders import biases, tiny_decoder, units

pytestmark = pytest.mark.slow
BLOCK = 32
POOL = 1 << 30  # bytes of the cache, of tests/engines.py
TEXTS = [
    "The capital of France is",
    "Water boils at",
    "In 1969, the first person to walk on the Moon",
    "def fibonacci(n):",
    "The three states of matter are",
    "Photosynthesis is the process by which plants",
    "Question: What is the largest planet?\nAnswer:",
    "Bread is made of flour,",
    "My favourite season is autumn, because",
    "Once upon a time, in a village near the sea, there lived an old fisherman who " * 6,
]


def smol_plan(stored):
    """A quarter of the layers' weights: widths by turns, heads in every third, two layers.

    Units go by the norm of the columns that read them; biases are small and random.
    """
    plan = []
    for i in range(stored.config.num_hidden_layers):
        dims, state = Dims.of(stored.config, i), stored.layer_state(i)
        down = state["mlp.down_proj.weight"].float().norm(dim=0)
        width = (1056, 1216, 1376)[i % 3]
        kept = {"neuron": down.topk(width).indices.sort().values}
        if i % 3 == 1:
            out = state["self_attn.o_proj.weight"].float().norm(dim=0)
            groups = out.view(dims.kv_groups, -1).norm(dim=1)
            kept["kv_group"] = groups.topk(2).indices.sort().values
        small = {name: bias / 20 for name, bias in biases(i, dims.hidden).items()}
        plan.append(LayerPlan(units=kept, biases=small, removed=i in (15, 17)))
    return plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from pipelines.small_model import small_model

    out = tmp_path_factory.mktemp("cut") / "model"
    plan = smol_plan(open_checkpoint(small_model()))
    write_checkpoint(small_model(), out, plan, plan_json={}, progress=False)
    return out


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


@torch.no_grad()
def check_greedy(folder, prompts, answers):
    """Each token of an answer is the likeliest after what stands before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer
    return model


def test_a_cut_model_answers_as_in_transformers_and_under_pressure(folder, prompts):
    config = open_checkpoint(folder).config
    dims = [Dims.of(config, i) for i in range(config.num_hidden_layers)]
    assert {(d.heads, d.kv_groups) for d in dims} == {(9, 3), (6, 2)}
    assert len(dims) == 28
    removed = 1 - sum(d.weights for d in dims) / (30 * Dims(576, 9, 3, 64, 1536).weights)
    assert 0.2 < removed < 0.3

    common = {"max_model_len": 256, "block_size": BLOCK}
    with engine(folder, **common) as ask:
        assert ask("architecture") == ("PrunedForCausalLM", "LlamaDecoderLayer")
        answers = ask("answer", prompts, 24)
        long = ask("answer", prompts, 60)
        blocks = ask("blocks")
    check_greedy(folder, prompts, answers)
    assert [answer[:24] for answer in long] == answers

    a_block = 2 * BLOCK * 64 * 4  # of one KV head: keys and values, float32
    assert blocks == POOL // (a_block * sum(d.kv_groups for d in dims))
    assert blocks > 1.2 * (POOL // (a_block * 3 * 30))  # what the whole model had

    pressed = {"num_gpu_blocks_override": 12, "enable_prefix_caching": True}
    pressed |= {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(folder, **common, **pressed) as ask:
        assert ask("answer", prompts, 60) == long
        assert ask("counter", "num_preemptions") > 0
        for _ in range(2):  # the second time from the blocks of the first
            assert ask("answer", prompts[-1:], 60) == long[-1:]
        assert ask("counter", "prefix_cache_hits") > 0


# The width does not tell the size of a head, as stock code may think.
SIZES = {
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 256,
}
FAMILIES = {
    "llama": ({"hidden_size": 96, "attention_bias": True}, "LlamaDecoderLayer"),
    "mistral": ({"sliding_window": 24}, "LlamaDecoderLayer"),
    "qwen2": ({}, "LlamaDecoderLayer"),
    "qwen3": ({"use_sliding_window": False, "layer_types": None}, "Qwen3DecoderLayer"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_in_transformers(family, tmp_path):
    own, layer = FAMILIES[family]
    settings = {**SIZES, **own}
    plan = [
        LayerPlan(units=units(kv_group=[0, 2], neuron=[*range(0, 96, 2)])),
        LayerPlan(biases=biases(1, settings["hidden_size"])),
        LayerPlan(removed=True),
        LayerPlan(units=units(kv_group=[1], neuron=[*range(64)])),
    ]
    model = apply_in_place(tiny_decoder(family, **settings), plan)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in range(3, 45, 4)]
    with engine(tmp_path, max_model_len=128, skip_tokenizer_init=True) as ask:
        assert ask("architecture") == ("PrunedForCausalLM", layer)
        answers = ask("answer", prompts, 24)
    check_greedy(tmp_path, prompts, answers)
    assert len({token for answer in answers for token in answer}) > 20


def test_layers_that_cannot_be_split_over_devices_are_named():
    from model_prune.vllm_model import check_parallel
    from prune_core.errors import InputError

    plan = [LayerPlan(), LayerPlan(units=units(neuron=[*range(3)])), LayerPlan(), LayerPlan()]
    config = apply_in_place(tiny_decoder("llama", num_key_value_heads=6), plan).config
    check_parallel(config, 1)
    with pytest.raises(InputError, match=r"Layer 1 .*3 neurons.*tensor_parallel_size=2"):
        check_parallel(config, 2)
    with pytest.raises(InputError, match=r"Layer 0 .*6 query heads.*tensor_parallel_size=4"):
        check_parallel(config, 4)


def test_another_vllm_says_what_it_needs(monkeypatch):
    import vllm

    from model_prune import vllm_plugin
    from prune_core.errors import InputError

    assert vllm_plugin.PrunedForCausalLM.__name__ == "PrunedForCausalLM"
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(InputError, match=r"inside vLLM 0\.32\.\*, and this is vLLM 0\.33\.0"):
        vllm_plugin.PrunedForCausalLM  # noqa: B018


def test_a_plugin_that_fails_leaves_vllm_as_it_was(monkeypatch, caplog):
    import vllm

    from model_prune import vllm_plugin

    monkeypatch.setattr(vllm, "ModelRegistry", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to where caplog listens
    with caplog.at_level("WARNING"):
        vllm_plugin.register()
    assert "pruned models cannot be served" in caplog.text
