"""What does pruning cost a real model, by each method on the same text?

    python benchmarks/model/quality.py --model FOLDER --text wikitext2_valid.txt.gz \\
        --test wikitext2_test.txt.gz --second qa_reading.jsonl.gz

Every method reads the same windows of calibration text, so its paper's own number of them does not
count; Adapt-Pruner, which passes over them at every step, reads the first --adapt-windows of them;
iCBS and Týr take fewer steps and candidates than is their default, which `settings` of a row names.
Perplexity is that of model_prune.evaluate, in windows of 512 tokens, on the test text and on one of
another kind; ratios to the dense model have their paired 95 % interval. Of a `.jsonl` file the text
is its rows' distinct contexts, with empty lines between them.

    elements   half of the weights zero
    2:4        the same, in a pattern
    units      a fifth of the decoder layers' weights cut, in KV groups and neurons
    layers     a tenth of the layers removed; a random run is one of layers in a row, as Angle's

`removed` and `zeros` are counted in the matrices of the pruned model: the share that is no longer
there, and what of the rest is zero. `seconds` is what finding the plan took. Each row is written
when it is there, and a run goes on after the last: to measure again, delete the file.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from model_prune import Calibration, load_method
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES
from model_prune.core.work import Work
from model_prune.evaluate import Perplexity, compare, perplexity
from model_prune.method import Depth, Method
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, read_text, write_json

HERE = Path(__file__).parent / "results"
RUNS = 5
# Fewer steps, samples, candidates and tokens than the methods' own, so that a row ends.
IMPROVED = {"steps": 12, "samples": 16}
SEARCHED = {"iterations": 2, "generations": 6, "offspring": 12}
SEARCHED |= {"survivors": (4, 1), "judged_by": (1024, 4096)}
ELEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "wanda, staged": ("wanda", {"order": "staged"}),
    "ria": ("ria", {}),
    "dsnot": ("dsnot", {}),
    "owl": ("owl", {}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, staged": ("sparsegpt", {"order": "staged"}),
    "icbs": ("icbs", IMPROVED),
    "icbs, from magnitude": ("icbs", IMPROVED | {"start": "magnitude"}),
}
PATTERN = ("random", "magnitude", "wanda", "ria", "sparsegpt")
UNITS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "flap": ("flap", {}),
    "flap, no compensation": ("flap", {"compensation": "none"}),
    "flap, least squares": ("flap", {"compensation": "least_squares"}),
    "cfsp": ("cfsp", {}),
    "cfsp, least squares": ("cfsp", {"compensation": "least_squares"}),
    "cfsp, scored by row": ("cfsp", {"score": "row"}),
    "cfsp, layers alike": ("cfsp", {"slope": 0.0}),
    "amp": ("amp", {}),
    "amp, least squares": ("amp", {"compensation": "least_squares"}),
    "amp, neurons by activation": ("amp", {"neuron": "activation"}),
    "llm_pruner": ("llm_pruner", {}),
    "llm_pruner, second order": ("llm_pruner", {"order": "second"}),
    "llm_pruner, vector": ("llm_pruner", {"order": "vector"}),
    "spa": ("spa", {}),
    "obspa": ("obspa", {}),
    "prunenet": ("prunenet", {}),
    "tyr, not searched": ("tyr", SEARCHED | {"iterations": 1, "generations": 0}),
    "tyr": ("tyr", SEARCHED),
}


@dataclass(frozen=True)
class Given:
    """A recipe that removes the layers it is given."""

    removed: range

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        return [LayerPlan(removed=i in self.removed) for i in range(len(decoder.dims))]


@dataclass(frozen=True, kw_only=True)
class RandomRun(Depth):
    """Remove layers in a row, never the first; no two seeds give the same ones."""

    name = "random run"
    seed: int = 0

    def recipe(self, decoder: Decoder) -> Given:
        count = self.count(decoder)
        starts = np.random.default_rng(0).permutation(len(decoder.dims) - count) + 1
        return Given(range(starts[self.seed], starts[self.seed] + count))


def methods(arguments: argparse.Namespace) -> dict[str, dict[str, Method]]:
    """By table and row."""
    units = {
        f"random, seed {seed}": load_method("random", remove=0.2, seed=seed)
        for seed in range(arguments.seeds)
    }
    units |= {row: load_method(name, remove=0.2, **own) for row, (name, own) in UNITS.items()}
    units["adapt_pruner"] = load_method("adapt_pruner", remove=0.2, steps=arguments.adapt_steps)
    return {
        "elements": {
            row: load_method(name, sparsity=0.5, **own) for row, (name, own) in ELEMENTS.items()
        },
        "2:4": {name: load_method(name, pattern="2:4") for name in PATTERN},
        "units": units,
        "layers": {
            **{name: load_method(name, remove=0.1) for name in ("angle", "shortgpt")},
            **{f"random run {seed}": RandomRun(remove=0.1, seed=seed) for seed in range(RUNS)},
        },
    }


class Subject:
    """The model, its texts, and the perplexities of the dense model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.windows = arguments.model, arguments.test_windows
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.texts = {"test": read(arguments.test), "second": read(arguments.second)}
        self.calibration = Calibration.read(
            [arguments.text], self.tokenizer, windows=arguments.windows, tokens=arguments.tokens
        )
        self.few = Calibration(self.calibration.windows[: arguments.adapt_windows])
        model = self.load()
        self.weights = weights(model)
        self.dense = self.measure(model)

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, use_safetensors=True
        )

    def measure(self, model: Any) -> dict[str, Perplexity]:
        return {
            name: perplexity(model, self.tokenizer, text, max_windows=self.windows, progress=False)
            for name, text in self.texts.items()
        }

    def row(self, method: Method) -> dict[str, Any]:
        started = time.perf_counter()
        calibration = self.few if method.name == "adapt_pruner" else self.calibration
        plan = method.plan(self.folder, calibration, device="cpu", progress=False)
        seconds = time.perf_counter() - started
        model = plan.apply(self.load())
        left = weights(model)
        return {
            "method": method.name,
            "settings": plan.settings,
            **{
                name: beside(self.dense[name], found) for name, found in self.measure(model).items()
            },
            "removed": 1 - left / self.weights,
            "zeros": sum(int((matrix == 0).sum()) for matrix in matrices(model)) / left,
            "parameters": model.num_parameters(),
            "seconds": seconds,
        }


