"""Near copies among embeddings: semdedup beside semhash, on the same vectors, in one run.

    pip install semhash
    python benchmarks/data/dedup.py [--rows 10000 100000]

One row in ten is a copy of another with noise, at a cosine of 0.92 to 1 to it, put anywhere among
the rows; the others are drawn around 300 centres, at cosines of some 0.5 to the rows of the same
centre, or ("no clusters") around none, where k-means has nothing to find and borders divide the
most pairs. Both drop what is above a cosine of 0.9.

`recall` is the share of the pairs of which a row is dropped; `others` are rows dropped beyond one a
pair; `seconds` go from texts and vectors to the rows kept, with an index or clusters made anew.
Each has run once before on a few rows, so that imports do not count.
"""

import argparse
import importlib.metadata
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from data_prune import select
from data_prune.metrics.semdedup import SemDeDup
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
WIDTH, CENTRES, THRESHOLD = 256, 300, 0.9


def unit(array: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def planted(n: int, clustered: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, width) vectors, and the (n / 10, 2) rows of each pair of an original and its copy."""
    rng = np.random.default_rng(seed)
    copies = n // 10
    rows = unit(rng.normal(size=(n - copies, WIDTH)))
    if clustered:
        centres = unit(rng.normal(size=(CENTRES, WIDTH)))
        rows = unit(rows + centres[rng.integers(CENTRES, size=len(rows))])
    copied = rng.permutation(len(rows))[:copies]
    cosine = rng.uniform(0.92, 1, size=(copies, 1))
    noise = unit(rng.normal(size=(copies, WIDTH)))
    noise = unit(noise - (noise * rows[copied]).sum(axis=1, keepdims=True) * rows[copied])
    vectors = np.concatenate([rows, cosine * rows[copied] + np.sqrt(1 - cosine**2) * noise])
    order = rng.permutation(n)
    place = np.argsort(order)
    pairs = np.stack([place[copied], place[len(rows) + np.arange(copies)]], axis=1)
    return vectors[order].astype(np.float32), pairs


def ours(texts: list[str], vectors: np.ndarray) -> np.ndarray:
    """Rows that stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fewer stay than 100 %
        metric = SemDeDup(threshold=THRESHOLD)
        return select(texts, metric=metric, budget="100%", embeddings=vectors).indices


def semhash(texts: list[str], vectors: np.ndarray) -> np.ndarray:
    """Rows that stay."""
    from semhash import SemHash

    index = SemHash.from_embeddings(vectors, texts, model=None)
    place = {text: i for i, text in enumerate(texts)}
    return np.array([place[text] for text in index.self_deduplicate(threshold=THRESHOLD).selected])


def measure(
    how: Callable[[list[str], np.ndarray], np.ndarray], vectors: np.ndarray, pairs: np.ndarray
) -> dict[str, Any]:
    """Time, and what was found."""
    texts = [f"row {i}" for i in range(len(vectors))]
    started = time.perf_counter()
    stay = how(texts, vectors)
    seconds = time.perf_counter() - started
    dropped = np.ones(len(vectors), dtype=bool)
    dropped[stay] = False
    found = dropped[pairs].any(axis=1)
    return {
        "seconds": round(seconds, 2),
        "recall": round(float(found.mean()), 5),
        "others": int(dropped.sum() - found.sum()),
    }


def main() -> None:
    """Measure both on all sizes, and write dedup.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "dedup.json")
    arguments = parser.parse_args()
    methods = {"semdedup": ours, "semhash": semhash}
    for how in methods.values():
        measure(how, *planted(1000, True, arguments.seed))
    results = []
    for n, clustered in product(arguments.rows, (True, False)):
        vectors, pairs = planted(n, clustered, arguments.seed)
        for name, how in methods.items():
            row = {
                "rows": n,
                "copies": len(pairs),
                "clustered": clustered,
                "method": name,
                **measure(how, vectors, pairs),
            }
            results.append(row)
            print(row, flush=True)
    peers = {name: importlib.metadata.version(name) for name in ("semhash", "vicinity", "usearch")}
    write_json(
        arguments.out,
        {
            "width": WIDTH,
            "threshold": THRESHOLD,
            "results": results,
            "provenance": provenance(arguments.seed, peers=peers),
        },
    )


if __name__ == "__main__":
    main()
