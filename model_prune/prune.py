"""From one model's folder to a smaller or sparser one: plan, write, report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_prune import load_method
from model_prune.checkpoint import check_output, open_checkpoint, write_checkpoint
from model_prune.core.calibration import Calibration
from model_prune.core.target import matching
from model_prune.evaluate import Perplexity, evaluate_folder
from model_prune.method import Method
from model_prune.plan import Plan
from model_prune.report import Report
from prune_core.errors import InputError
from prune_core.provenance import provenance
from prune_core.storage import StrPath

Text = StrPath | Sequence[StrPath]


def prune_model(
    model: StrPath,
    *,
    method: str | Method,
    out: StrPath,
    calibration: Text | Calibration | None = None,
    windows: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    save_plan: StrPath | None = None,
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Prune a folder of a model into another one, and say what came of it.

    A run that was stopped goes on where it was when it is called again in the same way: results
    of layers are kept in the folder `OUT.work` until the model is written. Besides what methods
    that need gradients say, and what `texts` take, which load both models whole, one layer and the
    activations are in memory.

    Args:
        model: A folder of transformers', or the name of a model of the hub.
        method: A name of METHODS, with its `settings`; or one made already.
        out: The folder to write; see `write_pruned`.
        calibration: Text files, UTF-8, plain or .gz; or windows.
        windows, tokens: How many windows of how many tokens are read; the paper's by default.
        seed: Of which windows are drawn.
        save_plan: Where to keep the plan, as Plan.save does.
        texts: To measure the perplexity on before and after, by name.
        overwrite: Replace what is at `out`.
        device: Of the computation: a GPU if there is one.
        progress: Show bars on stderr.

    Raises:
        InputError: As of Method.plan and `write_pruned`; calibration text that is missing, or
            shorter than a window.
        CheckpointError: A model that cannot be read.
    """
    if isinstance(method, str):
        method = load_method(method, **settings)
    elif settings:
        raise InputError(f"{method.name} is made already: leave out {', '.join(settings)}.")
    folder, out = local_folder(model), Path(out)
    check_output(open_checkpoint(folder), out, overwrite)
    # First, so that a text that does not do is told before hours are spent.
    before = evaluate_folder(folder, texts, progress=progress) if texts else {}
    started = time.perf_counter()
    plan = plan_model(
        folder,
        method,
        calibration,
        windows=windows,
        tokens=tokens,
        seed=seed,
        work=work_of(out),
        device=device,
        progress=progress,
    )
    spent = {"plan": time.perf_counter() - started}
    if save_plan is not None:
        plan.save(save_plan)
    report = write_pruned(
        folder,
        out,
        plan,
        texts=texts,
        before=before,
        overwrite=overwrite,
        seconds=spent,
        progress=progress,
    )
    shutil.rmtree(work_of(out))
    return report


def work_of(out: StrPath) -> Path:
    """Where results of layers are kept until the model is written."""
    return Path(out).with_name(f"{Path(out).name}.work")


def plan_model(
    model: StrPath,
    method: Method,
    calibration: Text | Calibration | None = None,
    *,
    windows: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    work: StrPath | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Plan:
    """Find what a folder's model loses by a method; arguments and errors as of `prune_model`.

    work: a folder in which results of layers are kept, so that a stopped run goes on.
    """
    folder = local_folder(model)
    if method.reads and calibration is not None and not isinstance(calibration, Calibration):
        from transformers import AutoTokenizer

        calibration = Calibration.read(
            [calibration] if isinstance(calibration, str | os.PathLike) else calibration,
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            windows=windows or method.windows,
            tokens=tokens or method.tokens,
            seed=seed,
        )
    read = calibration if isinstance(calibration, Calibration) else None
    return method.plan(folder, read, work=work, device=device, progress=progress)


def write_pruned(
    model: StrPath,
    out: StrPath,
    plan: Plan,
    *,
    texts: Mapping[str, str] | None = None,
    before: Mapping[str, Perplexity] | None = None,
    overwrite: bool = False,
    seconds: Mapping[str, float] | None = None,
    progress: bool = True,
) -> Report:
    """Write the model as it is after a plan, which may be one that was saved.

    `out` gets the model, prunekit.json with the plan's numbers and where they come from, and the
    report as report.json and report.html.

    texts: to measure perplexity on, by name.   before: that of `model` on them, if it is known.

    Raises InputError and CheckpointError as `write_checkpoint`, and as `evaluate_folder` for
    `texts`.
    """
    folder, out = local_folder(model), Path(out)
    check_output(open_checkpoint(folder), out, overwrite)
    # First, so that a text that does not do is told before anything is written.
    was = before or (evaluate_folder(folder, texts, progress=progress) if texts else {})
    spent, started = dict(seconds or {}), time.perf_counter()
    about = plan.to_dict() | {"provenance": provenance()}
    write_checkpoint(
        folder, out, plan.layers, plan_json=about, overwrite=overwrite, progress=progress
    )
    spent["write"] = time.perf_counter() - started
    perplexity = {}
    if texts:
        started = time.perf_counter()
        now = evaluate_folder(out, texts, progress=progress)
        perplexity = {name: (was[name], now[name]) for name in texts}
        spent["evaluate"] = time.perf_counter() - started
    report = describe(folder, plan, perplexity=perplexity, seconds=spent)
    report.save(out / "report.json")
    report.to_html(out / "report.html")
    return report


def describe(model: StrPath, plan: Plan, **measured: Any) -> Report:
    """What a plan takes out of a model's folder, in numbers; nothing is written.

    measured: `perplexity` and `seconds` of Report.of.
    """
    checkpoint = open_checkpoint(local_folder(model))
    targets = plan.settings.get("targets")
    said = [f"{k} {v}" for k, v in plan.settings.items() if k in _SIZES and v is not None]
    return Report.of(
        f"{plan.model['name']}: {', '.join([plan.method, *said])}",
        plan.dims,
        plan.layers,
        vocabulary=checkpoint.config.vocab_size,
        tied=checkpoint.config.tie_word_embeddings,
        bytes_per_weight=checkpoint.dtype.itemsize,
        target=matching(targets, len(plan.dims)) if targets else None,
        **measured,
    )


_SIZES = ("sparsity", "pattern", "remove", "keep", "targets")


def local_folder(model: StrPath) -> Path:
    """The folder given, or that of a model of the hub, fetched now; never pickles, never code.

    Raises InputError for a name that is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except (OSError, ValueError) as error:  # all that the hub's client raises is one of these
        raise InputError(
            f"'{model}' is no folder, and cannot be fetched from the hub ({error}): give the path "
            f"of a folder with config.json and weights in safetensors."
        ) from error
