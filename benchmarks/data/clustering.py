"""Landmark clustering beside scikit-learn, k-means and PASER's dense scheme: time, memory, labels.

    python benchmarks/data/clustering.py --instructions instructions_t0.jsonl.gz --work FOLDER
    python benchmarks/data/clustering.py … --long      # also 300,000 and a million rows

Made-up rows are 20 closed curves, each a short random Fourier series in the same 16 of 384
dimensions, with noise in all of them; three draws at 10,000 rows, one otherwise. Real rows are
4,000 prompts as all-MiniLM-L6-v2 embeds them, with the data set that a prompt was made from, and
its task, as the truth. Seconds are by the wall clock, with all cores for every method. Memory is
the peak of a process (VmHWM) that clusters rows of a memory map, whose pages it counts too.
A part that is done is kept in --work, and a run that is stopped goes on. Writes
results/clustering.json.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from data_prune.clusters import kmeans
from data_prune.engine import Local, shards
from data_prune.graph import choose_clusters, dense, landmark
from data_prune.vectors import SentenceEncoder, Vectors, embed
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent
ENGINE = Local()
K, WIDTH, SUBSPACE, FREQUENCIES, NOISE = 20, 384, 16, 3, 0.06
ROWS = 10_000  # at which the methods are compared
DENSE = (2_000, 4_000)
GROWTH, LONG_GROWTH = (30_000, 100_000), 300_000
MEMORY, LONG_MEMORY = 100_000, 1_000_000
PROMPTS = 4_000
Labels = np.ndarray[Any, np.dtype[np.int64]]


def curves(path: Path, n: int, seed: int) -> Labels:
    """Write (n, WIDTH) float32 unit vectors to a .npy file; give the curve that each lies on."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((WIDTH, SUBSPACE)))[0].T
    frequencies = np.arange(1, FREQUENCIES + 1)
    centres = 0.6 * rng.standard_normal((K, SUBSPACE)) / SUBSPACE**0.5
    waves = rng.standard_normal((2, K, FREQUENCIES, SUBSPACE)) / SUBSPACE**0.5
    waves /= frequencies[:, None]
    truth = rng.integers(K, size=n)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (n, WIDTH))
    for rows in shards(n, 65_536):
        curve = truth[rows]
        angles = 2 * np.pi * rng.random((len(curve), 1)) * frequencies
        points = centres[curve]
        for wave, at in zip(waves, (np.cos(angles), np.sin(angles)), strict=True):
            points = points + np.einsum("nf,nfd->nd", at, wave[curve])
        block = points @ basis + NOISE * rng.standard_normal((len(curve), WIDTH))
        out[rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    out.flush()
    return truth


def mapped(path: Path) -> Vectors:
    array = np.load(path, mmap_mode="r")
    return Vectors(array, np.arange(len(array)))


def lots(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 1)).random(n)


def timed(work: Callable[[], Labels]) -> tuple[Labels, float]:
    started = time.perf_counter()
    labels = work()
    return labels, time.perf_counter() - started


def measured(work: Callable[[], Labels], truth: Labels) -> dict[str, float]:
    labels, seconds = timed(work)
    return {"seconds": seconds, "ari": float(adjusted_rand_score(truth, labels))}


def scikit_learn(rows: Vectors, k: int, seed: int) -> Labels:
    theirs = SpectralClustering(k, affinity="nearest_neighbors", random_state=seed)
    return theirs.fit_predict(rows[slice(0, len(rows))])


def compared(folder: Path) -> list[dict[str, Any]]:
    """The methods on the same rows, three times over."""
    found = []
    for seed in range(3):
        truth = curves(path := folder / "rows.npy", ROWS, seed)
        rows, lot = mapped(path), lots(ROWS, seed)
        methods: dict[str, Callable[[], Labels]] = {
            "landmark": lambda r=rows, lot=lot, s=seed: landmark(r, lot, ENGINE, K, s).labels,
            "scikit-learn": lambda r=rows, s=seed: scikit_learn(r, K, s),
            "k-means": lambda r=rows, lot=lot, s=seed: kmeans(r, K, lot, ENGINE, s).labels,
        }
        found.append({name: measured(work, truth) for name, work in methods.items()})
        choice = choose_clusters(rows, lot, ENGINE, seed)
        found[-1]["chosen"] = {"k": choice.k, "stability": choice.stability}
    return found


def densely(folder: Path, n: int) -> dict[str, float]:
    truth = curves(path := folder / "rows.npy", n, 0)
    return measured(lambda: dense(mapped(path), K).labels, truth)


def grown(folder: Path, n: int) -> dict[str, float]:
    truth = curves(path := folder / "rows.npy", n, 0)
    return measured(lambda: landmark(mapped(path), lots(n, 0), ENGINE, K).labels, truth)


def remembered(folder: Path, n: int) -> dict[str, float]:
    """Peak memory of a process that clusters n rows, and what they take themselves."""
    truth = curves(path := folder / "rows.npy", n, 0)
    np.save(folder / "truth.npy", truth)
    command = [sys.executable, __file__, "--child", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "embeddings": truth.size * WIDTH * 4}


def child(path: Path) -> None:
    n = len(rows := mapped(path))
    truth = np.load(path.with_name("truth.npy"))
    figures = measured(lambda: landmark(rows, lots(n, 0), ENGINE, K).labels, truth)
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    print(json.dumps({**figures, "peak": peak}))


