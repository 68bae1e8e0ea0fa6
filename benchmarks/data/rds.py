"""What RDS+'s rounds cost with many rows, and whether the plain loop finds the same order.

    python benchmarks/data/rds.py

Random vectors. The plain loop is the authors' procedure, with numpy: all cosines at once, a sorted
list of rows for each target, and turns until all rows are taken. Writes results/rds.json.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from data_prune.engine import Local, shards
from data_prune.metric import Given
from data_prune.metrics.rds import RDS
from data_prune.rows import Rows
from data_prune.vectors import Vectors
from prune_core.provenance import provenance
from prune_core.storage import write_json


def given(n: int, targets: int, width: int) -> Given:
    """Rows without text, for a metric that looks only at vectors."""
    rng = np.random.default_rng(0)
    places = np.arange(n, dtype=np.int64)
    rows = Rows(np.arange(n).astype("S32"), places, [""] * n, [], [], None, [], {})
    array = rng.standard_normal((n, width), dtype=np.float32)
    target = rng.standard_normal((targets, width), dtype=np.float32)
    return Given(
        rows=rows,
        keep=n,
        engine=Local(1),
        vectors=Vectors(array, places),
        target_vectors=Vectors(target, np.arange(targets, dtype=np.int64)),
    )


def plain_order(given: Given) -> np.ndarray:
    vectors, targets = given.vectors, given.target_vectors
    # In ours' blocks: in others the last bits of a product may differ, and with them near ties.
    cosines = np.hstack(
        [
            np.vstack([vectors[rows] @ targets[block].T for rows in shards(len(vectors))])
            for block in shards(len(targets), 16)
        ]
    )
    lists = np.argsort(-cosines, axis=0, kind="stable")
    taken, order = np.zeros(len(vectors), dtype=bool), []
    for row in lists.ravel().tolist():  # round by round, in each of which every target has a turn
        if not taken[row]:
            taken[row] = True
            order.append(row)
    return np.array(order)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    small = given(20_000, 50, args.width)
    turns = RDS().score(small)["turn"]
    same = bool((np.argsort(turns) == plain_order(small)).all())

    many = given(args.rows, args.targets, args.width)
    before, start = peak_mb(), time.process_time()
    RDS().score(many)
    seconds = time.process_time() - start
    found = {
        "order_of_20000_rows_is_the_plain_loops": same,
        "rows": args.rows,
        "targets": args.targets,
        "width": args.width,
        "cpu_seconds": seconds,
        "cpu_seconds_a_target": seconds / args.targets,
        "memory_mb_beside_the_vectors": peak_mb() - before,
        "memory_mb_of_all_cosines": 4 * args.rows * args.targets / 2**20,
        "provenance": provenance(seed=0),
    }
    write_json(Path(__file__).parent / "results" / "rds.json", found)
    print(json.dumps({name: found[name] for name in found if name != "provenance"}, indent=2))


if __name__ == "__main__":
    main()
