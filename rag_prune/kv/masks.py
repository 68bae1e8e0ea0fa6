"""Static channels: ThinK's scores averaged over calibration text, once for a model.

The channels that ThinK chooses for a head differ little from prompt to prompt, so a file of scores
serves them without a state in the cache; one file serves every ratio.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prune_core.errors import CheckpointError, InputError
from prune_core.storage import StrPath, atomic_write
from rag_prune.kv.models import head_size
from rag_prune.kv.think import channel_scores

_FORMAT = "prunekit-kv-masks-1"
_IMPLEMENTATION = "prunekit_kv_calibration"
_GEOMETRY = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def model_fingerprint(text_config: Any) -> str:
    """SHA-256 of what makes two models' heads comparable: their family and geometry, not weights.

    So fine-tunes of one model share their masks.
    """
    found: dict[str, Any] = {name: getattr(text_config, name, None) for name in _GEOMETRY}
    found["head_dim"] = head_size(text_config)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def calibrate_masks(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    path: StrPath,
    *,
    obs_window: int = 32,
    tokens: int = 1024,
    progress: bool = True,
) -> Path:
    """Write the mean ThinK score of every channel to a safetensors file, and return its path.

    model, tokenizer: of transformers; a decoder whose cache is to be pruned.
    texts: some dozen, like those that will be served; each is cut into pieces of `tokens`, and
        pieces shorter than twice `obs_window` are left out.
    obs_window: newest queries of a piece that score its keys.

    Each piece's scores are divided by their sum over the head, so that all pieces count alike. The
    file holds `scores`, float32 [layers, kv_heads, head_size], and the model's fingerprint.
    Raises InputError if no piece is long enough.
    """
    pieces = [
        piece
        for text in texts
        for piece in torch.split(_ids(tokenizer, text), tokens)
        if len(piece) >= 2 * obs_window
    ]
    if not pieces:
        raise InputError(
            f"Calibration needs text of at least {2 * obs_window} tokens, and none of the "
            f"{len(texts)} texts has so many: give longer ones."
        )
    text_config = model.config.get_text_config(decoder=True)
    sums: dict[int, Tensor] = {}

    def observe(module: Any, query: Tensor, key: Tensor) -> None:
        scores = channel_scores(query[:, :, -obs_window:], key)[0]
        share = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        sums[module.layer_idx] = sums.get(module.layer_idx, 0) + share.cpu()

    with _observed(model, observe), torch.inference_mode():
        for piece in tqdm(pieces, desc="calibrating", disable=not progress):
            model(piece[None].to(model.device), use_cache=False, logits_to_keep=1)
    scores = torch.stack([sums[i] for i in range(text_config.num_hidden_layers)]) / len(pieces)
    made_of = {"pieces": str(len(pieces)), "obs_window": str(obs_window)}
    save_masks(scores, path, text_config, **made_of)
    return Path(path)


def save_masks(scores: Tensor, path: StrPath, text_config: Any, **told: str) -> None:
    """Write scores, float32 [layers, kv_heads, head_size], for the policy `static` of a model.

    told: what else the file says of itself.
    """
    metadata = {"format": _FORMAT, "model": model_fingerprint(text_config), **told}
    content = save({"scores": scores}, metadata)
    with atomic_write(path, "wb") as file:
        file.write(content)


def load_masks(path: StrPath, fingerprint: str) -> Tensor:
    """The scores that `calibrate_masks` wrote, float32 [layers, kv_heads, head_size].

    fingerprint: of the model that they are for. Raises CheckpointError for a file that is
    something else, and InputError for the masks of another model.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            told = file.metadata() or {}
            if told.get("format") != _FORMAT:
                raise CheckpointError(
                    f"'{path}' is not a file of KV masks: give one that calibrate_masks or "
                    f"`prunekit kv calibrate` wrote."
                )
            scores: Tensor = file.get_tensor("scores")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot read the KV masks '{path}' ({error}): give a file that calibrate_masks or "
            f"`prunekit kv calibrate` wrote."
        ) from error
    if told.get("model") != fingerprint:
        raise InputError(
            f"The KV masks '{path}' were calibrated for a model of another family or geometry: "
            f"calibrate this one with `prunekit kv calibrate`."
        )
    return scores


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


@contextmanager
def _observed(model: Any, observe: Any) -> Iterator[None]:
    """Call `observe(module, query, key)` wherever the model attends inside the block."""

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        observe(module, query, key)
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register(_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
