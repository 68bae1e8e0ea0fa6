"""Mixtures with half of their experts in vLLM, as stock models: greedy tokens are transformers'."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines import engine
from model_prune import Calibration, prune_model
from model_prune.core.target import MIXTURES
from tiny_mixtures import tiny_mixture

pytestmark = pytest.mark.slow

# Sizes that vLLM's kernels take: heads of 32, FFNs in multiples of 32.
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
OWN = {
    "mixtral": {"intermediate_size": 64, "head_dim": 32},
    "qwen2_moe": {
        "moe_intermediate_size": 64,
        "intermediate_size": 128,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {"moe_intermediate_size": 64, "intermediate_size": 128, "head_dim": 32},
    "olmoe": {"intermediate_size": 64},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_smaller_mixture_answers_as_in_transformers(family, tmp_path):
    tiny_mixture(family, **SIZES, **OWN[family]).save_pretrained(tmp_path / "whole")
    draw = torch.Generator().manual_seed(2)
    text = torch.randint(3, 256, (8, 32), generator=draw)
    prune_model(
        tmp_path / "whole",
        method="premoe",
        keep=4,
        calibration=Calibration(text),
        out=tmp_path / "half",
        progress=False,
    )
    prompts = [torch.randint(3, 256, (n,), generator=draw).tolist() for n in range(3, 45, 4)]
    with engine(tmp_path / "half", max_model_len=128, skip_tokenizer_init=True) as ask:
        architecture, _ = ask("architecture")
        answers = ask("answer", prompts, 24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    assert architecture == type(model).__name__  # vLLM's own class of that name
    assert len({token for answer in answers for token in answer}) > 20
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            found = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
            assert found.argmax(-1).tolist() == answer
