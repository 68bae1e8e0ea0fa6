"""Time and memory of whole runs of Wanda, SparseGPT and FLAP against the official loops.

    python benchmarks/model/speed.py --model DIR --text wikitext2_valid.txt.gz

A run goes from a folder to a pruned folder, on the same windows of text. The official one loads the
model in float32, takes its loop over it (official.py; FLAP's finds the units and cuts nothing) and
saves it; ours is `prune_model`. Each is a process of its own, and they take turns: seconds are from
what the libraries and the text took to load up to the written folder, and the peak is that of
resident memory above what was there before. `same` is the share of weights, or of units, of which
both say the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import status
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import official
from model_prune import Calibration, prune_model
from model_prune.checkpoint import open_checkpoint
from prune_core.provenance import provenance
from prune_core.storage import write_json

CASES: dict[str, dict[str, Any]] = {
    "Wanda, 50 %": {"method": "wanda", "sparsity": 0.5},
    "Wanda, 2:4": {"method": "wanda", "pattern": "2:4"},
    "Wanda staged, 50 %": {"method": "wanda", "sparsity": 0.5, "order": "staged"},
    "SparseGPT, 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "SparseGPT, 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "SparseGPT staged, 50 %": {"method": "sparsegpt", "sparsity": 0.5, "order": "staged"},
    "FLAP, 20 %": {"method": "flap", "remove": 0.2},
}


def resident() -> float:
    """The most that this process has had in memory since it was last asked, MiB; on Linux."""
    peak = status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    return peak / 2**20


def run_one(args: argparse.Namespace) -> None:
    """One run in this process; its figures on standard output, the model in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    read = Calibration.read([args.text], tokenizer, windows=args.windows, tokens=args.tokens)
    torch.nn.Linear(64, 64)(torch.zeros(64, 64))  # for the threads
    resident()
    before, started = resident(), time.perf_counter()
    if args.who == "ours":
        prune_model(args.model, out=args.out, calibration=read, progress=False, **CASES[args.case])
        phases = {}
    else:
        phases = run_official(args.model, args.out, read.windows, CASES[args.case])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "megabytes": resident() - before, "phases": phases}))


def run_official(
    folder: str, out: str, windows: torch.Tensor, case: dict[str, Any]
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nm = (2, 4) if "pattern" in case else None
    if case["method"] == "wanda":
        phases = official.wanda(model, windows, 0.5, nm)
    elif case["method"] == "sparsegpt":
        phases = official.sparsegpt(model, windows, 0.5, nm, case.get("order") == "staged")
    else:
        units, phases = official.flap(model, windows, case["remove"])
        Path(out).mkdir()
        save_file(units, Path(out) / "units.safetensors")
        return phases
    model.save_pretrained(out)
    return phases


def same(theirs: Path, ours: Path) -> float:
    """Of weights that are zero in both or in neither, or of units kept by both or by neither."""
    equal = count = 0
    if (theirs / "units.safetensors").exists():
        kept = json.loads((ours / "prunekit.json").read_text())["layers"]
        units = load_file(theirs / "units.safetensors")
        for i, layer in enumerate(kept):
            for family, stays in layer["kept"].items():  # numbers of units, or how many if all stay
                theirs_stay = units[f"layers.{i}.{family}"].numpy()
                if not isinstance(stays, list):
                    stays = range(stays)
                ours_stay = np.isin(np.arange(len(theirs_stay)), stays)
                equal += int((theirs_stay == ours_stay).sum())
                count += len(theirs_stay)
        return equal / count
    first, second = open_checkpoint(theirs), open_checkpoint(ours)
    for name in first.names:
        if name.endswith("_proj.weight"):
            a, b = first.tensor(name) == 0, second.tensor(name) == 0
            equal, count = equal + int((a == b).sum()), count + a.numel()
    return equal / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    for name in ("--case", "--who", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_one(args)
        return
    rows = []
    for case in args.cases:
        rounds, agreement = [], 0.0
        for _ in range(args.rounds):
            pair = {}
            with tempfile.TemporaryDirectory() as folder:
                for who in ("official", "ours"):
                    command = [sys.executable, __file__, "--model", args.model, "--text", args.text]
                    command += ["--windows", str(args.windows), "--tokens", str(args.tokens)]
                    command += ["--case", case, "--who", who, "--out", f"{folder}/{who}"]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    pair[who] = json.loads(done.stdout.splitlines()[-1])
                agreement = same(Path(folder, "official"), Path(folder, "ours"))
            rounds.append(pair)
            print(case, pair, f"{agreement:.5f}", flush=True)
        ratios = [pair["official"]["seconds"] / pair["ours"]["seconds"] for pair in rounds]
        memory = [pair["ours"]["megabytes"] / pair["official"]["megabytes"] for pair in rounds]
        rows.append(
            {
                "case": case,
                "rounds": rounds,
                "speed-up": _spread(ratios),
                "memory": _spread(memory),
                "same": agreement,
            }
        )
    about = {"windows": args.windows, "tokens": args.tokens, "rows": rows}
    write_json(Path(__file__).parent / "results" / "speed.json", about | provenance())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
