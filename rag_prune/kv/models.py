"""What a model's config says of its KV cache: whether it can be pruned, and its heads' size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_core.errors import InputError


def head_size(text_config: Any) -> int:
    """Entries of a key, by a decoder's config of transformers."""
    size = getattr(text_config, "head_dim", None)
    return int(size or text_config.hidden_size // text_config.num_attention_heads)


def check_attention(model: str, config: Mapping[str, Any]) -> None:
    """Raise InputError if some layers keep other things than every token's key and value.

    model: its name, for the message.   config: of its decoder, as config.json has it.
    """
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "attention"}
    others = [
        name
        for name, value in config.items()
        if name.startswith(("mamba_", "ssm_", "linear_num_", "attn_layer_")) and value is not None
    ]
    windows = [] if config.get("layer_types") else ["sliding_window", "attention_chunk_size"]
    if config.get("use_sliding_window") is False:
        windows = ["attention_chunk_size"]
    window = next((name for name in windows if config.get(name)), None)
    if config.get("kv_lora_rank"):
        found = "its latent attention keeps one latent for all heads (MLA: kv_lora_rank)"
    elif kinds:
        found = f"it has layers of kind {', '.join(sorted(kinds))}"
    elif window:
        found = f"its layers attend to {config[window]} tokens ({window}), not to all"
    elif others:
        found = f"it has layers that keep a state instead of tokens ({others[0]})"
    elif (config.get("quantization_config") or {}).get("kv_cache_scheme"):
        found = "its checkpoint asks for a quantised cache (kv_cache_scheme)"
    else:
        return
    raise InputError(
        f"The cache of '{model}' cannot be pruned: {found}. Pages hold the keys and values of all "
        f"tokens in 2 or 4 bytes an entry, as ordinary full attention keeps them."
    )
