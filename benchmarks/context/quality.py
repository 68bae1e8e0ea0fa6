"""Evidence kept against text dropped, for every method in one run, on held-back titles.

    python benchmarks/context/quality.py --dev runs/context/dev.jsonl [--pruner FOLDER]

QED's questions, with a human evidence sentence, come with four random distractors and with the four
nearest by BM25; other kinds of text with the distractors that make them hard. Writes
results/quality.json and the curves as results/quality.svg.
"""

import argparse
from pathlib import Path

from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune import ContextPruner
from rag_prune.context.evaluate import build_tasks, compare

HERE = Path(__file__).parent / "results"
FORMS = (
    ("qed", "random"),
    ("qed", "bm25"),
    ("encyclopaedic", "random"),
    ("encyclopaedic", "same_title"),
    ("several sentences", "random"),
    ("forum", "bm25"),
)
METHODS = ("both", "provence", "late", "embedding", "bm25", "lead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument(
        "--pruner", default=None, help="checkpoint folder; the bundled one by default"
    )
    parser.add_argument("--tasks", type=int, default=180, help="at most this many a group and form")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    rows = list(read_jsonl(args.dev))
    sources = {
        "qed": ("qed",),
        "encyclopaedic": ("squadshifts_wiki",),
        "several sentences": ("clapnq", "hotpotqa", "musique"),
        "forum": ("squadshifts_reddit",),
    }
    groups = {
        name: [r for r in rows if r["source"] in of and r.get("single", True)]
        for name, of in sources.items()
    }
    pruners = {
        name: ContextPruner.from_pretrained(
            None if name in ("embedding", "bm25", "lead") else args.pruner, method=name
        )
        for name in METHODS
    }
    report = {}
    for name, distractors in FORMS:
        tasks = build_tasks(groups[name], distractors=distractors)[: args.tasks]
        key = f"{name}, {distractors} distractors"
        report[key] = compare(pruners, tasks)
        print(key, len(tasks))
        for method, figures in report[key]["methods"].items():
            shown = (f"{k} {v['value']:.3f}" for k, v in figures.items() if "value" in v)
            print(f"  {method:10}", "  ".join(shown), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "quality.json", {"groups": report, "provenance": provenance()})
    draw({k: v for k, v in report.items() if k.startswith("qed")}, args.out / "quality.svg")


def draw(groups: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(10, 4), sharey=True)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        for name in METHODS:
            curve = group["methods"][name]["curve"]
            axis.plot(group["recalls"], curve, label=name, linewidth=2.4 if name == "both" else 1.2)
        axis.axhline(group["oracle"], color="black", linestyle=":", linewidth=1, label="oracle")
        axis.set(title=title, xlabel="evidence sentences kept", ylim=(0, 1))
    axes[0].set_ylabel("characters dropped")
    axes[0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
