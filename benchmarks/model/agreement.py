"""Do Wanda and SparseGPT find in a real layer what the official loops find?

    python benchmarks/model/agreement.py --model DIR --text wikitext2_valid.txt.gz

Each prunes some layers of the dense model on the same windows, with its own forward pass, its own
statistics and its own selection. `masks` is the share of weights of which both say the same, in the
matrix where it is lowest; `error` the official error of a layer's outputs, ‖(W − W')X‖² summed
over matrices, against ours: above 1 ours is the better. SparseGPT's official code removes one
weight more of every block of 128 columns, and all that tie with it, which counts in both.

FLAP ranks all units of a model at once: speed.py compares those. Writes results/agreement.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import official
from model_prune import Calibration, load_method
from model_prune.core.target import MATRICES
from prune_core.provenance import provenance
from prune_core.storage import write_json

CASES: dict[str, dict[str, Any]] = {
    "Wanda, 50 %": {"name": "wanda", "sparsity": 0.5},
    "Wanda, 2:4": {"name": "wanda", "pattern": "2:4"},
    "SparseGPT, 50 %": {"name": "sparsegpt", "sparsity": 0.5},
    "SparseGPT, 2:4": {"name": "sparsegpt", "pattern": "2:4"},
}


@torch.no_grad()
def statistics(model: Any, windows: torch.Tensor, kind: Any) -> list[dict[str, Any]]:
    """Of every layer of the dense model, by matrix."""
    run, found = official.Run(model, windows), []
    for layer in run.layers:
        found.append(run.collect(layer, official.linears_of(layer), kind))
        run.swap()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    read = Calibration.read([args.text], tokenizer, windows=args.windows, tokens=args.tokens)
    norms = statistics(model, read.windows, official.Norms)
    grams = [
        {name: found.gram for name, found in layer.items()}
        for layer in statistics(model, read.windows, official.Gram)
    ]
    rows: dict[str, list[dict[str, float]]] = {}
    for case, settings in CASES.items():
        rows[case] = []
        nm = (2, 4) if "pattern" in settings else None
        for i in args.layers:
            # Of this layer alone, so that the layers before it are dense as in `statistics`.
            method = load_method(**settings, targets=(f"layers.{i}.*",))
            plan = method.plan(model, read, progress=False).layers[i]
            shares, errors = [], {"official": 0.0, "ours": 0.0}
            for name in MATRICES:
                weight = model.model.layers[i].get_submodule(name).weight.detach()
                gram = grams[i][name]
                if settings["name"] == "wanda":
                    theirs = weight.clone()
                    theirs[official.lowest(weight, norms[i][name].squares, 0.5, nm)] = 0
                else:
                    theirs = official.sweep(weight, gram.clone(), 0.5, nm)
                ours = plan.weights.get(name, weight) * plan.masks[name]
                shares.append(float(((theirs == 0) == (ours == 0)).float().mean()))
                for who, pruned in (("official", theirs), ("ours", ours)):
                    change = (weight - pruned).double()
                    errors[who] += float(((change @ gram.double()) * change).sum())
            rows[case].append(
                {
                    "layer": i,
                    "masks": min(shares),
                    "error": errors["official"] / errors["ours"],
                }
            )
            print(case, rows[case][-1], flush=True)
    about = {"windows": args.windows, "tokens": args.tokens, "rows": rows}
    write_json(Path(__file__).parent / "results" / "agreement.json", about | provenance())
    print(json.dumps(about))


if __name__ == "__main__":
    main()
