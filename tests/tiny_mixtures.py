"""Tiny random mixtures of experts, of every family whose experts can be chosen among."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_prune.core.target import MIXTURES
from tiny_decoders import HIDDEN, LAYERS, VOCABULARY, random_windows

EXPERTS, TOP, NEURONS = 8, 2, 24
# What the families have of their own: shared experts, layers with one FFN, sizes of heads.
OWN = {
    "mixtral": {"intermediate_size": NEURONS, "num_local_experts": EXPERTS, "head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3_moe": {"head_dim": 16, "decoder_sparse_step": 2, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": NEURONS},
}


def tiny_mixture(family, **settings):
    """A causal model in evaluation mode, whose routers prefer some experts."""
    torch.manual_seed(0)
    named = {} if family == "mixtral" else {"num_experts": EXPERTS}
    if family.startswith("qwen"):
        named |= {"moe_intermediate_size": NEURONS, "intermediate_size": 40}
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_experts_per_tok": TOP,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **named,
            **OWN[family],
            **settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # which some families begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model


__all__ = ["EXPERTS", "LAYERS", "MIXTURES", "TOP", "random_windows", "tiny_mixture"]
