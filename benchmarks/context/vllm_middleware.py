"""What the middleware saves inside vLLM: the same chat requests with and without `prunekit`.

    python -m vllm.entrypoints.openai.api_server --model SMALL --served-model-name small \\
        --dtype float32 --max-model-len 4096 --chat-template tests/serve/documents.jinja \\
        --middleware rag_prune.integrations.vllm_middleware.ContextPruning
    python benchmarks/context/vllm_middleware.py [--url http://127.0.0.1:8000] [--model small]

`retrieved`: each question with the five passages retrieved for it, as in RAG. `fixed`: every
question with the same five passages, where a prefix cache does best without pruning. Full and
pruned take turns in going first, so that a noisy machine wrongs neither. Passages and questions are
the demo's; nothing is downloaded. Writes results/vllm_middleware.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.retrieve import Retriever
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune.context.evaluate import mean_interval, ratio_interval

HERE = Path(__file__).parent / "results"
WAYS = {"full": {}, "pruned": {"prunekit": {}}}


def scenarios(questions: int) -> dict[str, list[tuple[str, list[dict[str, str]]]]]:
    """(question, documents) pairs."""
    retriever = Retriever(demo_passages())
    asked = [q["question"] for q in demo_questions()[:questions]]
    retrieved = [
        [{"title": p["title"], "text": p["text"]} for p in retriever.search(question, 5)]
        for question in asked
    ]
    fixed = [documents[0] for documents in retrieved[:5]]
    return {
        "retrieved": list(zip(asked, retrieved, strict=True)),
        "fixed": [(question, fixed) for question in asked],
    }


def ask(client: httpx.Client, model: str, question: str, documents: Any, way: Any) -> list[float]:
    """Prompt tokens, seconds to the whole answer, milliseconds in the pruner."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "documents": documents,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    started = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body | way)
    seconds = time.perf_counter() - started
    answer.raise_for_status()
    if way and "x-prunekit-ms" not in answer.headers:
        raise SystemExit(f"Not pruned: {answer.headers.get('x-prunekit-skipped')}")
    tokens = answer.json()["usage"]["prompt_tokens"]
    return [tokens, seconds, float(answer.headers.get("x-prunekit-ms", 0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="small")
    parser.add_argument("--key", default="none")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with httpx.Client(
        base_url=args.url, headers={"Authorization": f"Bearer {args.key}"}, timeout=600
    ) as client:
        for name, requests in scenarios(args.questions).items():
            figures: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for option in WAYS.values():  # warm up
                ask(client, args.model, *requests[0], option)
            for i, (question, documents) in enumerate(requests[1:]):
                for way in list(WAYS)[:: 1 if i % 2 else -1]:
                    figures[way].append(ask(client, args.model, question, documents, WAYS[way]))
            arrays = {way: np.array(rows).T for way, rows in figures.items()}
            report[name] = {"requests": len(requests) - 1} | {
                way: {
                    figure: mean_interval(values)
                    for figure, values in zip(
                        ("prompt_tokens", "seconds", "pruner_milliseconds"), rows, strict=True
                    )
                }
                for way, rows in arrays.items()
            }
            report[name]["pruned_over_full"] = {
                figure: ratio_interval(arrays["pruned"][i], arrays["full"][i])
                for i, figure in enumerate(("prompt_tokens", "seconds"))
            }
            print(name, report[name]["pruned_over_full"])
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "vllm_middleware.json", report | {"provenance": provenance()})


if __name__ == "__main__":
    main()
