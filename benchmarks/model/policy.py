"""What does PruneNet's policy keep, beside rows at random and rows of largest norm?

    python benchmarks/model/policy.py --model FOLDER --text wikitext2_valid.txt.gz \\
        --test wikitext2_test.txt.gz

Each cuts as many neurons of every layer as makes a fifth or three tenths of the layers' weights, by
their rows of gate, and reads no text. The distance is Kolmogorov and Smirnov's, between the
singular values of all rows and of those kept, the mean over layers; perplexity is of windows of 512
tokens of the test text. A policy is trained for one share and used at the other, and on a sibling:
the model after FLAP cut a tenth of it by the calibration text, so that its layers have other
numbers of neurons.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from model_prune import Calibration, load_method
from model_prune.core.allocate import everywhere_alike
from model_prune.core.decoder import Decoder
from model_prune.core.structured import FromWeights, Structured
from model_prune.core.work import Work
from model_prune.decoders import apply_in_place
from model_prune.evaluate import perplexity
from model_prune.methods.prunenet import GATE, reward, spectrum
from prune_core.provenance import provenance
from prune_core.storage import read_text, write_json

HERE = Path(__file__).parent / "results"
SHARES = (0.2, 0.3)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Subject:
    """A model, and the text by which it is measured."""

    model: Any
    tokenizer: Any
    text: str
    windows: int

    def perplexity(self, model: Any) -> float:
        return perplexity(
            model, self.tokenizer, self.text, max_windows=self.windows, progress=False
        ).value

    def row(self, layers: Any, seconds: float) -> dict[str, float]:
        """What a plan's layers cost."""
        decoder = Decoder.of(self.model)
        distances = []
        for i, layer in enumerate(layers):
            gate = decoder.state(i)[GATE].float()
            distances.append(1 / reward(gate[layer.units["neuron"]], spectrum(gate)))
        pruned = apply_in_place(copy.deepcopy(self.model), list(layers))
        return {
            "distance": sum(distances) / len(distances),
            "perplexity": self.perplexity(pruned),
            "seconds": seconds,
        }


def by_rows(decoder: Decoder, share: float, score: Callable[[Tensor], Tensor]) -> Any:
    """Layers of a plan that keeps the rows of gate of highest score."""

    def scores(family: Any, i: int, state: Any, dims: Any) -> Tensor:
        return score(state[GATE].float())

    cut = Structured(share, FromWeights(("neuron",), scores), everywhere_alike())
    return cut.layers(decoder, None, Work(), False)


def measure(subject: Subject, share: float, policies: dict[str, tuple[float, str]]) -> Any:
    """All ways at a share, by row; policies (trained at a share, file) are trained if not there."""
    decoder, rows = Decoder.of(subject.model), {}
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        layers = by_rows(decoder, share, lambda g, r=random: torch.rand(len(g), generator=r))
        rows[f"random rows, seed {seed}"] = subject.row(layers, 0.0)
    layers = by_rows(decoder, share, lambda gate: gate.norm(dim=1))
    rows["rows of largest norm"] = subject.row(layers, 0.0)
    for name, (trained, policy) in policies.items():
        started = time.perf_counter()
        plans = {
            s: load_method("prunenet", remove=s, policy=policy).plan(subject.model)
            for s in (trained, share)
        }
        seconds = time.perf_counter() - started
        rows[f"PruneNet, {name}"] = subject.row(plans[share].layers, seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--test-windows", type=int, default=40)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, use_safetensors=True
    )
    text, windows = read_text(arguments.test), arguments.test_windows
    calibration = Calibration.read([arguments.text], tokenizer, windows=32, tokens=512)
    cut = load_method("flap", remove=0.1).plan(model, calibration)
    sibling = cut.apply(copy.deepcopy(model))
    subject, other = (Subject(each, tokenizer, text, windows) for each in (model, sibling))
    with tempfile.TemporaryDirectory() as folder:
        policies = {f"trained at {s:.0%}": (s, f"{folder}/{s}.safetensors") for s in SHARES}
        tables = {f"{share:.0%}": measure(subject, share, policies) for share in SHARES}
        both = {
            "trained on the model": policies["trained at 20%"],
            "trained on it": (0.2, f"{folder}/sibling.safetensors"),
        }
        tables["sibling, 20%"] = measure(other, 0.2, both)
    report = {
        "model": arguments.model.name,
        "dense": subject.perplexity(model),
        "sibling": other.perplexity(sibling),
        "tables": tables,
        "provenance": provenance(seed=0),
    }
    write_json(HERE / "policy.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
