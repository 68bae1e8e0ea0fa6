"""What pruning costs over ranking alone, what padding costs, and what an index saves; in one run.

    python benchmarks/context/cost.py

The bare ranker is the same encoder in the same batches with the relevance head alone: no sentences
and no keep head. Rounds alternate between the two, so that a noisy machine wrongs neither. Passages
are Python's own reference, cut to many lengths; nothing is downloaded. Writes results/cost.json.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.retrieve import Retriever
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune import ContextPruner
from rag_prune.context.engine import BATCH_LIMITS
from rag_prune.context.model import RELEVANCE, joint_ids
from rag_prune.context.windows import batches, encode_plain

HERE = Path(__file__).parent / "results"


def requests(n_questions: int) -> list[tuple[str, list[str]]]:
    """Retrieved passages, every second one cut short: mixed lengths that fit one window."""
    retriever = Retriever(demo_passages())
    out = []
    for q in demo_questions()[:n_questions]:
        texts = [p["text"][:800] for p in retriever.search(q["question"], 8)]
        out.append(
            (q["question"], [t[: 80 + 120 * i] if i % 2 else t for i, t in enumerate(texts)])
        )
    return out


def rank_only(pruner: ContextPruner, asked: list[tuple[str, list[str]]]) -> list[float]:
    """Relevance alone, on the same network in the same batches."""
    checkpoint = pruner.scorer.checkpoint
    tokenizer = checkpoint.tokenizer
    questions = encode_plain(tokenizer, [q for q, _ in asked])["input_ids"]
    passages = encode_plain(tokenizer, [t for _, ts in asked for t in ts])["input_ids"]
    owner = [i for i, (_, ts) in enumerate(asked) for _ in ts]
    rows = [joint_ids(tokenizer, questions[o], [], p) for o, p in zip(owner, passages, strict=True)]
    encoder = getattr(checkpoint.model.classifier, checkpoint.model.classifier.base_model_prefix)
    head = checkpoint.model.classifier.classifier

    def forward(ids, mask):
        first = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :1]
        return head(first)[..., RELEVANCE]

    relevance = np.empty(len(rows))
    for i, values in pruner.scorer.run(forward, rows):
        relevance[i] = values[0]
    return relevance.tolist()


def rows_of(pruner: ContextPruner, asked: list[tuple[str, list[str]]]) -> list[int]:
    """Lengths in tokens of the rows that the pruner runs through its network."""
    engine, lengths = pruner.scorer, []
    run = engine.run

    def noting(forward, rows):
        lengths.extend(map(len, rows))
        return run(forward, rows)

    engine.run = noting
    try:
        pruner.prune_many(asked)
    finally:
        del engine.run
    return lengths


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruner", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    asked = requests(12)
    cross = ContextPruner.from_pretrained(args.pruner, method="provence", device="cpu")
    seconds: dict[str, list[float]] = {
        "rank": [],
        "prune": [],
        "prune_late_first": [],
        "prune_late_again": [],
    }
    rank_only(cross, asked), cross.prune_many(asked)  # warm up
    for _ in range(args.rounds):
        seconds["rank"].append(timed(lambda: rank_only(cross, asked)))
        seconds["prune"].append(timed(lambda: cross.prune_many(asked)))
        late = ContextPruner.from_pretrained(args.pruner, method="late", device="cpu")
        seconds["prune_late_first"].append(timed(partial(late.prune_many, asked)))
        seconds["prune_late_again"].append(timed(partial(late.prune_many, asked)))
    results = cross.prune_many(asked)
    recut = timed(lambda: [r.recut(threshold=0.3) for r in results])
    lengths = rows_of(cross, asked)
    made = batches(lengths, *BATCH_LIMITS["cpu"])
    computed = sum(max(lengths[i] for i in b) * len(b) for b in made)
    n = sum(len(texts) for _, texts in asked)
    ratios = np.array(seconds["prune"]) / np.array(seconds["rank"])
    report = {
        "passages": n,
        "rows": len(lengths),
        "tokens": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "computed_over_real_tokens": round(computed / sum(lengths), 3),
        "prune_over_rank": {
            "median": round(float(np.median(ratios)), 3),
            "min": round(float(ratios.min()), 3),
            "max": round(float(ratios.max()), 3),
        },
        "passages_per_second": {k: round(n / float(np.median(v)), 1) for k, v in seconds.items()},
        "recut_milliseconds_per_100_passages": round(1e5 * recut / n, 2),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "cost.json", report)
    print({k: v for k, v in report.items() if k != "provenance"})


if __name__ == "__main__":
    main()
