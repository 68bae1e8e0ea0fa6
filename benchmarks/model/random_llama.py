"""Llamas of random weights, for what depends on sizes and not on what weights say."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from model_prune.checkpoint import LAYERS
from model_prune.decoders import build_layer
from prune_core.storage import write_json

PER_SHARD = 5  # layers
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
    ends = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    shards: list[dict[str, tuple[int, ...]]] = [ends]
    for i in range(config.num_hidden_layers):
        if i % PER_SHARD == 0:
            shards.append({})
        layer = build_layer(config, i).state_dict()
        shards[-1] |= {f"{LAYERS}{i}.{name}": tensor.shape for name, tensor in layer.items()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: drawn(shape, generator) for key, shape in shapes.items()}, folder / name)
        files |= dict.fromkeys(shapes, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