def source_of(task: str) -> str:
    """The data set of a task: wiki_qa of wiki_qa_exercise, dream of dream_baseline."""
    return "_".join(task.split("_")[: 2 if task.startswith("wiki_") else 1])


class Prompts:
    """Real prompts, embedded, and what they were made from."""

    def __init__(self, instructions: Path, work: Path) -> None:
        with gzip.open(instructions, "rt", encoding="utf-8") as file:
            drawn = random.Random(0).sample([json.loads(line) for line in file], PROMPTS)
        texts = [row["prompt"] for row in drawn]
        self.rows = Vectors(
            embed(texts, SentenceEncoder(), ENGINE, work / "cache"), np.arange(PROMPTS)
        )
        self.tasks = np.array([row["task"] for row in drawn])
        self.sources = np.array([source_of(task) for task in self.tasks])
        self.k = len(set(self.sources))

    def figures(self, work: Callable[[int], Labels], seeds: int = 3) -> list[dict[str, float]]:
        found = []
        for seed in range(seeds):
            labels, seconds = timed(lambda s=seed: work(s))
            table = contingency_matrix(self.sources, labels)
            found.append(
                {
                    "seconds": seconds,
                    "nmi": float(normalized_mutual_info_score(self.sources, labels)),
                    "ari": float(adjusted_rand_score(self.sources, labels)),
                    "purity": float(table.max(axis=0).sum() / PROMPTS),
                    "task_nmi": float(normalized_mutual_info_score(self.tasks, labels)),
                    "clusters": len(set(labels.tolist())),
                }
            )
        return found

    def compared(self) -> dict[str, Any]:
        """All methods but the dense one."""
        rows, k, lot = self.rows, self.k, [lots(PROMPTS, seed) for seed in range(3)]

        def by_landmarks(neighbours: int) -> Callable[[int], Labels]:
            return lambda s: landmark(rows, lot[s], ENGINE, k, s, neighbours=neighbours).labels

        choices = [choose_clusters(rows, lot[seed], ENGINE, seed) for seed in range(3)]
        return {
            "k": k,
            "k-means": self.figures(lambda s: kmeans(rows, k, lot[s], ENGINE, s).labels),
            **{f"landmark, {s} neighbours": self.figures(by_landmarks(s)) for s in (5, 10, 20)},
            "scikit-learn": self.figures(lambda s: scikit_learn(rows, k, s)),
            "chosen": [{"k": choice.k, "stability": choice.stability} for choice in choices],
        }

    def densely(self) -> list[dict[str, float]]:
        return self.figures(lambda s: dense(self.rows, self.k, s).labels, 1)


def against_goals(parts: dict[str, Any]) -> dict[str, float]:
    """Ratios that the goals are set in; what was not measured is left out."""

    def mean(method: str, figure: str) -> float:
        return float(np.mean([draw[method][figure] for draw in parts["compared"]]))

    ours, goals = mean("landmark", "seconds"), {}
    goals["times faster than scikit-learn"] = mean("scikit-learn", "seconds") / ours
    goals["ari behind scikit-learn"] = mean("scikit-learn", "ari") - mean("landmark", "ari")
    first, last = (parts[f"dense {n}"]["seconds"] for n in DENSE)
    exponent = np.log(last / first) / np.log(DENSE[1] / DENSE[0])
    goals["exponent of dense"] = float(exponent)
    goals["times faster than dense"] = float(last * (ROWS / DENSE[1]) ** exponent / ours)
    sizes = [n for n in (*GROWTH, LONG_GROWTH) if f"growth {n}" in parts]
    seconds = [ours, *(parts[f"growth {n}"]["seconds"] for n in sizes)]
    goals["exponent of landmark"] = float(np.polyfit(np.log([ROWS, *sizes]), np.log(seconds), 1)[0])
    for n in (MEMORY, LONG_MEMORY):
        if memory := parts.get(f"memory {n}"):
            goals[f"memory by embeddings, {n:,} rows"] = memory["peak"] / memory["embeddings"]
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--work", type=Path, help="of what is done already")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    if not arguments.instructions or not arguments.work:
        parser.error("--instructions and --work are needed.")
    arguments.work.mkdir(parents=True, exist_ok=True)
    prompts = cache(lambda: Prompts(arguments.instructions, arguments.work))
    plan: dict[str, Callable[[Path], Any]] = {
        "compared": compared,
        **{f"dense {n}": lambda folder, n=n: densely(folder, n) for n in DENSE},
        **{f"growth {n}": lambda folder, n=n: grown(folder, n) for n in GROWTH},
        f"memory {MEMORY}": lambda folder: remembered(folder, MEMORY),
        "text": lambda _: prompts().compared(),
        "text, dense": lambda _: prompts().densely(),
    }
    if arguments.long:
        plan[f"growth {LONG_GROWTH}"] = lambda folder: grown(folder, LONG_GROWTH)
        plan[f"memory {LONG_MEMORY}"] = lambda folder: remembered(folder, LONG_MEMORY)
    parts = {}
    for name, part in plan.items():
        kept = arguments.work / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                write_json(kept, part(Path(folder)))
        parts[name] = json.loads(kept.read_text())
        print(name, json.dumps(parts[name]), flush=True)
    goals = against_goals(parts)
    print(json.dumps(goals, indent=1))
    write_json(
        HERE / "results" / "clustering.json",
        {"goals": goals, "parts": parts, "provenance": provenance(seed=0)},
    )


if __name__ == "__main__":
    main()
