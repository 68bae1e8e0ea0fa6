"""The pruner hosted by vLLM against the same pruner in process: decisions, logits, seconds.

    python -m rag_prune.context.export pruner-f32
    python -m vllm.entrypoints.openai.api_server --model pruner-f32 --served-model-name pruner \\
        --runner pooling --dtype float32
    python benchmarks/context/vllm_pooling.py [--url http://127.0.0.1:8000]

The demo's questions with ten retrieved passages each, one request a question. Both sides take turns
and have one thread. Writes results/vllm_pooling.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from scipy.special import logit

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.retrieve import Retriever
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune import ContextPruner

HERE = Path(__file__).parent / "results"


def sentences(answer: dict[str, Any]) -> dict[tuple[int, int, int], tuple[bool, float]]:
    """(passage, start, end) → (kept, score)."""
    return {
        (i, s["start"], s["end"]): (fate == "kept", s["score"])
        for i, passage in enumerate(answer["passages"])
        for fate in ("kept", "dropped")
        for s in passage[fate]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="pruner")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pruner = ContextPruner.from_pretrained(method="provence", device="cpu")
    scale = pruner.scorer.checkpoint.settings.calibration["provence"].scale
    retriever = Retriever(demo_passages())
    seconds: dict[str, list[float]] = {"hosted": [], "in_process": []}
    n = same = 0
    furthest = 0.0
    for asked in demo_questions():
        question = asked["question"]
        passages = [
            {"title": p["title"], "text": p["text"]} for p in retriever.search(question, 10)
        ]
        body = {"model": args.model, "data": {"question": question, "passages": passages}}
        started = time.perf_counter()
        answer = httpx.post(f"{args.url}/pooling", json=body, timeout=600)
        seconds["hosted"].append(time.perf_counter() - started)
        answer.raise_for_status()
        started = time.perf_counter()
        result = pruner.prune(question, passages)
        seconds["in_process"].append(time.perf_counter() - started)
        theirs, ours = sentences(answer.json()["data"]), sentences(result.to_dict())
        assert theirs.keys() == ours.keys()
        n += len(ours)
        same += sum(theirs[key][0] == ours[key][0] for key in ours)
        apart = [abs(logit(theirs[key][1]) - logit(ours[key][1])) / scale for key in ours]
        furthest = max(furthest, *apart)
    ratios = np.array(seconds["hosted"]) / np.array(seconds["in_process"])
    report = {
        "passages": 10 * len(ratios),
        "sentences": n,
        "decisions_equal": same,
        "max_logit_difference": float(furthest),
        "hosted_over_in_process_seconds": {
            "median": round(float(np.median(ratios)), 2),
            "min": round(float(ratios.min()), 2),
            "max": round(float(ratios.max()), 2),
        },
        "provenance": provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "vllm_pooling.json", report)
    print({k: v for k, v in report.items() if k != "provenance"})


if __name__ == "__main__":
    main()
