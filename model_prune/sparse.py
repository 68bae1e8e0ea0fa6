"""Where zeros pay: 2:4 on NVIDIA GPUs, by torch's semi-structured tensors.

Zeros of a dense file save nothing by themselves, neither memory nor time, in transformers and in
vLLM. GPUs from Ampere on multiply matrices of which two in every four neighbours are zero at up to
twice the speed, from half the memory and two bits a weight that stays. Whether a model gains
depends on its sizes and batch: measure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from model_prune.core.target import MATRICES
from prune_core.errors import InputError

_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def is_2_4(weight: Tensor) -> bool:
    """Whether of every four neighbours in a row of [out, in] two at least are zero."""
    if weight.shape[1] % 4:
        return False
    groups = weight.reshape(len(weight), -1, 4)
    return bool(((groups != 0).sum(-1) <= 2).all())


def _is_for_gpus(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and parameter.dtype in _DTYPES


def semi_structured(model: Any) -> list[str]:
    """Store the 2:4 matrices of a model's layers as such, in place; the names of these.

    model: of transformers, pruned with pattern "2:4", on a CUDA device in half precision. Others
    of its matrices stay dense. A matrix is converted at a time, so that little more memory is
    needed than the model takes. The model is for inference then, and cannot be saved.

    Raises InputError for a model that is elsewhere or of another dtype, and one that has no 2:4
    matrix whose sizes the GPU's kernels take.
    """
    first = next(model.parameters())
    if not _is_for_gpus(first):
        raise InputError(
            f"2:4 matrices are multiplied faster on CUDA devices in float16 or bfloat16 alone, and "
            f"the model is on '{first.device.type}' in {str(first.dtype).removeprefix('torch.')}: "
            f"move it with model.to('cuda', torch.float16)."
        )
    converted = []
    layers = model.model.layers
    for i, layer in enumerate(tqdm(layers, desc="to 2:4", unit="layer", disable=None)):
        for matrix in MATRICES:
            linear = layer.get_submodule(matrix)
            weight = linear.weight.detach()
            # Kernels take blocks of 32 rows and 64 columns in half precision.
            if weight.shape[0] % 32 or weight.shape[1] % 64 or not is_2_4(weight):
                continue
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            linear.weight = nn.Parameter(sparse, requires_grad=False)
            converted.append(f"layers.{i}.{matrix}")
    if not converted:
        raise InputError(
            "The model has no matrix with two zeros in every four weights of a row, and sizes that "
            "are multiples of 32 and 64: prune it with pattern='2:4' first."
        )
    return converted
