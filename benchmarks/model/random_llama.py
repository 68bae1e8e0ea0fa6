"""Llamas of random weights, for what depends on sizes and not on what weights say."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from model_prune.checkpoint import LAYERS, ShardWriter
from model_prune.decoders import build_layer

SIZES: dict[str, dict[str, int]] = {
    "Llama 3.2 3B": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
    },
    "SmolLM2 1.7B": {
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 49_152,
    },
}


def write_model(folder: Path, size: str) -> None:
    """In bfloat16, shard by shard, with tied embeddings."""
    config = LlamaConfig(
        **SIZES[size],
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    for i in range(config.num_hidden_layers):
        for name, tensor in build_layer(config, i).state_dict().items():
            shapes[f"{LAYERS}{i}.{name}"] = tuple(tensor.shape)
    generator, writer = torch.Generator().manual_seed(0), ShardWriter(folder)
    for name, shape in shapes.items():
        writer.add(name, drawn(shape, generator))
    writer.close()


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
