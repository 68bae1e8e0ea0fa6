"""Tiny random mixtures of experts, of every family whose experts can be chosen among."""

import torch

from tiny_decoders import tiny_model

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
    named = {"num_experts_per_tok": TOP}
    if family != "mixtral":
        named |= {"num_experts": EXPERTS}
    if family.startswith("qwen"):
        named |= {"moe_intermediate_size": NEURONS, "intermediate_size": 40}
    model = tiny_model(family, **{**named, **OWN[family], **settings})
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # which some families begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model
