"""A model cut for real inside vLLM on the CPU, beside the dense one in the same run.

    python benchmarks/model/serving.py

SmolLM2-135M in float32, and the same without a quarter of its layers' weights, in two ways: cut in
its units, where two layers are gone, every third of the others lacks a KV group, and widths differ;
or in depth, where seven layers are gone and a few neurons. Which units go is of no matter here, so
they are simply the last. Every engine is a process of its own with one thread and the same bytes
for its cache; they take turns, in reverse order in every second round, and one that waits sleeps.
All are launched anew after some rounds, as a process keeps for its life the luck of where its
memory lies, which is worth more than a tenth.

    dense          vLLM's own Llama
    units          our class, of vLLM's own layers
    transformers   the same model through vLLM's backend for models of transformers
    depth          vLLM's own Llama, as all layers are alike

`bound` is by the multiplications with weights alone, which for a prompt leave out the head.

    prefill   tokens of the prompts a second, asked for one token each
    decode    new tokens a second: the time for all tokens less the time for the first
    cache     tokens that fit, as vLLM counts them

Ratios are taken within a round. Writes results/serving.json.
"""

import argparse
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
BATCH, PROMPT, NEW = 16, 128, 128  # sequences; tokens of a prompt; decoded tokens of a sequence
POOL = 256 << 20  # bytes
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

    def __init__(self, name: str, folder: str) -> None:
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
            kv_cache_memory_bytes=POOL,
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
        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        self.llm.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - started


def serve(pipe: Any, name: str, folder: str) -> None:
    """Of a process: an engine that does what the pipe says."""
    engine = Engine(name, folder)
    while True:
        try:
            what, *given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(engine, what)(*given))


# ------------------------------------------------------------------------------ outside
class Remote:
    """The other end of `serve`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self, what: str, *given: Any) -> Any:
        self.pipe.send((what, *given))
        return self.pipe.recv()


@contextmanager
def engine(name: str, folder: str) -> Iterator[Remote]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, name, folder), daemon=True)
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
    plan, before, after = [], 0, 0
    for i in range(config.num_hidden_layers):
        dims = Dims.of(config, i)
        if kind == "units":
            width = dims.neurons * (22, 25, 28)[i % 3] // 32
            groups, removed = dims.kv_groups - (i % 3 == 1), i in (15, 17)
        else:
            width = dims.neurons * 31 // 32
            groups, removed = dims.kv_groups, 20 <= i < 27
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


def launched(folders: dict[str, Path], rounds: int) -> tuple[dict[str, int], list[Figures]]:
    """The tokens that each engine's cache holds, and the figures of every round."""
    found = []
    with ExitStack() as stack:
        up = {
            name: stack.enter_context(engine(name, str(folders[model])))
            for name, (model, _) in ENGINES.items()
        }
        cache = {name: ask("cache_tokens") for name, ask in up.items()}
        for ask in up.values():
            ask("seconds", 2)  # not counted: what is built at first use
        for number in range(rounds):
            order = list(up)[:: -1 if number % 2 else 1]
            first = {name: up[name]("seconds", 1) for name in order}
            whole = {name: up[name]("seconds", 1 + NEW) for name in order}
            found.append(
                {
                    name: {
                        PREFILL: BATCH * PROMPT / first[name],
                        DECODE: BATCH * NEW / (whole[name] - first[name]),
                    }
                    for name in order
                }
            )
    return cache, found


def measured(launches: int, rounds: int) -> dict[str, Any]:
    found: list[Figures] = []
    with TemporaryDirectory() as temporary:
        folders = {"dense": Path(small_model())}
        cuts = {}
        for kind in ("units", "depth"):
            folders[kind] = Path(temporary) / kind
            cuts[kind] = cut(folders["dense"], folders[kind], kind)
        before = os.getloadavg()[0]
        for _ in range(launches):
            cache, of_launch = launched(folders, rounds)
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
        for name in ENGINES
    }
    return {
        "engines": engines,
        "cuts": cuts,
        "batch": BATCH,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "pool_bytes": POOL,
        "launches": launches,
        "rounds": rounds,
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
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of each launch")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which would decide before POOL
    os.environ.update(ENVIRONMENT)  # before anything here or in the engines brings torch in
    report = measured(args.launches, args.rounds) | {"provenance": provenance(seed=None)}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "serving.json", report)
    show(report)


if __name__ == "__main__":
    main()
