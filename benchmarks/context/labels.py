"""How good is a labeller? Its sentences against those that people marked (QED), and what is kept.

    python benchmarks/context/labels.py --rows runs/context/dev.jsonl --llm NAME \
        [--endpoint http://localhost:8000/v1] [--replies FOLDER]

Each question is put to its own passage, and to the next row's, which does not answer it. `first
look`: what the model cites, of all own passages; `verified`: of those whose label held. Beside
them, in the same run, the sentence that a rule or the bundled pruner would take.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from pipelines.ask import AskEndpoint, AskVllm
from pipelines.language_model import Endpoint
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune import ContextPruner
from rag_prune.context.label import Item, Label, label
from rag_prune.context.result import Passage
from rag_prune.context.sentences import touched

OUT = Path(__file__).parent / "results" / "labels.json"


def agreement(chosen: list[set[int]], marked: list[set[int]]) -> dict[str, float | None]:
    """Precision, recall and F1 of sentences over all passages, and the share that is all right."""
    right = sum(len(a & b) for a, b in zip(chosen, marked, strict=True))
    cited, human = sum(map(len, chosen)), sum(map(len, marked))
    same = sum(a == b for a, b in zip(chosen, marked, strict=True))

    def share(part: int, whole: int) -> float | None:
        return round(part / whole, 3) if whole else None

    return {
        "passages": len(chosen),
        "precision": share(right, cited),
        "recall": share(right, human),
        "f1": share(2 * right, cited + human),
        "exact": share(same, len(chosen)),
    }


def says_no_answer(one: Label) -> bool:
    """Whether the model's first reply was that the passage does not answer."""
    return one.answer is None and not one.cited and one.outcome not in ("refused", "malformed")


def best_sentences(items: list[Item], method: str) -> list[set[int]]:
    """The sentence that a method scores highest, for each passage."""
    pruner = ContextPruner.from_pretrained(method=method)
    requests = [(i.question, [{"text": i.passage.text, "title": i.passage.title}]) for i in items]
    out = []
    for result in pruner.prune_many(requests):
        sentences = result.passages[0].kept + result.passages[0].dropped
        scores = [s.score for s in sorted(sentences, key=lambda s: s.start)]
        out.append({int(np.argmax(scores))})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument(
        "--llm", required=True, help="folder, hub name, or the server's name for it"
    )
    parser.add_argument("--endpoint", help="an OpenAI-compatible server; else vLLM in process")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--replies", type=Path, default=Path("runs/labels"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    rows = [r for r in read_jsonl(args.rows) if r["source"] == "qed" and r["single"]]
    # Spread over the file, which is in the order of the data set.
    rows = [rows[i * len(rows) // args.questions] for i in range(args.questions)]
    passages = [Passage.read({"text": r["passage"], "title": r["title"]}, 0) for r in rows]
    own = [Item(r["question"], p) for r, p in zip(rows, passages, strict=True)]
    marked = [
        {i for i, is_evidence in enumerate(touched(p.spans, r["evidence"])) if is_evidence}
        for r, p in zip(rows, passages, strict=True)
    ]
    others = []
    for i, row in enumerate(rows):
        following = (passages[(i + step) % len(rows)] for step in range(1, len(rows)))
        foreign = (p for p in following if not any(a in p.text for a in row["answers"]))
        others.append(Item(row["question"], next(foreign)))

    if args.endpoint:
        ask = AskEndpoint(Endpoint(args.endpoint, args.llm, args.api_key, timeout=600))
    else:
        ask = AskVllm.from_pretrained(args.llm)
    labels = label([*own, *others], ask, args.replies)
    found, foreign = labels.labels[: len(own)], labels.labels[len(own) :]
    held = [i for i, one in enumerate(found) if one.outcome == "answered"]
    rng = np.random.default_rng(0)
    choices = {
        "first look": [set(one.cited) for one in found],
        "first sentence": [{0} for _ in own],
        "random sentence": [{int(rng.integers(len(p.spans)))} for p in passages],
        "every sentence": [set(range(len(p.spans))) for p in passages],
        "bm25": best_sentences(own, "bm25"),
        "bundled pruner": best_sentences(own, "both"),
    }
    figures = {name: agreement(chosen, marked) for name, chosen in choices.items()}
    figures["verified"] = agreement([set(found[i].cited) for i in held], [marked[i] for i in held])
    report = {
        "agreement_with_people": figures,
        "passed_verification": round(len(held) / len(own), 3),
        "own_passage_said_to_hold_no_answer": round(
            np.mean([says_no_answer(one) for one in found]), 3
        ),
        "foreign_passage_said_to_hold_no_answer": round(
            np.mean([says_no_answer(one) for one in foreign]), 3
        ),
        "foreign_passage_labelled_as_answering": round(
            np.mean([one.outcome == "answered" for one in foreign]), 3
        ),
        "labelling": labels.report(),
    }
    for name, figure in figures.items():
        print(f"{name:16}", figure)
    print(labels.summary())
    write_json(args.out, report | {"provenance": provenance(seed=0)})


if __name__ == "__main__":
    main()
