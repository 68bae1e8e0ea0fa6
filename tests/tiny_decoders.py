"""Tiny random decoders of the families that can be pruned, and plans that use all of a plan."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_prune.core.plan import LayerPlan
from model_prune.core.target import FAMILIES, Dims

HIDDEN, HEADS, GROUPS, SIZE, NEURONS, LAYERS = 48, 6, 3, 16, 40, 4
VOCABULARY = 96
# What the families have that others do not: biases, sliding windows, heads that are not hidden / n.
OWN = {
    "llama": {"head_dim": SIZE},
    "mistral": {"head_dim": SIZE, "sliding_window": 6},
    "qwen2": {"head_dim": SIZE},
    "qwen3": {
        "head_dim": SIZE,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
}


def tiny_model(family, **settings):
    """A causal model in evaluation mode, of any family; its logits lie some units apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        },
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_decoder(family, **settings):
    """One whose layers are alike: see `tiny_model`."""
    model = tiny_model(family, **{"intermediate_size": NEURONS, **OWN[family], **settings})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin as zeros
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def roomy_decoder(family, **settings):
    """A tiny decoder that attends over whole windows, most of whose weights are in its neurons."""
    if "sliding_window" in OWN[family]:
        settings = {"sliding_window": 64, **settings}
    return tiny_decoder(family, **{"intermediate_size": 96, **settings})


def random_windows(count=8, tokens=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=draw)


def dims_of(model):
    config = model.config
    return [Dims.of(config, i) for i in range(config.num_hidden_layers)]


def units(**kept):
    return {family: torch.tensor(numbers) for family, numbers in kept.items()}


def biases(seed, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    names = ("self_attn.o_proj", "mlp.down_proj")
    return {name: 0.2 * torch.randn(hidden, generator=generator) for name in names}


def mixed_plan():
    """Of four layers: heads and neurons, nothing, the whole layer, neurons and a bias."""
    return [
        LayerPlan(units=units(kv_group=[0, 2], neuron=[*range(1, 30, 2)])),
        LayerPlan(),
        LayerPlan(removed=True),
        LayerPlan(
            units=units(kv_group=[1], neuron=[*range(3, 40)]),
            biases={"self_attn.o_proj": biases(0)["self_attn.o_proj"]},
        ),
    ]


__all__ = [
    "FAMILIES",
    "biases",
    "dims_of",
    "mixed_plan",
    "random_windows",
    "roomy_decoder",
    "tiny_decoder",
    "units",
]
