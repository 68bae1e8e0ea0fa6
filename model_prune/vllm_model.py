"""Decoders whose layers differ, inside vLLM 0.32.

vLLM reads `per_layer_config` itself: KV caches of each layer's own size in one group, attention
metadata for each number of query heads. What is left is to build every layer from its own config.
The families differ in their layers alone, so one class, vLLM's Llama, carries the layers of all:

    llama, mistral    vLLM's Llama layer
    qwen2             the same with biases in q, k and v; vLLM's own layer takes the size of a head
                      from the model's width, which is not so once heads are gone
    qwen3             vLLM's Qwen3 layer

LoRA, pipeline parallelism, speculation and quantisation are inherited.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from model_prune.core.target import PRUNED, Dims
from prune_core.errors import InputError


class PrunedForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A pruned model of any family.

    Raises InputError if its layers cannot be split over the devices.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_parallel(
            vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_layer)


def check_parallel(config: Any, devices: int) -> None:
    """Raise InputError, naming the layer, unless every layer can be split over so many devices."""
    for i in range(config.num_hidden_layers):
        dims = Dims.of(config, i)
        groups = dims.kv_groups
        if (
            dims.heads % devices
            or dims.neurons % devices
            or (groups % devices and devices % groups)
        ):
            raise InputError(
                f"Layer {i} ({dims.heads} query heads, {groups} KV heads, {dims.neurons} neurons) "
                f"cannot be split evenly over tensor_parallel_size={devices}: prune to multiples "
                f"of {devices}, or serve on fewer devices."
            )


def _layer(vllm_config: Any, prefix: str) -> Any:
    whole = vllm_config.model_config.hf_config
    config = whole.per_layer_config[extract_layer_index(prefix)]
    family = whole.model_type.removeprefix(PRUNED)
    if family == "qwen3":
        layer = Qwen3DecoderLayer(
            config=config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
    else:
        if family == "qwen2":
            config.qkv_bias = True
        layer = LlamaDecoderLayer(vllm_config=vllm_config, prefix=prefix, config=config)
    if whole.output_bias:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _add_bias(linear)
    return layer


def _add_bias(linear: Any) -> None:
    """Give a projection a bias as it would have made one; the first device alone adds it."""
    if linear.bias is None:
        empty = torch.empty(linear.output_size, dtype=linear.params_dtype)
        linear.bias = torch.nn.Parameter(empty, requires_grad=False)
        set_weight_attrs(linear.bias, {"output_dim": 0, "weight_loader": linear.weight_loader})
