"""vLLM's way to pruned checkpoints: the entry point `vllm.general_plugins`.

    vllm serve FOLDER

vLLM calls `register` in each of its processes, before it reads a model's config.json. Nothing of
vLLM is replaced: who serves another model meets nothing of this but four names in a table.
"""

from __future__ import annotations

import logging
from typing import Any

from model_prune.core.target import FAMILIES
from prune_core.errors import InputError

SUPPORTED = "0.32."  # the model is put together from vLLM's own layers, which move
ARCHITECTURES = {
    "llama": "PrunedLlamaForCausalLM",
    "mistral": "PrunedMistralForCausalLM",
    "qwen2": "PrunedQwen2ForCausalLM",
    "qwen3": "PrunedQwen3ForCausalLM",
}


def register() -> None:
    """The entry point: tell transformers of the configs and vLLM of the architectures."""
    try:
        from vllm import ModelRegistry

        import model_prune.decoders  # noqa: F401  from which vLLM reads the configs

        for family in FAMILIES:
            # By name, so that the model's code is imported where one is served.
            ModelRegistry.register_model(ARCHITECTURES[family], f"{__name__}:PrunedForCausalLM")
    except Exception as error:  # who serves another model must not fail by this
        logging.getLogger(f"vllm.{__name__}").warning(
            "prunekit's pruned models cannot be served by this vLLM: %s", error
        )


def __getattr__(name: str) -> Any:
    """`PrunedForCausalLM`, where vLLM serves one; InputError in a vLLM that it was not made for."""
    if name != "PrunedForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        raise InputError(
            f"Models whose layers differ are served inside vLLM {SUPPORTED}*, and this is vLLM "
            f"{vllm.__version__}: install that version, or prune all layers alike."
        )
    from model_prune.vllm_model import PrunedForCausalLM

    return PrunedForCausalLM
