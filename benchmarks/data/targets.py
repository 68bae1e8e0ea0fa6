"""Which metric finds the rows of a target's kind in a mixture, from few rows of the target?

    python benchmarks/data/targets.py --instructions instructions_t0.jsonl.gz \
        --maths gsm8k_train.jsonl.gz --model DIR --work FOLDER

2,000 rows of some thirty other tasks and 500 of grade-school mathematics; the target is other rows
of the mathematics: 10, 50 or 200. `precision` is the share of mathematics among the 500 rows (20 %
of all) that a metric keeps; by chance that is .2. DSIR is shown with and without smoothing, the
latter being its code's default. `--model` is a causal model, in bfloat16 as in RDS+'s code; texts
are cut at `--tokens` for it, to spare a small machine, and MiniLM cuts at its own 256. Vectors are
kept in `--work`: a run that is stopped goes on. Writes results/targets.json.
"""

import argparse
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prune.causal import Representations
from data_prune.choose import choose
from data_prune.engine import Local
from data_prune.metric import Given, Metric
from data_prune.metrics.dsir import DSIR
from data_prune.metrics.random import Random
from data_prune.metrics.rds import RDS
from data_prune.rows import Columns, Rows, read, rows_of
from data_prune.vectors import SentenceEncoder, Vectors, embed
from prune_core.provenance import provenance
from prune_core.storage import write_json

OTHERS, MATHS, TARGETS = 2000, 500, (10, 50, 200)
KEEP, SEEDS = 500, range(5)


def read_rows(path: str, prompt: str, response: str, kind: str) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"prompt": r[prompt], "completion": r[response], "kind": kind} for r in rows]


def mixture(instructions: str, maths: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The pool and the longest target; of the latter any beginning is a target, too."""
    rng = np.random.default_rng(0)
    others = read_rows(instructions, "prompt", "completion", "other")
    wanted = read_rows(maths, "question", "answer", "maths")
    drawn = rng.permutation(len(wanted))[: MATHS + max(TARGETS)].tolist()
    picked = rng.choice(len(others), OTHERS, replace=False).tolist()
    pool = [others[i] for i in picked] + [wanted[i] for i in drawn[:MATHS]]
    return pool, [wanted[i] for i in drawn[MATHS:]]


def rows_from(rows: list[dict[str, str]]) -> Rows:
    return rows_of(read(rows), Columns(prompt="prompt", response="completion"))


def precision(metric: Metric, given: Given, maths: np.ndarray) -> float:
    ranking = metric.rank(metric.score(given), given.keep)
    kept = choose(ranking, given.keep, given.draws("ties"))
    assert kept.sum() == given.keep
    return float(maths[kept].mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--instructions", required=True)
    parser.add_argument("--maths", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    pool, targets = mixture(args.instructions, args.maths)
    rows = rows_from(pool)
    maths = np.array([pool[i]["kind"] == "maths" for i in rows.positions])
    engine = Local(2)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoders: dict[str, Any] = {
        "MiniLM": SentenceEncoder(),
        Path(args.model).name: Representations(model, tokenizer, max_tokens=args.tokens),
    }

    def vectors(encoder: Any, of: Rows) -> Vectors:
        found = embed(of.texts, encoder, engine, args.work)
        return Vectors(found, np.arange(len(of)))

    pooled = {name: vectors(encoder, rows) for name, encoder in encoders.items()}
    found: dict[str, Any] = {}
    for size in TARGETS:
        target = rows_from(targets[:size])
        given = Given(rows=rows, keep=KEEP, engine=engine, target=target)
        seeded = [dataclasses.replace(given, seed=seed) for seed in SEEDS]
        by_method = {
            name: [precision(metric, each, maths) for each in seeded]
            for name, metric in {
                "random": Random(),
                "dsir, smoothing 0": DSIR(smoothing=0),
                "dsir": DSIR(),
            }.items()
        }
        for name, encoder in encoders.items():
            near = dataclasses.replace(
                given, vectors=pooled[name], target_vectors=vectors(encoder, target)
            )
            by_method[f"rds, {name}"] = [precision(RDS(), near, maths)]
        found[str(size)] = {
            name: {"mean": float(np.mean(p)), "from": min(p), "to": max(p)}
            for name, p in by_method.items()
        }
        print(size, {name: round(each["mean"], 3) for name, each in found[str(size)].items()})
    about = {
        "rows": len(rows),
        "maths": int(maths.sum()),
        "keep": KEEP,
        "seeds": len(SEEDS),
        "tokens": args.tokens,
        "precision": found,
        "provenance": provenance(seed=0),
    }
    write_json(Path(__file__).parent / "results" / "targets.json", about)


if __name__ == "__main__":
    main()
