"""What the divergence of two models on responses costs, and what a few tokens tell of it.

    python benchmarks/data/divergence.py --data FOLDER

FOLDER holds gsm8k_train.jsonl.gz (question, answer) and instructions_t0.jsonl.gz (prompt,
completion). The models are SmolLM2-135M-Instruct and a copy whose smallest weights are zero.

cost: `ResponseDivergence` beside two forwards of the same batches, which compare nothing: "plain"
makes all logits, "needed" those of the responses alone; they take turns.
intervals: from the k likeliest tokens, both models asked of the union ("common"), or each telling
only its own ("own"): width, Spearman's correlation of `value` with the exact divergence, over rows
and over tokens, and how many tokens were outside of their bounds.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prune.divergence import ResponseDivergence, jensen_shannon
from data_prune.divergence_interval import (
    DivergenceInterval,
    TopTokens,
    jensen_shannon_interval,
    top_tokens_interval,
)
from data_prune.pairs import batches, padded
from model_prune import Calibration, load_method
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import write_json

KS = (5, 20, 100)
SKIPPED = 14  # of each set: what an unlisted token counts as was chosen on them


def read_rows(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """As many of each set, the first whose prompts are short, after those skipped."""
    rows: list[tuple[str, str]] = []
    for name, prompt, response in (
        ("gsm8k_train", "question", "answer"),
        ("instructions_t0", "prompt", "completion"),
    ):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            known = (json.loads(line) for line in file)
            short = ((r[prompt], r[response]) for r in known if len(r[prompt]) <= 500)
            rows += itertools.islice(short, SKIPPED, SKIPPED + count)
    prompts, responses = zip(*rows, strict=True)
    return list(prompts), list(responses)


@torch.inference_mode()
def forwards(
    scorer: ResponseDivergence, prompts: list[str], responses: list[str], needed: bool
) -> None:
    rows = [scorer._tokens(*pair) for pair in zip(prompts, responses, strict=True)]
    for batch in batches([len(ids) for ids, _ in rows], scorer._room):
        inputs = padded([rows[i][0] for i in batch])
        first = min(rows[i][1] for i in batch) - 1 if needed else 0
        places = torch.arange(first, inputs["input_ids"].shape[1])
        for model in (scorer.original, scorer.pruned):
            model(**inputs, use_cache=False, logits_to_keep=places)


def cost(scorer: ResponseDivergence, prompts: list[str], responses: list[str], rounds: int) -> Any:
    runs: dict[str, Callable[[], Any]] = {
        "divergence": lambda: scorer(prompts, responses),
        "plain": lambda: forwards(scorer, prompts, responses, needed=False),
        "needed": lambda: forwards(scorer, prompts, responses, needed=True),
    }
    found = []
    for _ in range(rounds):
        seconds = {}
        for name, run in runs.items():
            began = time.perf_counter(), time.process_time()
            run()
            seconds[name] = {
                "wall": time.perf_counter() - began[0],
                "processor": time.process_time() - began[1],
            }
        found.append(seconds)
        print(seconds, flush=True)
    rows = [scorer._tokens(*pair) for pair in zip(prompts, responses, strict=True)]
    return {
        "rows": len(rows),
        "tokens": sum(len(ids) for ids, _ in rows),
        "response_tokens": sum(len(ids) - start for ids, start in rows),
        "rounds": found,
        "ratios": {
            f"{clock}, to {name}": spread([f["divergence"][clock] / f[name][clock] for f in found])
            for clock in ("wall", "processor")
            for name in ("plain", "needed")
        },
    }


def spread(ratios: list[float]) -> dict[str, float]:
    return {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}


@torch.inference_mode()
def intervals(scorer: ResponseDivergence, prompts: list[str], responses: list[str]) -> Any:
    """By k and by what was asked, of each row: exact divergences of its tokens, and bounds."""
    exact: list[np.ndarray] = []
    found: dict[tuple[int, str], list[DivergenceInterval]] = {
        (k, asked): [] for k in KS for asked in ("common", "own")
    }
    for prompt, response in zip(prompts, responses, strict=True):
        ids, start = scorer._tokens(prompt, response)
        both = [
            torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], dim=-1)
            for model in (scorer.original, scorer.pruned)
        ]
        exact.append(jensen_shannon(*both).numpy().astype(np.float64))
        for k in KS:
            tops = [x.topk(k).indices for x in both]
            found[k, "common"].append(common(both, tops))
            told = [listed(x, top, ids[start:], k) for x, top in zip(both, tops, strict=True)]
            found[k, "own"].append(top_tokens_interval(*told))
    return [of(k, asked, exact, parts) for (k, asked), parts in found.items()]


def common(both: list[torch.Tensor], tops: list[torch.Tensor]) -> DivergenceInterval:
    """Both models asked of the tokens that either finds likeliest."""
    asked = torch.zeros(both[0].shape, dtype=torch.bool)
    for top in tops:
        asked.scatter_(1, top, True)
    most = int(asked.sum(dim=1).max())
    places = asked.float().topk(most).indices
    counts = asked.gather(1, places)
    p, q = (x.gather(1, places).masked_fill(~counts, -torch.inf).double().numpy() for x in both)
    return jensen_shannon_interval(p, q)


def listed(log_probs: torch.Tensor, top: torch.Tensor, text: list[int], k: int) -> TopTokens:
    """As a server tells them."""
    told = []
    for row, tokens, token in zip(log_probs, top.tolist(), text, strict=True):
        told.append({t: SimpleNamespace(logprob=float(row[t])) for t in {*tokens, token}})
    return TopTokens.read([None, *told], k)


def of(k: int, asked: str, exact: list[np.ndarray], parts: list[DivergenceInterval]) -> Any:
    means = [part.mean() for part in parts]
    tokens = [np.concatenate([getattr(p, x) for p in parts]) for x in ("value", "low", "high")]
    rows = [np.array([float(getattr(m, x)) for m in means]) for x in ("value", "low", "high")]
    row_exact, token_exact = np.array([x.mean() for x in exact]), np.concatenate(exact)
    outside = (tokens[1] > token_exact + 1e-5) | (token_exact > tokens[2] + 1e-5)
    figures = {
        "k": k,
        "asked": asked,
        "mean_exact": float(row_exact.mean()),
        "mean_low": float(rows[1].mean()),
        "mean_high": float(rows[2].mean()),
        "mean_value": float(rows[0].mean()),
        "mean_width_over_ln2": float((rows[2] - rows[1]).mean() / np.log(2)),
        "spearman_rows": float(spearmanr(rows[0], row_exact).statistic),
        "spearman_rows_low": float(spearmanr(rows[1], row_exact).statistic),
        "spearman_tokens": float(spearmanr(tokens[0], token_exact).statistic),
        "tokens_outside": int(outside.sum()),
    }
    print(figures, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="of each of the two sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.2, 0.5])
    args = parser.parse_args()

    folder = small_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, responses = read_rows(args.data, args.rows)
    calibration = Calibration.from_text(responses[0], tokenizer, windows=1, tokens=16)
    result: dict[str, Any] = {"intervals": {}}
    for sparsity in args.sparsities:
        pruned = copy.deepcopy(original)
        method = load_method("magnitude", sparsity=sparsity)
        method.plan(pruned, calibration, progress=False).apply(pruned)
        scorer = ResponseDivergence(original, pruned, tokenizer)
        result["intervals"][str(sparsity)] = intervals(scorer, prompts, responses)
    few = slice(None, None, 4)
    result["cost"] = cost(scorer, prompts[few], responses[few], args.rounds)
    result["provenance"] = provenance(seed=None, threads=torch.get_num_threads())
    write_json(Path(__file__).parent / "results" / "divergence.json", result)


if __name__ == "__main__":
    main()
