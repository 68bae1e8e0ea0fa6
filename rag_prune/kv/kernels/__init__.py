"""Attention over pruned pages, compiled: C++ for the CPU, Triton for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_prune.kv import pages


@dataclass(frozen=True)
class Kernels:
    """Stand-ins for the functions of `pages`: the same arguments, the same results."""

    write: Callable[..., None]
    decode: Callable[..., Tensor]
    afar: Callable[..., tuple[Tensor, Tensor]]


def choose(device: torch.device) -> Kernels:
    """The fastest that there are for a device."""
    if device.type == "cpu":
        from rag_prune.kv.kernels import cpu

        return Kernels(cpu.write, cpu.decode, cpu.afar)
    if device.type == "cuda":
        from rag_prune.kv.kernels import gpu

        return Kernels(pages.write, gpu.decode, pages.afar)
    return Kernels(pages.write, pages.decode, pages.afar)
