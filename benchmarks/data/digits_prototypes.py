"""Easy or hard rows? Self-supervised prototypes on scikit-learn's digits, beside random rows.

    python benchmarks/data/digits_prototypes.py [--seeds 20]

Three fifths of the 1,797 digits are there to learn from, as unit vectors of their first 20
principal components. Of those a share is kept, by `select` with the metric "prototypes" or
"random"; a support vector machine learns from it and is asked about the other digits. Written to
results/prototypes.json: mean accuracy in per cent over seeds, with standard errors.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tqdm.auto import tqdm

from data_prune import select
from data_prune.metrics.prototypes import Prototypes
from data_prune.metrics.random import Random
from prune_core.provenance import provenance
from prune_core.storage import write_json

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
METRICS = {
    "random": Random(),
    "hard": Prototypes(keep="hard", balance=0),
    "hard, balanced": Prototypes(keep="hard"),
    "easy": Prototypes(keep="easy", balance=0),
    "easy, balanced": Prototypes(keep="easy"),
    "auto": Prototypes(keep="auto"),
}


def accuracies(seed, shares=SHARES):
    """Per cent right after learning from what each metric keeps: {(metric, share): accuracy}."""
    pixels, labels = load_digits(return_X_y=True)
    train, test, known, truth = train_test_split(
        pixels, labels, test_size=0.4, random_state=seed, stratify=labels
    )
    components = PCA(20, random_state=seed).fit(train)
    train, test = (unit(components.transform(part)) for part in (train, test))
    rows = [{"text": f"digit {i}", "label": int(label)} for i, label in enumerate(known)]

    def learned(kept):
        return 100 * SVC(C=10).fit(train[kept], known[kept]).score(test, truth)

    found = {("all", 1.0): learned(np.arange(len(train)))}
    for name, metric in METRICS.items():
        first = select(
            rows, metric=metric, budget=max(shares), embeddings=train, seed=seed, cache=False
        )
        for share in shares:
            found[name, share] = learned(first.reselect(share).indices)
    return found


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    runs = [accuracies(seed) for seed in tqdm(range(seeds), disable=None)]
    rows = [
        {
            "metric": name,
            "share": share,
            "accuracy": float(np.mean([run[name, share] for run in runs])),
            "error": float(np.std([run[name, share] for run in runs], ddof=1) / math.sqrt(seeds)),
        }
        for name, share in runs[0]
    ]
    write_json(
        Path(__file__).parent / "results" / "prototypes.json",
        {"seeds": seeds, "rows": rows, "provenance": provenance()},
    )
    for row in rows:
        print(
            f"{row['metric']:15s} {row['share']:4.2f} {row['accuracy']:5.1f} ± {row['error']:.1f}"
        )


if __name__ == "__main__":
    main()
