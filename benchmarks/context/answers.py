"""Do answers get better? A real 135M model on held-back questions, from five kinds of context.

    python benchmarks/context/answers.py --dev runs/context/dev.jsonl [--pruner FOLDER]

Five passages a question, one of which answers. `full`: as given; `reranked`: best passage first;
`pruned`: the default threshold; `random`: random sentences of the same size, question by question;
`none`: no context. Larger models gain less: they are less easily distracted.
"""

import argparse
from pathlib import Path

import numpy as np

from pipelines.language_model import LocalModel
from pipelines.rag import joined, messages
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune import ContextPruner
from rag_prune.context.evaluate import answer_quality, build_tasks, mean_interval

HERE = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--pruner", default=None)
    parser.add_argument("--questions", type=int, default=220)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    rows = [r for r in read_jsonl(args.dev) if r["source"] in ("qed", "nq")]
    tasks = build_tasks(rows, hard=False)[: args.questions]
    pruner, dice = (
        ContextPruner.from_pretrained(args.pruner),
        ContextPruner.from_pretrained(method="random"),
    )
    pruned = pruner.prune_many([(t.question, t.passages) for t in tasks])
    contexts = {
        "full": [joined(list(t.passages)) for t in tasks],
        "reranked": [
            joined([p.passage for p in sorted(r.passages, key=lambda p: p.rank)]) for r in pruned
        ],
        "pruned": [r.text for r in pruned],
        "random": [
            dice.prune(t.question, t.passages, keep_ratio=r.keep_ratio).text
            for t, r in zip(tasks, pruned, strict=True)
        ],
        "none": [""] * len(tasks),
    }
    model = LocalModel.from_pretrained(small_model())

    def generate(question: str, context: str) -> tuple[str, int, float]:
        done = model.complete(messages(question, context), 24)
        return done.text, done.prompt_tokens, done.seconds

    report = {}
    for name, texts in contexts.items():
        figures = answer_quality(texts, tasks, generate, progress=name)
        report[name] = {k: mean_interval(v) for k, v in figures.items()}
        held = [any(a in text for a in t.answers) for t, text in zip(tasks, texts, strict=True)]
        report[name]["answer_in_context"] = mean_interval(np.array(held, dtype=float))
        print(name, {k: v["value"] for k, v in report[name].items()}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / "answers.json",
        {"questions": len(tasks), "contexts": report, "provenance": provenance()},
    )


if __name__ == "__main__":
    main()
