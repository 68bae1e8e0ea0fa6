"""Do a task's experts carry the task? PreMoe on a small mixture of experts that is real.

    python benchmarks/model/experts.py --instructions instructions_t0.jsonl.gz --work FOLDER

The mixture is made of SmolLM2-135M-Instruct by pipelines/upcycle.py: 8 experts, 2 a token, in each
of its last layers, trained on families of tasks; with all of them, an expert each.

    concepts     the words that a sentence was written from (common_gen)
    facts        a question and two facts that answer it (qasc)
    physics      which of two, in a short story (quarel)
    sentences    a sentence of given words (common_gen)
    paraphrases  the same in other words (MRPC, PAWS)
    steps        the first or the last of a process (wiqa)
    social       what somebody feels or does next (social_i_qa)
    commonsense  a question that needs no text (commonsense_qa)

Rows of which the completion's hash says so are held out: no completion is on both sides. An answer
is right where it is the model's greedy one, word for word: each of its tokens, and the end, is the
likeliest after what stands before it; `tokens` is the share of them that is, and `loss` is of them.

Experts are chosen on the training rows: by PreMoe for the task itself, for another task, by how
often they are chosen, and at random. --families 3 takes the first three families alone, of which
two have three experts each and one has two. Each choice is written to a folder and loaded from
there; what the layers below the first mixture give, which all share, is computed once. What was
measured stays in --work, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from model_prune import Calibration
from model_prune.checkpoint import open_checkpoint
from model_prune.methods.premoe import PreMoe
from model_prune.patterns import Patterns
from model_prune.prune import write_pruned
from pipelines.small_model import small_model
from pipelines.upcycle import Row, Upcycling, encode, upcycle
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json

HERE = Path(__file__).parent / "results"
FAMILIES = {
    "concepts": ("common_gen_topics_from_the_sentence", "common_gen_sentence_to_concepts"),
    "facts": tuple(f"qasc_qa_with_separated_facts_{i}" for i in range(1, 6)),
    "physics": (
        *("quarel_heres_a_story", "quarel_logic_test", "quarel_do_not_use"),
        *("quarel_choose_between", "quarel_testing_students"),
    ),
    "sentences": (
        *("common_gen_Example_prompt", "common_gen_Put_together"),
        *("common_gen_Given_concepts_type_1", "common_gen_Given_concepts_type_2"),
        *("common_gen_topic_to_sentence", "common_gen_random_task_template_prompt"),
    ),
    "paraphrases": (
        *("glue_mrpc_generate_paraphrase", "glue_mrpc_generate_sentence"),
        "paws_labeled_final_paraphrase_task",
    ),
    "steps": (
        "wiqa_what_is_the_missing_first_step",
        "wiqa_what_might_be_the_first_step_of_the_process",
        "wiqa_what_might_be_the_last_step_of_the_process",
        "wiqa_what_is_the_final_step_of_the_following_process",
    ),
    "social": (
        *("social_i_qa_Generate_answer", "social_i_qa_I_was_wondering"),
        "social_i_qa_Show_choices_and_generate_answer",
    ),
    "commonsense": (
        *("commonsense_qa_answer_to_question", "commonsense_qa_most_suitable_answer"),
        "commonsense_qa_question_answering",
        "commonsense_qa_answer_given_question_without_options",
    ),
}
AGAINST = {
    "premoe": ("all", "frequency", "random", "others"),
    "2 experts, premoe": ("2 experts, random", "2 experts, others"),
}
TRAINED, HELD = 360, 60  # rows of a family at most
WINDOWS, TOKENS = 32, 128  # of training rows, to choose experts on
QUERIES, SEEDS = 10, 3
PEAK = """
import re, sys, time
from model_prune import Plan
from model_prune.prune import write_pruned
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, started = peak(), time.perf_counter()
"""
LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
sum(float(weight.sum()) for weight in model.parameters())  # or they are not in memory yet
"""
WRITE = """
write_pruned(sys.argv[1], sys.argv[3], Plan.load(sys.argv[2]), overwrite=True, progress=False)
"""
TOLD = "print(peak() - before, time.perf_counter() - started)"


