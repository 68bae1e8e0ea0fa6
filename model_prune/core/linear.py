"""Matrix products of a calibration pass by the faster of the two libraries that torch carries.

For float32 on x86 torch asks Intel's MKL, which takes its slower kernels on processors of other
makers: on an AMD EPYC with AVX-512 oneDNN, which torch carries for other dtypes, is twice as fast.
The choice goes by the maker, not by a trial, so that a pass that is stopped goes on with the same
rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from prune_core.provenance import cpuinfo


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch would ask MKL on a processor that is not Intel's, and oneDNN is there."""
    foreign = cpuinfo().get("vendor_id") == "AuthenticAMD"
    backends: Any = torch.backends
    libraries = backends.mkl.is_available() and backends.mkldnn.is_available()
    return bool(foreign and libraries and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]; all float32 on a CPU, or anything.

    A weight is to be contiguous, as oneDNN takes many times as long otherwise.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_is_faster():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return nn.functional.linear(x, weight, bias)


class _OneDNN(nn.Linear):
    """A linear layer for inference in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)


def hasten(layer: nn.Module) -> None:
    """Let the linear layers of a float32 module on a CPU multiply the faster way."""
    for module in layer.modules():
        if type(module) is nn.Linear and onednn_is_faster():
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                module.__class__ = _OneDNN


def gram(x: Tensor) -> Tensor:
    """xᵀx of float32 [n, d]: [d, d]."""
    if x.device.type == "cpu" and onednn_is_faster():
        columns = x.T.contiguous()
        return multiply(columns, columns)
    return x.T @ x
