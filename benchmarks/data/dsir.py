"""How fast DSIR weighs rows, beside the functions of its authors' package, and whether they agree.

    pip install --no-deps --target PEERS data-selection "nltk<3.10"
    PYTHONPATH=PEERS python benchmarks/data/dsir.py --instructions instructions_t0.jsonl.gz

Both count the n-grams of the same rows and weigh the rows by them, in one thread, in rounds that
take turns, by the processor's clock. The package is timed in its own inner functions, without its
reading of files: `get_ngram_counts` of every row, and `importance_estimator` of its counts. Then a
million short rows, pieces of the same texts, are scored as `select` would, by the wall clock.
nltk 3.10 splits words by another library's idea of letters; before, it is that of Python.
Writes results/dsir.json.
"""

import argparse
import gzip
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from data_selection import HashedNgramDSIR
from data_selection.hashed_ngram_dsir import get_ngram_counts, wpt

from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.dsir import BUCKETS, DSIR, counts
from data_prune.rows import Columns, Rows, read, rows_of
from prune_core.provenance import provenance
from prune_core.storage import write_json

ROUNDS = 5


def rows_from(texts: list[str]) -> Rows:
    return rows_of(read(texts), Columns(text="text"))


def pieces(texts: list[str], n: int, words: int = 20) -> list[str]:
    """n texts of 20 words, over and over; each ends with its number, so none is there twice."""
    split = [
        " ".join(found[start : start + words])
        for found in (text.split() for text in texts)
        for start in range(0, len(found), words)
    ]
    return [f"{split[i % len(split)]} {i}" for i in range(n)]


def theirs(pool: list[str], target: list[str]) -> np.ndarray:
    """Log weights, by the package's functions in the order its pipeline calls them."""
    dsir = HashedNgramDSIR.__new__(HashedNgramDSIR)  # its own constructor makes folders
    dsir.tokenizer = wpt.tokenize
    dsir.ngrams, dsir.num_buckets = 2, BUCKETS
    shares = []
    for texts in (target, pool):
        found = np.zeros(BUCKETS, dtype=int)
        for text in texts:
            found = get_ngram_counts(text, counts=found)
        shares.append(found / found.sum())
    dsir.log_diff = np.log(shares[0] + 1e-8) - np.log(shares[1] + 1e-8)
    return np.array([dsir.importance_estimator(dsir.featurizer(text)) for text in pool])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--instructions", required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--many", type=int, default=1_000_000)
    args = parser.parse_args()
    with gzip.open(args.instructions, "rt", encoding="utf-8") as file:
        texts = [f"{row['prompt']}\n{row['completion']}" for row in map(json.loads, file)]
    target, pool = rows_from(texts[:200]), rows_from(texts[200 : 200 + args.rows])
    given = Given(rows=pool, keep=1, target=target, engine=Local(1))
    cases = {
        "ours": lambda: DSIR(smoothing=0).score(given)["log_weight"],
        "data-selection": lambda: theirs(list(pool.texts), list(target.texts)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    weights = {}
    for _ in range(ROUNDS):
        for name, work in cases.items():
            spent, weights[name] = timed(work)
            seconds[name].append(spent)
    rate = {name: args.rows / float(np.median(spent)) for name, spent in seconds.items()}
    ratios = np.divide(seconds["data-selection"], seconds["ours"])
    gap = np.abs(weights["ours"] - weights["data-selection"]).max()

    short = rows_from(pieces(texts, args.many))
    start = time.perf_counter()
    DSIR().score(Given(rows=short, keep=1, target=target, engine=Local(1)))
    wall = time.perf_counter() - start
    found = {
        "rows": args.rows,
        "mean_ngrams": counts(pool.texts, Local(1)).sum() / args.rows,
        "rows_per_second": rate,
        "times_faster": {
            "median": float(np.median(ratios)),
            "from": float(ratios.min()),
            "to": float(ratios.max()),
        },
        "largest_difference_of_weights": float(gap),
        "largest_weight": float(np.abs(weights["ours"]).max()),
        "short": {
            "rows": args.many,
            "mean_words": float(np.mean([len(text.split()) for text in short.texts])),
            "seconds_wall": wall,
            "rows_per_second": args.many / wall,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        "provenance": provenance(),
    }
    write_json(Path(__file__).parent / "results" / "dsir.json", found)
    print(json.dumps({name: found[name] for name in found if name != "provenance"}, indent=2))


if __name__ == "__main__":
    main()
