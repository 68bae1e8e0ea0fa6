"""How often does a small model's rewrite of a target pass, and is it nearer to what it would write?

    python benchmarks/data/self_distill.py --gsm8k gsm8k_train.jsonl.gz \
        --instructions instructions_t0.jsonl.gz [--replies FOLDER]

SmolLM2-135M-Instruct rewrites the answers of 60 short rows each, drawn by seed: worked arithmetic
(question, answer) and short tasks (prompt, completion). Counted are the rewrites that pass each
check, and beside them those that the rule of SDFT's code would take. Nearness is the mean negative
log-likelihood a token, in nats, of a target after the prompt alone, under the same model: of the
original answers, of the rewrites, and of what would be trained on. Greedy rewrites are likely by
their making, so a lower figure shows the direction of the papers' claim and not that it helps.
"""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from data_prune.rewrite_checks import LEAKS
from data_prune.self_distill import Rewrite, SelfDistill
from pipelines.ask import AskLocal
from pipelines.language_model import LocalModel, chat_ids
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json

OUT = Path(__file__).parent / "results" / "self_distill.json"
ROWS, SEED, BATCH = 60, 0, 12
PROMPT, ANSWER = 400, 300  # characters at most, so that it ends within minutes on one core
HOW = SelfDistill(max_new_tokens=128)


def draw(path: Path, prompt: str, response: str) -> list[dict[str, str]]:
    rows = [
        {"prompt": row[prompt], "response": row[response]}
        for row in read_jsonl(path)
        if len(row[prompt]) <= PROMPT and len(row[response]) <= ANSWER
    ]
    chosen = np.random.default_rng(SEED).choice(len(rows), ROWS, replace=False)
    return [rows[i] for i in sorted(chosen)]


def sdft_takes(rewrite: Rewrite, mathematics: bool) -> bool:
    """The rule of SDFT's code: no banned phrase, and in mathematics the same last whole number."""

    def last(text: str) -> int | None:
        numbers = re.findall(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?", text)
        if not numbers:
            return None
        whole, _, part = re.sub(r"[,\s]", "", numbers[-1]).partition(".")
        return None if int(part or 0) else int(whole)

    text, reference = rewrite.rewrite or "", rewrite.reference or ""
    banned = any(phrase in text.lower() for phrase in LEAKS[:5]) or text.startswith("Your turn")
    same = last(text) == last(reference) is not None
    return not banned and (same or not mathematics)


@torch.inference_mode()
def surprise(local: LocalModel, prompt: str, target: str) -> tuple[float, int]:
    """The negative log-likelihood of a target with its end, after the prompt alone; its tokens."""
    asked = chat_ids(local.tokenizer, [{"role": "user", "content": prompt}])
    written = local.tokenizer(target, add_special_tokens=False)["input_ids"]
    written = [*written, local.tokenizer.eos_token_id]
    logits = local.model(torch.tensor([asked + written]), logits_to_keep=len(written) + 1).logits
    chosen = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(written)[:, None])
    return -float(chosen.sum()), len(written)


def nearness(local: LocalModel, rewrites: Sequence[Rewrite], name: str) -> dict[str, Any]:
    """Nats a token of originals and rewrites; `difference` of a row: mean and standard error."""
    pairs = []
    for found in tqdm(rewrites, desc=f"{name}: likelihoods", disable=None):
        texts = (found.reference, found.rewrite)
        pairs.append([surprise(local, found.prompt or "", text or "") for text in texts])
    nats, tokens = np.array(pairs).transpose(2, 0, 1)  # (rows, original and rewrite)
    accepted = np.array([found.accepted for found in rewrites])
    complete = np.array([found.passed["complete"] for found in rewrites])

    def compared(rows: np.ndarray) -> dict[str, Any]:
        a, b = nats[rows].sum(0) / tokens[rows].sum(0)
        change = np.diff(nats[rows] / tokens[rows])[:, 0]
        return {
            "rows": int(rows.sum()),
            "original": round(float(a), 3),
            "rewrite": round(float(b), 3),
            "difference": round(float(change.mean()), 3),
            "error": round(float(change.std(ddof=1) / np.sqrt(len(change))), 3),
            "nearer": int((change < 0).sum()),
        }

    kept = accepted.astype(int)
    rows = np.arange(len(rewrites))
    trained = nats[rows, kept].sum() / tokens[rows, kept].sum()
    return {
        "accepted": compared(accepted),
        "complete": compared(complete),
        "all_originals": round(float(nats[:, 0].sum() / tokens[:, 0].sum()), 3),
        "all_targets": round(float(trained), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--replies", type=Path, help="keeps the replies, so that it can be stopped")
    arguments = parser.parse_args()
    sets = {
        "gsm8k": draw(arguments.gsm8k, "question", "answer"),
        "instructions": draw(arguments.instructions, "prompt", "completion"),
    }
    ask = AskLocal.from_pretrained(small_model(), batch=BATCH)
    results = {}
    for name, rows in sets.items():
        started = time.process_time()
        folder = arguments.replies and arguments.replies / name
        found = HOW.run(rows, ask, folder)
        generated = time.process_time()
        taken = [sdft_takes(rewrite, name == "gsm8k") for rewrite in found.rewrites]
        ours = [rewrite.accepted for rewrite in found.rewrites]
        results[name] = {
            **found.report(),
            "acceptance": round(found.acceptance, 3),
            "sdft": {
                "accepted": sum(taken),
                "only_sdft": sum(a and not b for a, b in zip(taken, ours, strict=True)),
                "only_ours": sum(b and not a for a, b in zip(taken, ours, strict=True)),
            },
            "nats_a_token": nearness(ask.model, found.rewrites, name),
            "cpu_seconds": {
                "rewriting": round(generated - started, 1),
                "likelihoods": round(time.process_time() - generated, 1),
            },
        }
        print(name, results[name])
    write_json(OUT, results | {"provenance": provenance(SEED, max_new_tokens=HOW.max_new_tokens)})


if __name__ == "__main__":
    main()
