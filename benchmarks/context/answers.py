"""Do answers get better? A real 135M model on held-back questions, from six kinds of context.

    python benchmarks/context/answers.py --dev runs/context/dev.jsonl [--pruner FOLDER]

Five passages a question, one of which answers. `full`: as given; `reranked`: best passage first;
`pruned`: the default threshold; `pruned at 0.5`: sentences more likely to help than not; `random`:
random sentences of the same size as `pruned`, question by question; `none`: no context. Each
question is answered from all of them in turn, so that seconds compare on a noisy machine.
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
from rag_prune.context.evaluate import answer_quality, build_tasks, mean_interval, ratio_interval

HERE = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--pruner", default=None)
    parser.add_argument("--questions", type=int, default=220)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    rows = [r for r in read_jsonl(args.dev) if r["source"] in ("qed", "nq")]
    tasks = build_tasks(rows, distractors="random")[: args.questions]
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
        "pruned at 0.5": [r.recut(threshold=0.5).text for r in pruned],
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

    figures = answer_quality(
        [texts[i] for i in range(len(tasks)) for texts in contexts.values()],
        [task for task in tasks for _ in contexts],
        generate,
        progress="answering",
    )
    own = {
        name: {figure: values[i :: len(contexts)] for figure, values in figures.items()}
        for i, name in enumerate(contexts)
    }
    report = {}
    for name, texts in contexts.items():
        held = [any(a in text for a in t.answers) for t, text in zip(tasks, texts, strict=True)]
        own[name]["answer_in_context"] = np.array(held, dtype=float)
        # What the prompt holds besides question and instruction is the context.
        own[name]["context_tokens"] = own[name]["prompt_tokens"] - own["none"]["prompt_tokens"]
        report[name] = {figure: mean_interval(values) for figure, values in own[name].items()}
    gain = {
        figure: ratio_interval(own["pruned"][figure], own["full"][figure])
        for figure in ("f1", "contains", "context_tokens", "seconds")
    }
    print(gain)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / "answers.json",
        {
            "questions": len(tasks),
            "contexts": report,
            "pruned_over_full": gain,
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