def rows(path: Path, families: Sequence[str]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Prompts and completions by family: to train on, and held out."""
    sides: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
    for row in read_jsonl(path):
        for family in families:
            if row["task"] in FAMILIES[family]:
                told = row["completion"].strip().lower().encode()
                held = hashlib.sha256(told).digest()[0] % 4 == 0
                sides[held].setdefault(family, []).append((row["prompt"], row["completion"]))
    return (
        {family: sides[0][family][:TRAINED] for family in families},
        {family: sides[1][family][:HELD] for family in families},
    )


class Questions:
    """Rows that are held out, as the layers that all variants share leave them."""

    def __init__(self, model: Any, first: int, held: dict[str, list[Row]]) -> None:
        self._first, self._held = first, held
        self._batches = {
            family: list(self._below(model, rows)) for family, rows in tqdm(held.items(), "below")
        }

    @torch.no_grad()
    def _below(self, model: Any, rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], Tensor]]:
        ordered = sorted(rows, key=lambda row: len(row.ids))
        for i in range(0, len(ordered), 16):
            batch = ordered[i : i + 16]
            hidden = model.model.embed_tokens(pad_sequence([row.ids for row in batch], True))
            for layer in model.model.layers[: self._first]:
                hidden = layer(hidden, position_embeddings=_rotary(model, hidden))
            yield batch, hidden

    @torch.no_grad()
    def ask(self, folder: Path, families: Sequence[str]) -> dict[str, list[list[float]]]:
        """Of each row: is it right, the share of its tokens that are, and their loss."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        found: dict[str, list[list[float]]] = {}
        for family in families:
            found[family] = []
            for batch, hidden in self._batches[family]:
                for layer in model.model.layers[self._first :]:
                    hidden = layer(hidden, position_embeddings=_rotary(model, hidden))
                for row, states in zip(batch, hidden, strict=True):
                    told = row.ids[row.start :]
                    states = model.model.norm(states[row.start - 1 : len(row.ids) - 1])
                    logits = model.lm_head(states)
                    hits = logits.argmax(-1) == told
                    loss = cross_entropy(logits, told)
                    found[family].append(
                        [float(hits.all()), float(hits.float().mean()), float(loss)]
                    )
        return found


def _rotary(model: Any, hidden: Tensor) -> Any:
    return model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])


