"""Four findings of "Distilling the knowledge in data pruning", on digits, with and without noise.

    python benchmarks/data/digits_distill.py

Networks of one hidden layer learn scikit-learn's digits: 60 % of them to train on, of which a share
has a wrong label, the others, all with the right one, to test on. A teacher has seen all training
rows. Students of width 64 see the share f of them, chosen at random or by EL2N (the hardest stay),
and learn with every weight of `data_prune.distill.distillation_loss`. Figures are of eight seeds;
within a seed, students of all weights have the same start, rows and order. A second, lower learning
rate shows what depends on how much a network memorises.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from data_prune.distill import distillation_loss, distillation_weight
from prune_core.provenance import provenance
from prune_core.storage import write_json

OUT = Path(__file__).parent / "results" / "distill.json"
NOISES, RATES = (0.2, 0.0), (0.003, 0.001)
KEEP = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
STUDENT, TEACHERS = 64, (16, 64, 256)
SEEDS, TEMPERATURE, STEPS, BATCH = 8, 4.0, 800, 128
EL2N_NETWORKS, EL2N_STEPS = 10, 80  # of the paper on EL2N: ten networks, early in training

Network = list[Tensor]


class Digits:
    """The digits of every seed, and the teachers that saw them all. S seeds, n training rows.

    x, y: [S, n, 64], [S, n], labels with noise.   test: the same of the digits held back, without.
    teachers: of each width, [S, n, 10] logits on the training rows.
    """

    def __init__(self, noise: float, rate: float, teachers: Sequence[int] = TEACHERS) -> None:
        self.noise, self.rate = noise, rate
        drawn = [draw(noise, seed) for seed in range(SEEDS)]
        self.x, self.y, *test = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        self.test = test[0], test[1]
        self.teachers, self.teacher_accuracy = {}, {}
        for width in teachers:
            network = self.train(self.x, self.y, None, (0.0,), width=width, seed=width)
            self.teachers[width] = forward(network, self.x)[0]
            self.teacher_accuracy[width] = self.accuracy(network)[0]

    def train(
        self,
        x: Tensor,
        y: Tensor,
        teacher: Tensor | None,
        weights: Sequence[float],
        *,
        width: int = STUDENT,
        steps: int = STEPS,
        seed: int = 0,
    ) -> Network:
        """A network for each of `weights` and each of x's first dimension, all at once."""
        stack, rows, pixels = x.shape
        teacher = torch.zeros(stack, rows, 10) if teacher is None else teacher
        draws = torch.Generator().manual_seed(seed)
        start = [
            torch.randn(1, stack, pixels, width, generator=draws) * math.sqrt(2 / pixels),
            torch.zeros(1, stack, 1, width),
            torch.randn(1, stack, width, 10, generator=draws) * math.sqrt(1 / width),
            torch.zeros(1, stack, 1, 10),
        ]
        network = [part.repeat(len(weights), 1, 1, 1).requires_grad_() for part in start]
        optimizer = torch.optim.Adam(network, lr=self.rate)
        order = torch.arange(0)
        for _ in range(steps):
            if len(order) < min(BATCH, rows):
                order = torch.cat([order, torch.randperm(rows, generator=draws)])
            part, order = order[:BATCH], order[BATCH:]
            labels, soft = y[:, part], teacher[:, part]
            loss = torch.zeros(())
            for logits, weight in zip(forward(network, x[:, part]), weights, strict=True):
                mean = distillation_loss(
                    logits, soft, labels, weight=weight, temperature=TEMPERATURE
                )
                loss = loss + stack * mean  # each network has a mean of its own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [part.detach() for part in network]

    def accuracy(self, network: Network) -> Tensor:
        """On the digits held back, in percent: [weights, S]."""
        x, y = self.test
        return 100 * (forward(network, x).argmax(-1) == y).float().mean(-1)

    def el2n(self) -> Tensor:
        """‖softmax − onehot‖, the mean over networks early in training: [S, n]."""
        many = EL2N_NETWORKS
        x, y = self.x.repeat(many, 1, 1), self.y.repeat(many, 1)
        network = self.train(x, y, None, (0.0,), steps=EL2N_STEPS, seed=1)
        errors = forward(network, x)[0].softmax(-1) - one_hot(y, 10)
        return errors.norm(dim=-1).view(many, SEEDS, -1).mean(0)

    def students(
        self, order: Tensor, keep_ratio: float, weights: Sequence[float], teacher: int = STUDENT
    ) -> Tensor:
        """Accuracy of students of the first rows of an order [S, n]: [weights, S]."""
        kept = order[:, : round(keep_ratio * order.shape[1])]
        seeds = torch.arange(SEEDS)[:, None]
        parts = (each[seeds, kept] for each in (self.x, self.y, self.teachers[teacher]))
        return self.accuracy(self.train(*parts, weights))

    def orders(self) -> dict[str, Tensor]:
        """Which rows stay first, [S, n], by name of the choice."""
        hardest = self.el2n().argsort(dim=-1, descending=True, stable=True)
        return {"random": self.shuffled(), "el2n_hard": hardest}

    def shuffled(self) -> Tensor:
        """Each seed's rows in random order: [S, n]."""
        n = self.x.shape[1]
        drawn = [np.random.default_rng((seed, 1)).permutation(n) for seed in range(SEEDS)]
        return torch.from_numpy(np.stack(drawn))


