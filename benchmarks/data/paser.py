"""Do rows that a pruned model forgot recover it better than random ones?

    python benchmarks/data/paser.py --data FOLDER --work FOLDER [--seeds 3]

FOLDER holds gsm8k_train.jsonl.gz (question, answer), instructions_t0.jsonl.gz (prompt, completion)
and wikitext2_{valid,test}.txt.gz. SmolLM2-135M-Instruct loses half of its weights by Wanda,
calibrated on WikiText-2's validation part. From a pool of short rows a fifth is chosen by each
metric; the pruned model learns from those, one pass, its masks held; and is asked about rows of
the same kinds that are held back (mean loss a token of their responses) and about other text
(perplexity on WikiText-2's test part). Seeds are of the pool, of what is drawn and of the order.

Every part is kept in the work folder, so that a stopped run goes on. Written to
results/paser.json: the losses by choice and seed, and the seconds that choosing and training took.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prune import select
from data_prune.divergence import ResponseDivergence
from data_prune.metrics.paser import PASER
from data_prune.pairs import batches, encode, padded, worded
from model_prune import prune_model
from model_prune.core.mask import hold
from model_prune.evaluate import perplexity
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import read_text, write_json

POOL, HELD, BUDGET = 600, 150, 0.2
WINDOWS = 40  # of 512 tokens of other text
LONGEST = 400  # characters of a prompt, and of a response
RATE, BATCH, TOKENS = 2e-5, 8, 2048


def read_rows(data, seed):
    """Half of the rows of GSM8K and half of T0's tasks, drawn: the pool, and those held back."""
    rows = []
    for name, prompt, response in (
        ("gsm8k_train", "question", "answer"),
        ("instructions_t0", "prompt", "completion"),
    ):
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            known = [json.loads(line) for line in file]
        fit = [
            {"prompt": r[prompt], "response": r[response], "source": name}
            for r in known
            if 0 < len(r[prompt]) <= LONGEST and 0 < len(r[response].strip()) <= LONGEST
        ]
        chosen = np.random.default_rng(seed).permutation(len(fit))[: (POOL + HELD) // 2]
        rows.append([fit[i] for i in chosen])
    pool = [row for part in rows for row in part[: POOL // 2]]
    return pool, [row for part in rows for row in part[POOL // 2 :]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()


def sequences_of(tokenizer, rows):
    return [
        encode(tokenizer, worded(tokenizer, row["prompt"], "chat"), row["response"], 512)
        for row in rows
    ]


def losses(model, sequences):
    """The mean loss a token of each response, in one batch."""
    inputs = padded([ids for ids, _ in sequences])
    logits = model(**inputs, use_cache=False).logits
    return torch.stack(
        [
            cross_entropy(
                logits[j, start - 1 : len(ids) - 1], inputs["input_ids"][j, start : len(ids)]
            )
            for j, (ids, start) in enumerate(sequences)
        ]
    )


@torch.inference_mode()
def held_loss(model, sequences):
    found = []
    for batch in batches([len(ids) for ids, _ in sequences], TOKENS):
        found += losses(model, [sequences[i] for i in batch]).tolist()
    return float(np.mean(found))


def trained(folder, sequences, seed):
    """The pruned model after one pass over these rows; what was pruned stays zero."""
    model = load(folder)
    masks = {
        name: parameter != 0
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and (parameter == 0).float().mean() > 0.1
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    held = hold(model, masks, optimizer)
    order = np.random.default_rng(seed).permutation(len(sequences)).tolist()
    steps = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for step in tqdm(steps, desc="training", leave=False, disable=None):
        optimizer.zero_grad()
        losses(model, [sequences[i] for i in step]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held.remove()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    dense, pruned = small_model(), args.work / "pruned"
    if not pruned.exists():
        prune_model(
            dense,
            method="wanda",
            sparsity=0.5,
            calibration=args.data / "wikitext2_valid.txt.gz",
            windows=32,
            tokens=512,
            out=pruned,
        )
    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = read_text(args.data / "wikitext2_test.txt.gz")

    def measured(model, held):
        other = perplexity(model, tokenizer, text, max_windows=WINDOWS, progress=False)
        return {"held": held_loss(model, held), "other text": other.value}

    runs = []
    for seed in range(args.seeds):
        kept = args.work / f"seed-{seed}.json"
        if not kept.exists():
            write_json(kept, one_seed(args, dense, pruned, tokenizer, measured, seed))
        runs.append(json.loads(kept.read_text(encoding="utf-8")))
    write_json(
        Path(__file__).parent / "results" / "paser.json",
        {"pool": POOL, "held": HELD, "share": BUDGET, "runs": runs, "provenance": provenance()},
    )
    for name in runs[0]["choices"]:
        print(f"{name:16s}", *(f"{run['choices'][name]['held']:.3f}" for run in runs))


def one_seed(args, dense, pruned, tokenizer, measured, seed):
    pool, held_rows = read_rows(args.data, seed)
    held = sequences_of(tokenizer, held_rows)
    original, broken = load(dense), load(pruned)
    started = time.perf_counter()
    damage = ResponseDivergence(original, broken, tokenizer, template="chat")(
        [row["prompt"] for row in pool], [row["response"] for row in pool]
    )
    scoring = time.perf_counter() - started
    choices = {"unpruned": measured(original, held), "pruned": measured(broken, held)}
    del original, broken
    given = {"budget": BUDGET, "seed": seed, "tokenizer": tokenizer}
    selections = {
        "paser": select(pool, metric=PASER(), degradation=damage, **given),
        "paser, no filter": select(
            pool, metric=PASER(conflict="none"), degradation=damage, **given
        ),
        "damage alone": select(pool, metric="imported", scores=damage, **given),
        "prototypes": select(pool, metric="prototypes", **given),
        "random": select(pool, metric="random", **given),
    }
    rows = {name: s.indices for name, s in selections.items()}
    rows["random, like lengths"] = selections["paser"].baselines["random, like lengths"]
    rows["all"] = np.arange(len(pool))
    for name, indices in rows.items():
        chosen = sequences_of(tokenizer, [pool[i] for i in indices])
        started = time.perf_counter()
        model = trained(pruned, chosen, seed)
        choices[name] = {
            "training": time.perf_counter() - started,
            "rows": len(indices),
            "tokens": sum(len(ids) for ids, _ in chosen),
            "mathematics": float(np.mean([pool[i]["source"] == "gsm8k_train" for i in indices])),
            **measured(model, held),
        }
    return {"seed": seed, "scoring": scoring, "choices": choices}


if __name__ == "__main__":
    main()
