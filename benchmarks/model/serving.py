"""A model cut for real inside vLLM on the CPU, beside the dense one in the same run.

    python benchmarks/model/serving.py
    python benchmarks/model/serving.py --random "SmolLM2 1.7B" --engines units \\
        --new 24 --pool 1280 --launches 2 --rounds 2

SmolLM2-135M in float32, or a Llama of random weights, and the same without a quarter of its layers'
weights, in two ways: cut in its units, where two layers are gone, every third of the others lacks a
third of its KV groups, and widths differ; or in depth, where a quarter of the layers is gone, and
neurons for what is left of a layer. Which units go is of no matter here, so they are simply the
last. Every engine is a process of its own with one thread and the same bytes for its cache; they
take turns, in reverse order in every second round, and one that waits sleeps. All are launched anew
after some rounds, as a process keeps for its life the luck of where its memory lies, which is worth
more than a tenth.

    dense          vLLM's own Llama
    units          our class, of vLLM's own layers
    transformers   the same model through vLLM's backend for models of transformers
    depth          vLLM's own Llama, as all layers are alike

`bound` is by the multiplications with weights alone, which for a prompt leave out the head.

    prefill   tokens of the prompts a second, asked for one token each
    decode    new tokens a second: the time for all tokens less the time for the first
    cache     tokens that fit, as vLLM counts them

Ratios are taken within a round. Writes results/serving-MODEL.json.
"""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.small_model import small_model
from prune_core.errors import InputError
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
BATCH, PROMPT = 16, 128  # sequences; tokens of a prompt
REAL = "SmolLM2 135M"
ENGINES = {  # which model each serves, and the class that it must be
    "dense": ("dense", "LlamaForCausalLM"),
    "units": ("units", "PrunedForCausalLM"),
    "transformers": ("units", "Transformers"),
    "depth": ("depth", "LlamaForCausalLM"),
}
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
# One thread, and vLLM's engine in the process that asks it, which sleeps while it waits.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


# ------------------------------------------------------------------------------ in an engine
class Engine:
    """vLLM with prompts of fixed token ids."""

    def __init__(self, name: str, folder: str, pool: int) -> None:
        from vllm import LLM, ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        if name == "transformers":
            ModelRegistry.register_model("PrunedLlamaForCausalLM", BACKEND)
        self.llm = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
            max_model_len=512,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=pool,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        model = self.core.model_executor.driver_worker.worker.model_runner.model
        if not type(model).__name__.startswith(ENGINES[name][1]):
            raise InputError(
                f"vLLM took {type(model).__name__} for '{name}': install prunekit anew, so that "
                f"vLLM finds its plugin."
            )

    def cache_tokens(self) -> int:
        config = self.core.scheduler.kv_cache_config
        return int(config.num_blocks * config.kv_cache_groups[0].kv_cache_spec.block_size)

    def seconds(self, tokens: int) -> float:
        """To answer all prompts with so many tokens."""
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [1000 + 37 * (PROMPT * i + j) % 40_000 for j in range(PROMPT)]}
            for i in range(BATCH)
        ]
        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self.llm.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - started


def serve(pipe: Any, *given: Any) -> None:
    """Of a process: an engine that does what the pipe says."""
    engine = Engine(*given)
    while True:
        try:
            what, *asked = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(engine, what)(*asked))


