"""Facility location: ours beside apricot's lazy greedy, on the same vectors, in one run.

    pip install apricot-select
    python benchmarks/data/facility.py [--rows 5000 10000] [--budget 500]

Vectors are drawn around 300 centres, at cosines of some 0.5 to the rows of the same centre.
`objective` is the sum over all rows of the cosine, at least 0, to the most similar row chosen, on
all pairs, as a share of apricot's; a random choice stands beside. `seconds` go from vectors to the
rows chosen: apricot's hold the matrix of all cosines (numpy, float64, as it asks for), ours the
neighbours. Each has run once before on a few rows, so that imports and compiling do not count.

`neighbours`: the share of the true nearest that are found among --many rows, too many to compare
all, of a sample of 500 rows.
"""

import argparse
import importlib.metadata
import time
from pathlib import Path

import numpy as np

from data_prune import select
from data_prune.engine import Local
from data_prune.metrics.facility_location import FacilityLocation
from data_prune.neighbours import nearest
from data_prune.vectors import Vectors
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
WIDTH, CENTRES = 256, 300


def unit(array: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def mixture(n: int, seed: int) -> np.ndarray:
    """(n, width) unit vectors."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(CENTRES, WIDTH)))
    rows = unit(rng.normal(size=(n, WIDTH))) + centres[rng.integers(CENTRES, size=n)]
    return unit(rows).astype(np.float32)


def ours(vectors: np.ndarray, budget: int) -> np.ndarray:
    """Rows chosen."""
    texts = [f"row {i}" for i in range(len(vectors))]
    metric = FacilityLocation()
    return select(texts, metric=metric, budget=budget, embeddings=vectors).indices


def apricot(vectors: np.ndarray, budget: int) -> np.ndarray:
    """Rows chosen."""
    from apricot import FacilityLocationSelection

    cosines = np.maximum(vectors @ vectors.T, 0).astype(np.float64)
    return FacilityLocationSelection(budget, metric="precomputed").fit(cosines).ranking


def lot(vectors: np.ndarray, budget: int) -> np.ndarray:
    """Rows chosen."""
    return np.random.default_rng(0).permutation(len(vectors))[:budget]


def recall(n: int, k: int, seed: int) -> dict[str, float]:
    """The share of each row's k nearest that is found, and the seconds for all rows."""
    array = mixture(n, seed)
    draws = np.random.default_rng(seed).random(n)
    started = time.perf_counter()
    found = nearest(Vectors(array, np.arange(n)), k, draws, Local())
    seconds = time.perf_counter() - started
    some = np.arange(0, n, n // 500)
    cosines = array[some] @ array.T
    cosines[np.arange(len(some)), some] = -2
    true = np.argpartition(cosines, -k, axis=1)[:, -k:]
    shares = [np.isin(a, b).mean() for a, b in zip(true, found.rows[some], strict=True)]
    return {
        "rows": n,
        "k": k,
        "recall": round(float(np.mean(shares)), 4),
        "seconds": round(seconds, 2),
    }


def objective(vectors: np.ndarray, chosen: np.ndarray) -> float:
    """Σ_i max(0, max_j cos(i, j)) over the rows j chosen."""
    parts = np.array_split(vectors, 1 + len(vectors) // 1000)
    best = [np.maximum(part @ vectors[chosen].T, 0).max(axis=1) for part in parts]
    return float(np.concatenate(best).sum(dtype=np.float64))


def main() -> None:
    """Measure on all sizes, and write facility.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 10_000])
    parser.add_argument("--budget", type=int, default=500)
    parser.add_argument("--many", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "facility.json")
    arguments = parser.parse_args()
    methods = {"apricot": apricot, "facility_location": ours, "random": lot}
    for how in methods.values():
        how(mixture(300, arguments.seed), 10)
    results = []
    for n in arguments.rows:
        vectors = mixture(n, arguments.seed)
        reached = {}
        for name, how in methods.items():
            started = time.perf_counter()
            chosen = how(vectors, arguments.budget)
            seconds = time.perf_counter() - started
            reached[name] = objective(vectors, chosen)
            row = {
                "rows": n,
                "budget": arguments.budget,
                "method": name,
                "seconds": round(seconds, 2),
                "objective": round(reached[name] / reached["apricot"], 5),
            }
            results.append(row)
            print(row, flush=True)
    neighbours = recall(arguments.many, FacilityLocation().neighbours, arguments.seed)
    print(neighbours)
    peers = {name: importlib.metadata.version(name) for name in ("apricot-select", "numba")}
    write_json(
        arguments.out,
        {
            "width": WIDTH,
            "results": results,
            "neighbours": neighbours,
            "provenance": provenance(arguments.seed, peers=peers),
        },
    )


if __name__ == "__main__":
    main()
