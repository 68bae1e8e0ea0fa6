"""SPA and OBSPA on networks of every kind, trained here on real data, at the same FLOPs.

The claims are directions, with margins of about half of what was measured; docs/any-network.md has
the figures. Networks, data and rows are those of benchmarks/model/anything.py.
"""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model" / "anything.py"
anything = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks of this size are slower on several, and by much on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subjects():
    known = {}

    def of(kind, seed):
        if (kind, seed) not in known:
            made = anything.KINDS[kind]
            if kind == "BERT":  # it is as good after five epochs as the table's after nine
                made = dataclasses.replace(made, epochs=5)
            known[kind, seed] = anything.Subject(made, seed)
        return known[kind, seed]

    return of


def means(found, what):
    """Over seeds; printed, with what each seed gave."""
    table = {name: np.array(values) for name, values in found.items()}
    for name, values in table.items():
        print(f"{what}, {name}: {values.mean():.3f} (seeds {SEEDS}: {values.round(3).tolist()})")
    return {name: float(values.mean()) for name, values in table.items()}


# Of FLOPs removed, and by how much OBSPA is better than magnitude; without data too.
CLAIMS = {
    "ResNet": (0.5, 0.25, 0.15),
    "MobileNet": (0.3, 0.15, 0.1),
    "ViT": (0.7, 0.07, 0.04),
    "BERT": (0.7, 0.03, None),
    "GRU cell": (0.7, 0.15, 0.15),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_obspa_is_better_than_magnitude_without_training(kind, subjects):
    share, margin, margin_without_data = CLAIMS[kind]
    rows = ("random", "magnitude", "obspa", "obspa, no data")
    found = {name: [] for name in rows}
    for seed in SEEDS:
        subject = subjects(kind, seed)
        for name in rows:
            row = subject.after(name, share)
            assert row["error"] <= 1e-5  # masked is cut
            assert row["flops"] <= 1 - share
            found[name].append(row["accuracy"])
    mean = means(found, f"{kind}, {share:.0%} of FLOPs removed")
    print(f"OBSPA - magnitude: {mean['obspa'] - mean['magnitude']:.3f}, asked {margin}")
    assert mean["obspa"] - mean["magnitude"] >= margin
    assert mean["obspa"] - mean["random"] >= margin
    if margin_without_data is not None:
        assert mean["obspa, no data"] - mean["magnitude"] >= margin_without_data


def test_norms_that_are_settled_help_all_and_obspa_stays_ahead(subjects):
    """What estimating the batch norms' statistics again does is no merit of a criterion."""
    found = {}
    for seed in SEEDS:
        for name in ("random", "magnitude", "obspa"):
            row = subjects("ResNet", seed).after(name, 0.5)
            found.setdefault(name, []).append(row["accuracy"])
            found.setdefault(f"{name}, settled", []).append(row["settled"])
    mean = means(found, "ResNet, 50% of FLOPs removed")
    for name in ("random", "magnitude"):
        assert mean[f"{name}, settled"] - mean[name] >= 0.15
    assert mean["obspa, settled"] - mean["magnitude, settled"] >= 0.05


def test_training_afterwards_brings_accuracy_back(subjects):
    found = {}
    for seed in SEEDS:
        subject = subjects("ResNet", seed)
        found.setdefault("dense", []).append(anything.accuracy(subject.trained, subject.data))
        for name in ("magnitude", "obspa"):
            found.setdefault(name, []).append(subject.tuned(name, 0.7)["accuracy"])
    mean = means(found, "ResNet, 70% of FLOPs removed, trained for a third of the epochs")
    assert min(mean["magnitude"], mean["obspa"]) >= mean["dense"] - 0.05


def test_a_network_cut_before_it_is_trained_learns(subjects):
    """The criteria do not differ from chance here by more than seeds do: see the docs."""
    found = {}
    for seed in SEEDS:
        subject = subjects("ResNet", seed)
        found.setdefault("dense", []).append(anything.accuracy(subject.trained, subject.data))
        for name in ("random", "snip", "grasp"):
            found.setdefault(name, []).append(subject.before(name, 0.7)["accuracy"])
    mean = means(found, "ResNet, 70% of FLOPs removed before training")
    assert min(mean[name] for name in ("random", "snip", "grasp")) >= mean["dense"] - 0.06