# ------------------------------------------------------------------------------ outside
class Remote:
    """The other end of `serve`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self, what: str, *given: Any) -> Any:
        self.pipe.send((what, *given))
        return self.pipe.recv()


@contextmanager
def engine(*given: Any) -> Iterator[Remote]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *given), daemon=True)
    process.start()
    there.close()  # so that the pipe ends with the process
    try:
        yield Remote(here)
    finally:
        here.close()
        process.join()


def cut(folder: Path, out: Path, kind: str) -> dict[str, float]:
    """Write a cut model; returns the share of its layers' weights that is gone, and the bounds."""
    import torch

    from model_prune.checkpoint import open_checkpoint, write_checkpoint
    from model_prune.core.plan import LayerPlan
    from model_prune.core.target import Dims
    from model_prune.graph.cut import dims_after

    config = open_checkpoint(folder).config
    layers, fewer = config.num_hidden_layers, config.num_hidden_layers // 4
    plan, before, after = [], 0, 0
    for i in range(layers):
        dims = Dims.of(config, i)
        if kind == "units":
            width = dims.neurons * (22, 25, 28)[i % 3] // 32
            groups = dims.kv_groups - (i % 3 == 1) * (dims.kv_groups // 3)
            removed = i in (layers // 2, layers // 2 + 2)
        else:
            rest = (layers / 4 - fewer) * dims.weights / (layers - fewer)  # of each that stays
            width = dims.neurons - math.ceil(rest / (3 * config.hidden_size))
            groups, removed = dims.kv_groups, layers - 3 - fewer <= i < layers - 3
        units = {"neuron": torch.arange(width), "kv_group": torch.arange(groups)}
        of = LayerPlan(units=units, removed=removed)
        plan.append(of)
        before += dims.weights
        after += 0 if of.removed else dims_after(dims, of).weights
    write_checkpoint(folder, out, plan, plan_json={}, progress=False)
    head = config.vocab_size * config.hidden_size
    return {
        "layer_weights_removed": round(1 - after / before, 4),
        "prefill_bound": round(before / after, 3),
        "decode_bound": round((before + head) / (after + head), 3),
    }


PREFILL, DECODE = KEYS = ("prefill_tokens_per_second", "decode_tokens_per_second")
Figures = dict[str, dict[str, float]]  # by engine and key


def launched(
    folders: dict[str, Path], args: argparse.Namespace
) -> tuple[dict[str, int], list[Figures]]:
    """The tokens that each engine's cache holds, and the figures of every round."""
    found = []
    with ExitStack() as stack:
        up = {
            name: stack.enter_context(engine(name, str(folders[ENGINES[name][0]]), args.pool << 20))
            for name in ("dense", *args.engines)
        }
        cache = {name: ask("cache_tokens") for name, ask in up.items()}
        for ask in up.values():
            ask("seconds", 2)  # not counted: what is built at first use
        for number in range(args.rounds):
            order = list(up)[:: -1 if number % 2 else 1]
            first = {name: up[name]("seconds", 1) for name in order}
            whole = {name: up[name]("seconds", 1 + args.new) for name in order}
            found.append(
                {
                    name: {
                        PREFILL: BATCH * PROMPT / first[name],
                        DECODE: BATCH * args.new / (whole[name] - first[name]),
                    }
                    for name in order
                }
            )
    return cache, found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    from random_llama import write_model

    found: list[Figures] = []
    with TemporaryDirectory() as temporary:
        folders = {kind: Path(temporary) / kind for kind, _ in ENGINES.values()}
        if args.random:
            write_model(folders["dense"], args.random)
        else:
            folders["dense"] = Path(small_model())
        kinds = dict.fromkeys(ENGINES[name][0] for name in args.engines)
        cuts = {kind: cut(folders["dense"], folders[kind], kind) for kind in kinds}
        before = os.getloadavg()[0]
        for _ in range(args.launches):
            cache, of_launch = launched(folders, args)
            found += of_launch
        after = os.getloadavg()[0]
    engines = {
        name: {
            "cache_tokens": cache[name],
            "times_the_cache": round(cache[name] / cache["dense"], 3),
        }
        | {key: spread([of[name][key] for of in found]) for key in KEYS}
        | {
            "times_dense": {
                key: spread([of[name][key] / of["dense"][key] for of in found]) for key in KEYS
            }
        }
        for name in cache
    }
    return {
        "model": args.random or REAL,
        "engines": engines,
        "cuts": cuts,
        "batch": BATCH,
        "prompt_tokens": PROMPT,
        "new_tokens": args.new,
        "pool_bytes": args.pool << 20,
        "launches": args.launches,
        "rounds": args.rounds,
        "load_average": {"before": before, "after": after},
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median over rounds, with the lowest and the highest."""
    found = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{x:.4g}") for name, x in found.items()}


def show(report: dict[str, Any]) -> None:
    print(report["cuts"])
    for name, of in report["engines"].items():
        print(f"{name:13} cache {of['cache_tokens']} tokens x{of['times_the_cache']:.2f}", end="")
        for key in ("prefill", "decode"):
            rate = of[f"{key}_tokens_per_second"]["median"]
            times = of["times_dense"][f"{key}_tokens_per_second"]
            print(
                f"   {key} {rate:.0f} tokens/s x{times['median']:.2f} "
                f"({times['min']:.2f} to {times['max']:.2f})",
                end="",
            )
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", metavar="SIZE", help="of random_llama.py; else a real model")
    cuts = list(ENGINES)[1:]
    parser.add_argument("--engines", nargs="+", choices=cuts, default=cuts, help="beside dense")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded of a sequence")
    parser.add_argument("--pool", type=int, default=256, help="MiB of each cache")
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of each launch")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which would decide before --pool
    os.environ.update(ENVIRONMENT)  # before anything here or in the engines brings torch in
    report = measured(args) | {"provenance": provenance(seed=None)}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"serving-{report['model'].lower().replace(' ', '-')}.json", report)
    show(report)


if __name__ == "__main__":
    main()