def draw(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One seed's training rows, their labels, test rows, theirs."""
    found, rng = load_digits(), np.random.default_rng((seed, 0))
    x, y = found.data.astype(np.float32) / 16, found.target.copy()
    order = rng.permutation(len(x))
    test, train = np.split(order, [round(0.4 * len(x))])
    wrong = train[: round(noise * len(train))]
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    train = rng.permutation(train)
    return tuple(torch.from_numpy(a) for a in (x[train], y[train], x[test], y[test]))


def forward(network: Network, x: Tensor) -> Tensor:
    """Logits, [weights, stack, rows, 10]."""
    into, bias, out, last = network
    return torch.relu(x @ into + bias) @ out + last


def measure(noise: float, rate: float) -> list[dict[str, Any]]:
    """All rows of one table."""
    digits = Digits(noise, rate)
    about = {"noise": noise, "learning_rate": rate}
    rows = [
        about | {"row": "teacher", "teacher": width} | figures(accuracy)
        for width, accuracy in digits.teacher_accuracy.items()
    ]
    for choice, order in digits.orders().items():
        for keep in tqdm(KEEP, desc=f"noise {noise}, rate {rate}, {choice}", disable=None):
            auto = distillation_weight(keep)
            cases = [(STUDENT, sorted({*WEIGHTS, auto}))]
            if choice == "random":
                cases += [(width, [1.0]) for width in TEACHERS if width != STUDENT]
            for width, weights in cases:
                found = digits.students(order, keep, weights, width)
                for weight, accuracy in zip(weights, found, strict=True):
                    case = {"choice": choice, "keep_ratio": keep, "teacher": width}
                    more = {"weight": weight, "auto": weight == auto}
                    rows.append({**about, "row": "student", **case, **more, **figures(accuracy)})
    return rows


def figures(accuracy: Tensor) -> dict[str, Any]:
    """The mean over seeds, its standard error, and each seed's."""
    error = float(accuracy.std()) / math.sqrt(len(accuracy))
    return {
        "accuracy": round(float(accuracy.mean()), 2),
        "standard_error": round(error, 2),
        "seeds": [round(float(value), 2) for value in accuracy],
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # the matrices are small
    rows = [row for rate in RATES for noise in NOISES for row in measure(noise, rate)]
    write_json(OUT, {"rows": rows, "provenance": provenance(seed=0)})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
