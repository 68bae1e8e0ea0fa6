"""The perceptron theory of data pruning beside perceptrons that are trained, over a table.

    python benchmarks/data/theory.py

Needs the extra "report" for its picture. One CPU core, some 30 s. Writes results/theory.json
and results/theory.svg.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_prune.theory import crossover, predict, simulate
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
ALPHAS = (1, 2, 4, 8, 16)
SIDES = (
    ("hard", 1.0),
    *itertools.product(("hard", "easy", "random"), (0.5, 0.2)),
)
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)
ANGLES = (0, 10, 20)


def row(dimension: int, seeds: int, **what: Any) -> dict[str, Any]:
    """Theory, and the mean of some simulations with its standard error."""
    trained = [simulate(**what, dimension=dimension, seed=seed) for seed in range(seeds)]
    errors = np.array([student.error for student in trained])
    return {
        **what,
        "theory": predict(**what).error,
        "simulation": float(errors.mean()),
        "standard_error": float(errors.std(ddof=1) / seeds**0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    table = [
        {"alpha_total": alpha, "keep_ratio": share, "keep": keep, "probe_angle": 0}
        for alpha, (keep, share) in itertools.product(ALPHAS, SIDES)
    ]
    # Four rows per dimension stay, whatever the share.
    probes = [
        {"alpha_total": 4 / share, "keep_ratio": share, "keep": "hard", "probe_angle": angle}
        for angle, share in itertools.product(ANGLES, SHARES)
    ]
    sizes = arguments.dimension, arguments.seeds
    rows = {
        name: [row(*sizes, **what) for what in tqdm(whats, desc=name)]
        for name, whats in (("table", table), ("probes", probes))
    }
    off = {
        name: [abs(r["theory"] - r["simulation"]) for r in found] for name, found in rows.items()
    }
    result = {
        **rows,
        "largest_difference": {name: max(values) for name, values in off.items()},
        "mean_difference": {name: float(np.mean(values)) for name, values in off.items()},
        "crossover": {str(share): crossover(share) for share in (0.1, 0.2, 0.5, 0.8, 0.9)},
        "provenance": provenance(seed=0, **vars(arguments)),
    }
    write_json(HERE / "theory.json", result)
    draw(rows, HERE / "theory.svg")
    print(
        json.dumps({k: result[k] for k in ("largest_difference", "mean_difference", "crossover")})
    )


def draw(rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Left: error against rows, by what is kept. Right: an imperfect metric, hard rows kept."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    plt.rcParams["svg.hashsalt"] = "prunekit"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    styles = {"hard": "-", "easy": "--", "random": ":"}
    colours = {1.0: "black", 0.5: "tab:blue", 0.2: "tab:red"}
    alphas = np.geomspace(ALPHAS[0], ALPHAS[-1], 40)
    for keep, share in SIDES:
        students = [predict(alpha, share, keep) for alpha in alphas]
        label = "all rows" if share == 1 else f"{keep} {share:.0%}"
        how = {"color": colours[share], "linestyle": styles[keep], "label": label}
        left.loglog(alphas, [student.error for student in students], **how)
        left.loglog(
            *points(rows["table"], "alpha_total", keep=keep, keep_ratio=share),
            "o",
            ms=3.5,
            color=colours[share],
        )
    left.set(
        xlabel="rows per dimension, before pruning", ylabel="test error", title="perfect metric"
    )
    shares = np.geomspace(SHARES[-1], SHARES[0], 40)
    for angle, colour in zip(ANGLES, ("tab:green", "tab:orange", "tab:purple"), strict=True):
        errors = [predict(4 / share, share, probe_angle=angle).error for share in shares]
        right.loglog(shares, errors, color=colour, label=f"metric {angle}° off")
        right.loglog(
            *points(rows["probes"], "keep_ratio", probe_angle=angle), "o", ms=3.5, color=colour
        )
    right.set(
        xlabel="share kept, of ever more rows: 4 per dimension stay",
        ylabel="test error",
        title="imperfect metric, hard rows stay",
    )
    for axis in (left, right):
        axis.legend(fontsize=8)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line.set_major_formatter("{x:g}")
            line.set_minor_formatter("")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def points(rows: list[dict[str, Any]], x: str, **which: Any) -> tuple[list[float], list[float]]:
    """x and simulated error of the rows that are `which`."""
    chosen = [r for r in rows if all(r[name] == value for name, value in which.items())]
    return [r[x] for r in chosen], [r["simulation"] for r in chosen]


if __name__ == "__main__":
    main()
