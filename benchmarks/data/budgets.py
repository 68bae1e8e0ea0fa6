"""What a budget costs once the scores are there: 100,000 rows cut again, and chosen.

    python benchmarks/data/budgets.py [--rows 100000]

`reselect` at several budgets, plain, by groups with floors, and by PASER's clusters, beside
`select` on the same rows with embeddings given as an array, all in one run. Written to
results/budgets.json: seconds, the median and the extremes of seven turns.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np

from data_prune import Budget, select
from data_prune.metrics.paser import PASER
from prune_core.provenance import provenance
from prune_core.storage import write_json

TURNS = 7


def seconds(work, turns=TURNS):
    taken = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    n = parser.parse_args().rows
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"question {i}", "response": f"answer {i}", "kind": f"kind {i % 20}"}
        for i in range(n)
    ]
    vectors = rng.normal(size=(n, 64)).astype(np.float32)
    damage = rng.random(n)
    plain = {"embeddings": vectors, "cache": False}
    grouped = Budget(share=0.2, group_by="kind", min_per_group=50)
    paser = PASER(conflict="none")
    warnings.simplefilter("ignore")
    chosen = {
        "prototypes": select(rows, budget=0.2, **plain),
        "prototypes, by groups": select(rows, budget=grouped, **plain),
        "paser": select(rows, metric=paser, budget=0.2, degradation=damage, **plain),
    }
    other = dict.fromkeys(chosen, 0.1)
    other["prototypes, by groups"] = Budget(share=0.1, group_by="kind", min_per_group=50)
    found = {
        f"reselect, {name}": seconds(lambda s=s, name=name: s.reselect(other[name]).indices)
        for name, s in chosen.items()
    }
    found["select, prototypes"] = seconds(lambda: select(rows, budget=0.2, **plain).indices, 3)
    found["select, random"] = seconds(
        lambda: select(rows, metric="random", budget=0.2, cache=False).indices, 3
    )
    write_json(
        Path(__file__).parent / "results" / "budgets.json",
        {"rows": n, "seconds": found, "provenance": provenance(0)},
    )
    for name, taken in found.items():
        print(f"{name:32s} {taken['median']:.3f} ({taken['min']:.3f}–{taken['max']:.3f})")


if __name__ == "__main__":
    main()
