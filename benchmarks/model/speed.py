"""Time and memory of Wanda and SparseGPT against the official loops, on the same windows.

    python benchmarks/model/speed.py --model DIR --text wikitext2_valid.txt.gz

Each run is a process of its own, so that its peak memory is its own; ours and the official one take
turns. Wall time of the whole run, from the loaded model to the pruned one; peak is the resident
memory above that before the run. The masks of both are compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "Wanda, 50 %": {"method": "wanda", "order": "layer"},
    "Wanda, 2:4": {"method": "wanda", "order": "layer", "pattern": "2:4"},
    "Wanda staged, 50 %": {"method": "wanda", "order": "staged"},
    "SparseGPT, 50 %": {"method": "sparsegpt", "order": "layer"},
    "SparseGPT, 2:4": {"method": "sparsegpt", "order": "layer", "pattern": "2:4"},
    "SparseGPT staged, 50 %": {"method": "sparsegpt", "order": "staged"},
}


def run_one(args: argparse.Namespace) -> None:
    """One run in this process; its figures on standard output, its masks in a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import official
    from model_prune import Calibration, load_method

    case = CASES[args.case]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    read = Calibration.read([args.text], tokenizer, windows=args.windows, tokens=args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    # One small forward pass, so that the libraries' own memory and threads are there.
    with torch.no_grad():
        model(read.windows[:1, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    phases: dict[str, float] = {}
    if args.who == "ours":
        plan = load_method(**_ours(case)).plan(model, read, progress=False)
        plan.apply(model)
        seconds = time.perf_counter() - started
        masks = {
            f"layers.{i}.{name}": mask
            for i, layer in enumerate(plan.layers)
            for name, mask in layer.masks.items()
        }
    else:
        nm = (2, 4) if "pattern" in case else None
        if case["method"] == "wanda":
            masks, phases = official.wanda(model, read.windows, 0.5, nm)
        else:
            staged = case["order"] == "staged"
            masks, phases = official.sparsegpt(model, read.windows, 0.5, nm, staged)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_file(masks, args.masks)
    print(json.dumps({"seconds": seconds, "megabytes": (peak - before) / 1024, "phases": phases}))


def _ours(case: dict[str, Any]) -> dict[str, Any]:
    return {"name": case["method"]} | {k: v for k, v in case.items() if k != "method"}


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
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--masks", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_one(args)
        return
    from safetensors.torch import load_file

    from prune_core.provenance import provenance
    from prune_core.storage import write_json

    out = Path(__file__).parent / "results" / "speed.json"
    rows = []
    for case in args.cases:
        rounds, agreement = [], 0.0
        for _ in range(args.rounds):
            pair = {}
            with tempfile.TemporaryDirectory() as folder:
                for who in ("official", "ours"):
                    command = [sys.executable, __file__, "--model", args.model, "--text", args.text]
                    command += ["--windows", str(args.windows), "--tokens", str(args.tokens)]
                    command += ["--case", case, "--who", who, "--masks", f"{folder}/{who}"]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    pair[who] = json.loads(done.stdout.splitlines()[-1])
                mine, theirs = load_file(f"{folder}/ours"), load_file(f"{folder}/official")
                equal = sum(int((mine[name] == theirs[name]).sum()) for name in mine)
                agreement = equal / sum(mask.numel() for mask in mine.values())
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
                "masks_equal": agreement,
            }
        )
    write_json(out, {"windows": args.windows, "tokens": args.tokens, "rows": rows} | provenance())


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