def windows(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Calibration:
    """Of a family's training rows, one after the other."""
    ids = torch.cat([encode(tokenizer, *pair).ids for pair in pairs])
    whole = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return Calibration(whole[:WINDOWS], "training rows")


def alone(script: str, *arguments: Path) -> dict[str, float]:
    """What a script takes in a process of its own, beyond the libraries."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK + script + TOLD, *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"memory": int(out[0]), "seconds": round(float(out[1]), 1)}


def loaded(folder: Path) -> dict[str, float]:
    """What loading takes."""
    return {"file": open_checkpoint(folder).nbytes, **alone(LOAD, folder)}


class Bench:
    """What was measured so far, by name, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, measure: Any) -> Any:
        if name not in self.known:
            print(name, flush=True)
            self.known[name] = measure()
            write_json(self.path, self.known)
        return self.known[name]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """A mean with the 95 % interval of its bootstrap over rows."""
    numbers = np.array(values)
    draws = np.random.default_rng(0).integers(len(numbers), size=(10_000, len(numbers)))
    low, high = np.percentile(numbers[draws].mean(1), [2.5, 97.5])
    return {"value": float(numbers.mean()), "interval": [float(low), float(high)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="of the mixture and what is asked")
    parser.add_argument("--families", type=int, default=len(FAMILIES), help="the first so many")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    work, recipe = arguments.work, Upcycling()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work / "measured.json")
    every = tuple(FAMILIES)[: arguments.families]
    trained, held = rows(arguments.instructions, every)
    mixture = work / "mixture"

    def train() -> float:
        started = time.perf_counter()
        upcycle(small_model(), mixture, trained, recipe)
        return round(time.perf_counter() - started, 1)

    bench.once("seconds of training", train)
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    library = Patterns(work / "patterns")

    def remember(family: str) -> float:
        started = time.perf_counter()
        library.add(family, mixture, windows(tokenizer, trained[family]), progress=False)
        return round(time.perf_counter() - started, 1)

    for family in every:
        bench.once(f"seconds of the pattern of {family}", lambda f=family: remember(f))

    encoded = {
        family: [row for row in (encode(tokenizer, *p) for p in pairs) if len(row.ids) <= 160]
        for family, pairs in held.items()
    }
    whole: Any = AutoModelForCausalLM.from_pretrained(
        mixture, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    first = whole.config.num_hidden_layers - recipe.layers

    def find() -> dict[str, dict[str, int]]:
        found = {family: dict.fromkeys(every, 0) for family in every}
        for family, asked in encoded.items():
            for row in tqdm(asked[:QUERIES], f"queries of {family}"):
                found[family][library.nearest(whole, row.ids[: row.start])[0].task] += 1
        return found

    retrieved = bench.once("retrieved", find)
    variants: dict[str, tuple[str, PreMoe, tuple[str, ...]]] = {}
    for family in every:
        variants[f"premoe {family}"] = (family, PreMoe(keep=4), every)
        variants[f"frequency {family}"] = (family, PreMoe(keep=4, score="frequency"), (family,))
        variants[f"2 experts, premoe {family}"] = (family, PreMoe(keep=2), every)
    for keep, size in ((4, ""), (2, "2 experts, ")):
        for seed in range(SEEDS):  # of any task: its scores are not looked at
            method = PreMoe(keep=keep, score="random", seed=seed)
            variants[f"{size}random {seed}"] = ("facts", method, every)
    waiting = {"all", "dense", *variants} - bench.known.keys()
    questions = Questions(whole, first, encoded) if waiting else None

    def ask(folder: Path, families: Sequence[str] = every) -> Any:
        assert questions is not None
        return questions.ask(folder, families)

    bench.once("dense", lambda: ask(small_model()))
    bench.once("all", lambda: ask(mixture))
    bench.once("loading all", lambda: loaded(mixture))
    kept: dict[str, Any] = {}
    for name, (task, method, families) in variants.items():
        plan = library.plan(task, mixture, method)
        kept[name] = [p.units["expert"].tolist() for p in plan.layers if p.units]
        folder = work / "half"

        def measure(plan: Any = plan, folder: Path = folder, families: Any = families) -> Any:
            write_pruned(mixture, folder, plan, overwrite=True, progress=False)
            return ask(folder, families)

        # The same experts need not be asked twice.
        twin = next((n for n in kept if n != name and kept[n] == kept[name]), None)
        if twin and set(families) <= set(variants[twin][2]):
            measure = lambda t=twin: bench.known[t]  # noqa: E731
        bench.once(name, measure)
        if name in ("premoe facts", "2 experts, premoe facts"):
            size = "half" if method.keep == 4 else "quarter"
            if f"loading {size}" not in bench.known:
                write_pruned(mixture, folder, plan, overwrite=True, progress=False)
            bench.once(f"loading {size}", lambda f=folder: loaded(f))
            plan.save(work / "plan.json")
            paths = (mixture, work / "plan.json", work / "written")
            bench.once(f"writing {size}", lambda p=paths: alone(WRITE, *p))

    name = "experts" if len(every) == len(FAMILIES) else f"experts_{len(every)}"
    write_json(HERE / f"{name}.json", figures(bench.known, recipe, trained, encoded, kept))
    print(json.dumps(retrieved))


def figures(
    known: dict[str, Any],
    recipe: Upcycling,
    trained: dict[str, list[Any]],
    held: dict[str, list[Row]],
    kept: dict[str, Any],
) -> dict[str, Any]:
    """What the docs quote."""

    def of(names: Sequence[str], family: str) -> np.ndarray[Any, Any]:
        """Means over names of each row's three numbers, [rows, 3]."""
        return np.mean([np.array(known[name][family]) for name in names], 0)

    randoms = [f"random {seed}" for seed in range(SEEDS)]
    table: dict[str, dict[str, Any]] = {}
    for family in held:
        others = [f"premoe {other}" for other in held if other != family]
        choices = {
            "dense": ["dense"],
            "all": ["all"],
            "premoe": [f"premoe {family}"],
            "frequency": [f"frequency {family}"],
            "random": randoms,
            "others": others,
            "2 experts, premoe": [f"2 experts, premoe {family}"],
            "2 experts, others": [f"2 experts, {name}" for name in others],
            "2 experts, random": [f"2 experts, random {seed}" for seed in range(SEEDS)],
        }
        table[family] = {
            choice: {
                "right": float(of(names, family)[:, 0].mean()),
                "tokens": float(of(names, family)[:, 1].mean()),
                "loss": float(of(names, family)[:, 2].mean()),
                "loss of each": [float(of([name], family)[:, 2].mean()) for name in names],
            }
            for choice, names in choices.items()
        }
        table[family]["loss of premoe less that of"] = {
            than: interval((of(choices[own], family) - of(choices[than], family))[:, 2])
            for own, others in AGAINST.items()
            for than in others
        }
    found = known["retrieved"]
    return {
        "provenance": provenance(),
        "recipe": asdict(recipe),
        "rows": {
            family: {"trained": len(trained[family]), "held": len(held[family])} for family in held
        },
        "calibration": {"windows": WINDOWS, "tokens": TOKENS},
        "seconds": {name: value for name, value in known.items() if name.startswith("seconds")},
        "figures": table,
        "retrieval": {
            "found": found,
            "right": sum(found[family][family] for family in held),
            "queries": sum(sum(row.values()) for row in found.values()),
        },
        "writing": {size: known[f"writing {size}"] for size in ("half", "quarter")},
        "loading": {size: known[f"loading {size}"] for size in ("all", "half", "quarter")},
        "kept": {name: layers for name, layers in kept.items() if "random" not in name},
    }


if __name__ == "__main__":
    main()
