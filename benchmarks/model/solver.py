"""Does a solver find better flips in iCBS's blocks than its own descent does?

    pip install dwave-samplers
    python benchmarks/model/solver.py

The blocks are those that iCBS meets on the way from Wanda's masks of the vision transformer of
flips.py, --blocks of them at even distances. Samplers of binary quadratic models know no
constraint, so the counts of the matrices go in as penalties, of four weights; the best answer that
keeps the counts stands. `gain` is by how much a set of flips lowers the block's objective.
"""

import argparse
import json
import runpy
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from dimod import BinaryQuadraticModel
from dwave.samplers import SimulatedAnnealingSampler, TabuSampler
from tqdm.auto import tqdm

from model_prune.methods import icbs
from model_prune.methods.icbs import Block, Flips
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent
SHARES = (0.6, 0.8)
PENALTIES = (1.0, 0.1, 0.02, 0.005)  # in units of the largest entry of the objective
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "simulated annealing": (SimulatedAnnealingSampler, {"num_reads": 20, "num_sweeps": 1000}),
    "tabu search": (TabuSampler, {"num_reads": 5, "timeout": 1000}),  # milliseconds a read
}


def met() -> list[Block]:
    """The blocks of two descents."""
    flips = runpy.run_path(str(HERE / "flips.py"))
    digits, blocks = flips["Digits"](0), []

    class Kept(Block):
        def best(self, restarts: int, random: np.random.Generator) -> Flips:
            blocks.append(self)
            return super().best(restarts, random)

    with mock.patch.object(icbs, "Block", Kept):
        for share in SHARES:
            flips["HOW"].improve(
                digits.model,
                digits.masks("wanda", share),
                digits.batches,
                flips["losses"],
                progress=False,
            )
    return blocks


def sampled(block: Block, sampler: Any, settings: dict[str, Any]) -> Flips:
    """The best flips that a sampler finds."""
    found = [np.zeros(len(block.kept), dtype=bool)]
    couplings, sign = block.products() / 2, np.where(block.kept, 1.0, -1.0)
    same = np.outer(sign, sign) * (block.matrix[:, None] == block.matrix)
    above = np.triu_indices(len(sign), 1)
    for penalty in PENALTIES:
        largest = max(abs(block.alone).max(), abs(couplings).max())
        whole = couplings + penalty * largest * same
        model = BinaryQuadraticModel.from_numpy_vectors(
            block.alone + whole.diagonal(), (*above, 2 * whole[above]), 0.0, "BINARY"
        )
        for flips in sampler().sample(model, seed=0, **settings).record.sample.astype(bool):
            if not (same @ np.where(flips, 1, 0))[flips].any():
                found.append(flips)
    return min(found, key=block.change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10)
    arguments = parser.parse_args()
    blocks = met()
    rows = []
    for at in tqdm(np.linspace(0, len(blocks) - 1, arguments.blocks).astype(int)):
        block, row = blocks[at], {}
        finders: dict[str, Any] = {
            f"descent, {n} restarts": lambda b, n=n: b.best(n, np.random.default_rng(0))
            for n in (0, 10)
        }
        finders |= {name: lambda b, s=s: sampled(b, *s) for name, s in SAMPLERS.items()}
        for name, find in finders.items():
            started = time.perf_counter()
            flips = find(block)
            seconds = time.perf_counter() - started
            row[name] = {"gain": -block.change(flips), "seconds": seconds}
        rows.append({"block": int(at), "weights": len(block.kept), **row})
    write_json(
        HERE / "results" / "solver.json",
        {"rows": rows, "blocks": len(blocks), "provenance": provenance(seed=0)},
    )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
