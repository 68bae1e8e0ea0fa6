"""What a pruned cache costs in transformers: bytes, and seconds beside DynamicCache and SDPA.

    python benchmarks/kv/transformers_cache.py --text wikitext2_test.txt.gz

A 135M model reads a prompt and writes on; all caches in turn in each round, so that the machine's
other work meets all of them. Ratios are of the same round; quoted are their median and range. Bytes
are those of the storages, once after the prompt and once at the end, over the same tokens dense.
"""

import argparse
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pipelines.language_model import LocalModel
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune.kv import KVPruneConfig, enable_kv_pruning

HERE = Path(__file__).parent / "results"
CONFIGS = {
    "ThinK 0.5": {"method": "think", "key_ratio": 0.5},
    "ThinK 0.5 + values 0.5": {"method": "think", "key_ratio": 0.5, "value_ratio": 0.5},
    "Mustafar 0.5/0.5": {"method": "mustafar", "key_ratio": 0.5, "value_ratio": 0.5},
    "Mustafar 0.7/0.7": {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7},
}


@torch.inference_mode()
def run(model: Any, ids: torch.Tensor, new_cache: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Seconds of the prompt, seconds a step, and the cache's bytes after each."""
    cache, prompt = new_cache(), ids[:, :-steps]
    started = time.perf_counter()
    model(prompt, past_key_values=cache, logits_to_keep=1)
    read = time.perf_counter()
    first = held(cache)
    for i in range(prompt.shape[1], ids.shape[1]):
        model(ids[:, i : i + 1], past_key_values=cache, logits_to_keep=1)
    ended = time.perf_counter()
    return {"prompt": read - started, "step": (ended - read) / steps, "bytes": (first, held(cache))}


def held(cache: Any) -> int:
    if isinstance(cache, DynamicCache):
        return sum(
            x.numel() * x.itemsize for layer in cache.layers for x in (layer.keys, layer.values)
        )
    return int(cache.nbytes())


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    loaded = LocalModel.from_pretrained(small_model())
    with gzip.open(arguments.text, "rt", encoding="utf-8") as file:
        all_ids = loaded.tokenizer(file.read(), return_tensors="pt", verbose=False).input_ids[0]
    length = arguments.tokens + arguments.steps
    ids = torch.stack(list(all_ids[: arguments.batch * length].split(length)))
    caches = {"dense": lambda: DynamicCache(config=loaded.model.config)}
    for name, options in CONFIGS.items():
        caches[name] = enable_kv_pruning(loaded.model, KVPruneConfig(**options))
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds + 1):
        order = list(caches) if number % 2 else list(caches)[::-1]
        found = {name: run(loaded.model, ids, caches[name], arguments.steps) for name in order}
        if number:  # the first compiles and warms up
            rounds.append(found)
            print(
                number, {name: round(f["step"] * 1e3, 1) for name, f in found.items()}, flush=True
            )
    rows = {
        name: {
            "bytes after the prompt": round(
                rounds[0][name]["bytes"][0] / rounds[0]["dense"]["bytes"][0], 4
            ),
            "bytes at the end": round(
                rounds[0][name]["bytes"][1] / rounds[0]["dense"]["bytes"][1], 4
            ),
            "prompt, × dense": spread([r[name]["prompt"] / r["dense"]["prompt"] for r in rounds]),
            "step, × dense": spread([r[name]["step"] / r["dense"]["step"] for r in rounds]),
        }
        for name in CONFIGS
    }
    settings = {k: v for k, v in vars(arguments).items() if k != "text"}
    write_json(HERE / "transformers.json", {"rows": rows, **settings, "provenance": provenance()})
    for name, row in rows.items():
        print(name, row)


if __name__ == "__main__":
    main()
