"""How much memory does it take to prune a model of 3 billion weights?

    OMP_NUM_THREADS=2 python benchmarks/model/memory.py
    OMP_NUM_THREADS=2 python benchmarks/model/memory.py --model FOLDER  # smaller, by method

A Llama of random weights, in bfloat16 and of the sizes of Llama 3.2 3B, is written shard by shard
to a temporary folder (TMPDIR says where: 6.4 GB, and as much again for what is pruned). Each row
prunes it in a process of its own, on windows of random tokens: memory and time depend on sizes, not
on what weights and text say. With --model it is that folder's model, and there is a row for every
method that reads or keeps something of its own kind, with few steps, as these add no memory.

`peak` is VmHWM of the process: all that it had in memory at once, libraries and mapped files
included; `peak_anonymous` leaves these two out, from samples every 10 ms; `imported` is what it has
before it begins. `zeros` and `removed` are counted in the model that was written: `zeros` in one
layer, read alone.

Of peers nothing is measured. Their codes load the whole model before anything else, so the least
that they take is arithmetic: 2 bytes a weight, or 4 where a CPU computes in float32.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_llama import write_model

from model_prune import Calibration, prune_model
from model_prune.checkpoint import Checkpoint, open_checkpoint
from model_prune.core.target import MATRICES, Dims
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
ROWS: dict[str, dict[str, Any]] = {
    "wanda, half of the weights": {"method": "wanda", "sparsity": 0.5},
    "flap, a quarter of the units": {"method": "flap", "remove": 0.25},
}
OF_A_SMALLER: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "icbs": {"method": "icbs", "sparsity": 0.5, "steps": 1, "samples": 8},
    "flap": {"method": "flap", "remove": 0.2},
    "llm_pruner": {"method": "llm_pruner", "remove": 0.2},
    "spa": {"method": "spa", "remove": 0.2},
    "obspa": {"method": "obspa", "remove": 0.2},
    "tyr": {
        **{"method": "tyr", "remove": 0.2, "iterations": 1, "generations": 1, "offspring": 2},
        **{"survivors": (1,), "judged_by": (1024,)},
    },
    "prunenet": {"method": "prunenet", "remove": 0.2, "episodes": 1},
}


def prune(
    folder: Path, out: Path, settings: dict[str, Any], windows: int, tokens: int, vocabulary: int
) -> Any:
    """In a process of its own: what it had in memory, in bytes, and the seconds it took."""
    imported, anonymous, done = status("VmRSS"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            anonymous.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (windows, tokens), generator=generator)
    try:
        report = prune_model(
            folder, out=out, calibration=Calibration(ids), device="cpu", progress=False, **settings
        )
    finally:
        done.set()
        watcher.join()
    return {
        "peak": status("VmHWM"),
        "peak_anonymous": max(anonymous),
        "imported": imported,
        "seconds": report.seconds,
    }


def status(field: str) -> int:
    """Bytes, by a field of the kernel's about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def weights(checkpoint: Checkpoint) -> int:
    """Of all decoder layers."""
    config = checkpoint.config
    return sum(Dims.of(config, i).weights for i in range(config.num_hidden_layers))


def written(out: Path, before: Checkpoint) -> dict[str, float]:
    """Shares that are gone, counted in what was written."""
    after = open_checkpoint(out)
    state = after.layer_state(after.config.num_hidden_layers // 2)
    matrices = [state[f"{name}.weight"] for name in MATRICES]
    zeros = sum(matrix.numel() - int(matrix.count_nonzero()) for matrix in matrices)
    return {
        "zeros": zeros / sum(matrix.numel() for matrix in matrices),
        "removed": 1 - weights(after) / weights(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = arguments.model or Path(temporary, "model"), Path(temporary, "pruned")
        if not arguments.model:
            write_model(folder, "Llama 3.2 3B")
        before = open_checkpoint(folder)
        read = (arguments.windows, arguments.tokens, before.config.vocab_size)
        rows = {}
        for name, settings in (OF_A_SMALLER if arguments.model else ROWS).items():
            with ProcessPoolExecutor(1, spawn) as process:
                rows[name] = process.submit(prune, folder, out, settings, *read).result()
            rows[name] |= written(out, before)
            shutil.rmtree(out)
            print(name, json.dumps(rows[name], indent=1), flush=True)
    config = before.config
    layer, embeddings = Dims.of(config, 0).weights, config.vocab_size * config.hidden_size
    total = weights(before) + embeddings
    result = {
        "weights": total,
        "bytes": {"layer_in_float32": 4 * layer, "embeddings": 2 * embeddings},
        "rows": rows,
        "whole_model_by_arithmetic": {"float16": 2 * total, "float32": 4 * total},
        **vars(arguments) | {"model": folder.name},
        "threads": torch.get_num_threads(),
        "provenance": provenance(seed=0),
    }
    write_json(HERE / ("memory-methods.json" if arguments.model else "memory.json"), result)


if __name__ == "__main__":
    main()