def read(path: Path) -> str:
    if ".jsonl" not in path.suffixes:
        return read_text(path)
    return "\n\n".join(dict.fromkeys(row["context"] for row in read_jsonl(path)))


def matrices(model: Any) -> list[torch.Tensor]:
    """Of all decoder layers."""
    return [layer.get_submodule(name).weight for layer in model.model.layers for name in MATRICES]


def weights(model: Any) -> int:
    return sum(matrix.numel() for matrix in matrices(model))


def beside(dense: Perplexity, pruned: Perplexity) -> dict[str, float]:
    found = compare(dense, pruned)
    return {
        "perplexity": pruned.value,
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text", "test", "second"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="draws of random units")
    parser.add_argument("--adapt-steps", type=int, default=25)
    parser.add_argument("--adapt-windows", type=int, default=8)
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # of loading, once a row
    settings = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    out = HERE / "quality.json"
    before = json.loads(out.read_text()) if out.exists() else {}
    done = before["tables"] if settings.items() <= before.items() else {}
    subject = Subject(arguments)
    dense = {name: found.value for name, found in subject.dense.items()}
    tables = methods(arguments)
    left = [
        (table, row) for table in tables for row in tables[table] if row not in done.get(table, {})
    ]
    for table, row in tqdm(left, desc="measured"):
        done.setdefault(table, {})[row] = subject.row(tables[table][row])
        write_json(
            out,
            {
                "dense": dense,
                "tables": done,
                "calibration": subject.calibration.to_dict(),
                **settings,
                "provenance": provenance(seed=0),
            },
        )
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
