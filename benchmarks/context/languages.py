"""What a pruner does in languages it may not have learned: XQuAD's, five passages a question.

    python benchmarks/context/languages.py --rows xquad_multilingual_test.jsonl.gz [--pruner FOLDER]

Rows are those of training with a `lang`; the distractors are random passages of the same language.
The languages are the same texts translated, so figures of two languages can be compared. Writes
results/languages.json.
"""

import argparse
from pathlib import Path

from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune import ContextPruner
from rag_prune.context.evaluate import build_tasks, compare

HERE = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument(
        "--pruner", default=None, help="checkpoint folder; the bundled one by default"
    )
    parser.add_argument("--tasks", type=int, default=100, help="at most this many a language")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    rows = list(read_jsonl(args.rows))
    pruners = {
        "both": ContextPruner.from_pretrained(args.pruner, method="both"),
        "bm25": ContextPruner.from_pretrained(method="bm25"),
    }
    report = {}
    for language in sorted({row["lang"] for row in rows}):
        of = [row for row in rows if row["lang"] == language]
        report[language] = compare(pruners, build_tasks(of, distractors="random")[: args.tasks])
        for method, figures in report[language]["methods"].items():
            shown = (f"{k} {v['value']:.3f}" for k, v in figures.items() if "value" in v)
            print(f"{language} {method:10}", "  ".join(shown), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "languages.json", {"languages": report, "provenance": provenance()})


if __name__ == "__main__":
    main()
