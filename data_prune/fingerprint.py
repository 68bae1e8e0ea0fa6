"""What the answers of a model depend on, as hashes: scores are kept under them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def fingerprint(model: Any, tokenizer: Any) -> dict[str, str]:
    """Hashes of the weights, the architecture and the vocabulary, not of where they came from.

    model, tokenizer: of transformers.   Cost: reads all weights.
    """
    config = model.config.to_dict()
    for where in ("_name_or_path", "transformers_version"):
        config.pop(where, None)
    return {
        "weights": hash_of_weights(model),
        "config": hash_of(config),
        "vocabulary": hash_of(tokenizer.get_vocab()),
    }


def hash_of_weights(model: Any) -> str:
    """Of a torch module's parameters and buffers, by name."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(raw.numpy().data)
    return weights.hexdigest()


def hash_of(value: Any) -> str:
    """Of a value that JSON can hold, or else its text."""
    named = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
