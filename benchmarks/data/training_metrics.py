"""What is a row worth that was hard to learn? Metrics of a training log on handwritten digits.

    python benchmarks/data/training_metrics.py

Of scikit-learn's digits 1,200 rows train a small network, five times, while a log is kept; the
other 597 test. Each metric keeps a part of the rows, a new network learns from those, and its
accuracy on the test rows is the figure; `random` and all rows are beside it. Once with the labels
as they are and once with a fifth of them wrong; `auc` is how well a metric finds the wrong ones
(the area under the ROC curve of its difficulty). Every figure is the mean over seeds, with its
standard error. Writes results/training_metrics.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import trange

from data_prune import select
from data_prune.metric import Difficulty, Metric
from data_prune.metrics.aum import AUM
from data_prune.metrics.ccs import CCS
from data_prune.metrics.el2n import EL2N
from data_prune.metrics.entropy import Entropy
from data_prune.metrics.forgetting import Forgetting
from data_prune.metrics.grand import GraNd, gradient_norms
from data_prune.metrics.random import Random
from data_prune.selection import Selection
from data_prune.training_log import TrainingLog, runs
from prune_core.provenance import provenance
from prune_core.storage import write_json

DIFFICULTIES: list[type[Difficulty]] = [EL2N, GraNd, Forgetting, AUM, Entropy]
SHARES = (0.1, 0.2, 0.4, 0.6)
EPOCHS, EARLY, RUNS, STEPS = 30, 10, 5, 300


class Digits:
    """A split, the log of training on it, and the accuracy that some of its rows lead to."""

    def __init__(self, seed: int, noise: float) -> None:
        rng = np.random.default_rng(seed)
        inputs, labels = load_digits(return_X_y=True)
        order = rng.permutation(len(inputs))
        inputs, labels = (inputs[order] / 16).astype(np.float32), labels[order].astype(np.int64)
        self.test = torch.tensor(inputs[1200:]), torch.tensor(labels[1200:])
        self.inputs, labels = torch.tensor(inputs[:1200]), labels[:1200]
        self.wrong = np.zeros(1200, dtype=bool)
        self.wrong[rng.permutation(1200)[: round(noise * 1200)]] = True
        labels = np.where(self.wrong, (labels + rng.integers(1, 10, 1200)) % 10, labels)
        self.labels, self.seed = torch.tensor(labels), seed
        self.log = runs([self.logged(1000 * seed + run) for run in range(RUNS)])

    def network(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def logged(self, seed: int) -> TrainingLog:
        log = TrainingLog(len(self.labels))
        net, optimiser = self.network(seed)
        for epoch in range(EPOCHS):
            for rows in torch.randperm(len(self.labels)).split(64):
                logits = net(self.inputs[rows])
                log.record(rows, logits, self.labels[rows])
                optimiser.zero_grad()
                cross_entropy(logits, self.labels[rows]).backward()
                optimiser.step()
            if epoch + 1 == EARLY:  # EL2N and GraNd are of fixed weights
                norms = gradient_norms(
                    net.eval(), lambda net, x, y: cross_entropy(net(x), y), self.inputs, self.labels
                )
                every = torch.arange(len(self.labels))
                log.record(every, net(self.inputs), self.labels, norms)
                net.train()
            log.end_epoch()
        return log

    def selected(self, metric: Metric, share: float) -> Selection:
        names = [f"digit {i}" for i in range(len(self.labels))]
        return select(names, metric=metric, budget=share, seed=self.seed, log=self.log, cache=False)

    def auc(self, metric: Difficulty) -> float:
        scores = self.selected(metric, 1.0).scores
        return float(roc_auc_score(self.wrong, scores if metric.keep == "hard" else -scores))

    def accuracy(self, rows: np.ndarray) -> float:
        net, optimiser = self.network(self.seed)
        kept, step = torch.tensor(rows), 0
        while step < STEPS:
            for batch in kept[torch.randperm(len(kept))].split(64):
                optimiser.zero_grad()
                cross_entropy(net(self.inputs[batch]), self.labels[batch]).backward()
                optimiser.step()
                step += 1
        inputs, labels = self.test
        with torch.no_grad():
            return float((net(inputs).argmax(1) == labels).float().mean())


def metrics() -> dict[str, Metric]:
    early: dict[type[Difficulty], dict[str, Any]] = {
        EL2N: {"epoch": EARLY},
        GraNd: {"epoch": EARLY},
    }
    found: dict[str, Metric] = {"random": Random()}
    for kind in DIFFICULTIES:
        for keep in ("hard", "easy"):
            found[f"{kind.name}, {keep}"] = kind(keep=keep, **early.get(kind, {}))
    found["ccs of aum"] = CCS()
    found["ccs of aum, cutoff 0.2"] = CCS(cutoff=0.2)
    found["ccs of el2n"] = CCS(base=EL2N(epoch=EARLY))
    return found


def mean(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "error": round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    for noise in (0.0, 0.2):
        accuracy: dict[str, list[float]] = defaultdict(list)
        auc: dict[str, list[float]] = defaultdict(list)
        for seed in trange(args.seeds, desc=f"{noise:.0%} wrong"):
            digits = Digits(seed, noise)
            accuracy["all rows"].append(digits.accuracy(np.arange(len(digits.labels))))
            for name, metric in metrics().items():
                for share in SHARES:
                    accuracy[f"{name} at {share}"].append(
                        digits.accuracy(digits.selected(metric, share).indices)
                    )
                if noise and isinstance(metric, Difficulty) and metric.keep == "hard":
                    auc[metric.name].append(digits.auc(metric))
        report[f"{noise:.0%} of the labels wrong"] = {
            "accuracy": {
                "all rows": mean(accuracy["all rows"]),
                **{
                    name: {str(share): mean(accuracy[f"{name} at {share}"]) for share in SHARES}
                    for name in metrics()
                },
            },
            "auc": {name: mean(values) for name, values in auc.items()},
        }
    report["provenance"] = provenance(
        0, seeds=args.seeds, epochs=EPOCHS, early=EARLY, runs=RUNS, steps=STEPS
    )
    write_json(Path(__file__).parent / "results" / "training_metrics.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "provenance"}, indent=1))


if __name__ == "__main__":
    main()
