"""KV pruning inside vLLM on the CPU, beside stock vLLM in the same run: memory, tokens, speed.

    python benchmarks/kv/serving.py --text wikitext2_test.txt.gz \\
        --calibration wikitext2_valid.txt.gz

SmolLM2-135M in float32. Every engine is a process of its own with one thread and the same bytes
for its cache; engines that are compared take turns, and one that waits sleeps.

    capacity   blocks and sequences that fit, as vLLM itself counts them, rings included
    identity   method "none" against stock: greedy tokens and their log-probabilities
    load       more requests than the whole cache holds. `tokens_per_second` counts new tokens over
               all of a round; `decode_tokens_per_second` looks at steps without a prompt in them.
               The share of attention in these steps bounds what an equal batch can gain, and the
               bytes of a token what a batch can that memory limits.

Ratios are taken within a round. Writes results/serving.json.
"""

import argparse
import gzip
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.small_model import small_model
from prune_core.errors import InputError
from prune_core.provenance import provenance
from prune_core.storage import write_json

HERE = Path(__file__).parent / "results"
CONTEXTS = (1024, 4096)
BLOCKS = (32, 128)  # ours and vLLM's default on the CPU; of 32 a sequence leaves less empty
LOAD_BLOCK = 32
PROMPTS, ANSWERS = (384, 641), (128, 257)  # tokens of the load's, drawn from these ranges
POOL = 1 << 30  # bytes
LOAD_POOL = 256 << 20  # some 8 whole sequences of the load
ENGINES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "none": {"method": "none"},  # our kernels over whole pages: what of a gain is not pruning's
    "think .5": {"method": "think", "key_ratio": 0.5},
    "think .5, values .5": {"method": "think", "key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar .5": {"method": "mustafar", "key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar .7": {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7},
}
LOADED = ("stock", "none", "think .5", "mustafar .7")
# One thread, and vLLM's engine in the process that asks it, where its steps can be timed.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

Request = tuple[list[int], int]  # token ids of a prompt, and how many are asked for


# ------------------------------------------------------------------------------ in an engine
class Engine:
    """vLLM with a stopwatch at its scheduler and at its layers' attention."""

    def __init__(self, pruning: dict[str, Any] | None, **arguments: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
            additional_config={} if pruning is None else {"prunekit_kv": pruning},
            **arguments,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.config = self.core.vllm_config
        self.steps: list[tuple[float, float, Any]] = []  # when, attention so far, what is to do
        self.attention = 0.0
        scheduler = self.core.scheduler
        schedule = scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> Any:
            at = time.perf_counter()
            output = schedule(*args, **kwargs)
            self.steps.append((at, self.attention, output))
            return output

        scheduler.schedule = noted
        layers = self.config.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
        pruned = type(impls[0]).__module__.startswith("rag_prune.")
        if pruned != (pruning is not None):
            raise InputError(
                f"vLLM took {type(impls[0]).__qualname__} for {pruning}: install prunekit anew, so "
                f"that vLLM finds its plugin."
            )
        for impl in impls:
            for name in ("forward", "do_kv_cache_update"):
                if hasattr(impl, name):
                    setattr(impl, name, self._timed(getattr(impl, name)))

    def _timed(self, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **kwargs)
            self.attention += time.perf_counter() - started
            return out

        return run

    def capacity(self) -> dict[str, Any]:
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        cache = self.core.scheduler.kv_cache_config
        sequences = {}
        for tokens in CONTEXTS:  # the last one is the engine's own
            self.config.model_config.max_model_len = tokens
            sequences[str(tokens)] = get_max_concurrency_for_kv_cache_config(self.config, cache)
        rings = [group.kv_cache_spec for group in cache.kv_cache_groups[1:]]
        return {
            "blocks": cache.num_blocks,
            "ring_blocks": sum(
                spec.max_memory_usage_bytes(self.config) // spec.page_size_bytes for spec in rings
            ),
            "sequences": sequences,
        }

    def answer(self, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probabilities."""
        return [
            (
                list(answer.token_ids),
                [of[i].logprob for i, of in zip(answer.token_ids, answer.logprobs, strict=True)],
            )
            for answer in self._generated(requests, logprobs=0)
        ]

    def _generated(self, requests: list[Request], logprobs: int | None = None) -> list[Any]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=logprobs)
                for _, n in requests
            ],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]

    def load(self, requests: list[Request]) -> dict[str, float]:
        """What became of a round; seconds, and counts."""
        self.steps.clear()
        started = time.perf_counter()
        self._generated(requests)
        ended = time.perf_counter()
        attention = self.attention - self.steps[0][1]
        ends = [(at, spent) for at, spent, _ in self.steps[1:]] + [(ended, self.attention)]
        decodes = []  # sequences, seconds, seconds of attention
        running, resumed = 0, 0
        for (at, before, todo), (end, after) in zip(self.steps, ends, strict=True):
            counts = todo.num_scheduled_tokens.values()
            running = max(running, len(counts))
            resumed += len(todo.scheduled_cached_reqs.resumed_req_ids)
            if counts and max(counts) == 1:
                decodes.append((len(counts), end - at, after - before))
        tokens, seconds, of_attention = np.array(decodes).sum(0).tolist()
        return {
            "tokens_per_second": sum(n for _, n in requests) / (ended - started),
            "decode_tokens_per_second": tokens / seconds,
            "decode_batch": tokens / len(decodes),
            "decode_attention_share": of_attention / seconds,
            "decode_attention_seconds_a_token": of_attention / tokens,
            "decode_share": seconds / (ended - started),
            "attention_share": attention / (ended - started),
            "most_running": running,
            "preemptions": resumed,
        }

    def threads(self) -> int:
        import torch

        return torch.get_num_threads()


def serve(pipe: Any, pruning: dict[str, Any] | None, arguments: dict[str, Any]) -> None:
    """Of a process: an engine that does what the pipe says and sleeps in between.

    Every answer comes with the seconds that it waited for the question, and those of a core that
    the waiting took.
    """
    engine = Engine(pruning, **arguments)
    while True:
        before = np.array([time.perf_counter(), time.process_time()])
        try:
            name, *given = pipe.recv()
        except EOFError:
            return
        waited = np.array([time.perf_counter(), time.process_time()]) - before
        pipe.send((getattr(engine, name)(*given), waited))


# ------------------------------------------------------------------------------ outside
class Remote:
    """The other end of `serve`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.waiting = np.zeros(2)  # seconds, and those of a core that it took

    def __call__(self, name: str, *given: Any) -> Any:
        self.pipe.send((name, *given))
        answer, waited = self.pipe.recv()
        self.waiting += waited
        return answer


@cache
def model() -> str:
    return str(small_model())  # which takes a while, to see that it is whole


@contextmanager
def engine(pruning: dict[str, Any] | None, **arguments: Any) -> Iterator[Remote]:
    arguments = {
        "model": model(),
        "max_model_len": CONTEXTS[-1],
        "kv_cache_memory_bytes": POOL,
        **arguments,
    }
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, pruning, arguments), daemon=True)
    process.start()
    there.close()  # so that the pipe ends with the process
    try:
        yield Remote(here)
    finally:
        here.close()
        process.join()


def with_masks(masks: Path) -> dict[str, dict[str, Any] | None]:
    return {
        name: {**given, "masks": str(masks)} if given and given["method"] == "think" else given
        for name, given in ENGINES.items()
    }


def calibrated(text: str, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rag_prune.kv import calibrate_masks

    whole = AutoModelForCausalLM.from_pretrained(model())
    tokenizer = AutoTokenizer.from_pretrained(model())
    return calibrate_masks(whole, tokenizer, [text[:50_000]], folder / "masks.safetensors")


def requests_of(ids: list[int], lengths: Any, tokens: Any) -> list[Request]:
    """Prompts from one place of the text after another."""
    ends = np.cumsum(lengths)
    if ends[-1] > len(ids):
        raise InputError(
            f"The prompts need {ends[-1]} tokens, and --text has {len(ids)}: give a longer one."
        )
    return [
        (ids[end - n : end], int(asked))
        for end, n, asked in zip(ends, lengths, tokens, strict=True)
    ]


def capacities(engines: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for size in BLOCKS:
        found = {}
        for name, pruning in engines.items():
            with engine(pruning, block_size=size) as ask:
                found[name] = ask("capacity")
        stock = found["stock"]
        for of in found.values():
            of["times_the_blocks"] = round(of["blocks"] / stock["blocks"], 3)
            of["times_the_sequences"] = {
                tokens: round(n / stock["sequences"][tokens], 3)
                for tokens, n in of["sequences"].items()
            }
            of["sequences"] = {tokens: round(n, 2) for tokens, n in of["sequences"].items()}
        report[str(size)] = found
    return report


def identity(ids: list[int]) -> dict[str, Any]:
    asked = requests_of(ids, [64 + 16 * i for i in range(24)], [32] * 24)
    with engine(ENGINES["stock"]) as stock, engine(ENGINES["none"]) as ours:
        told, answers = stock("answer", asked), ours("answer", asked)
    furthest, equal = 0.0, 0
    for (tokens, logprobs), (stock_tokens, stock_logprobs) in zip(answers, told, strict=True):
        same = np.array(tokens) == np.array(stock_tokens)
        equal += bool(same.all())
        until = len(same) if same.all() else int(same.argmin())
        apart = np.abs(np.array(logprobs) - np.array(stock_logprobs))[:until]
        furthest = max(furthest, float(apart.max(initial=0)))
    return {
        "prompts": len(asked),
        "prompt_tokens": {"least": len(asked[0][0]), "most": len(asked[-1][0])},
        "new_tokens": len(told[0][0]),
        "prompts_with_equal_tokens": equal,
        "max_logprob_difference": furthest,
    }


def loads(
    engines: dict[str, dict[str, Any] | None], ids: list[int], count: int, rounds: int
) -> dict[str, Any]:
    random = np.random.default_rng(0)
    asked = requests_of(ids, random.integers(*PROMPTS, count), random.integers(*ANSWERS, count))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADED}
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        up = {
            name: stack.enter_context(
                engine(engines[name], block_size=LOAD_BLOCK, kv_cache_memory_bytes=LOAD_POOL)
            )
            for name in LOADED
        }
        memory = {name: ask("capacity") for name, ask in up.items()}
        threads = {ask("threads") for ask in up.values()}
        for ask in up.values():
            ask("load", asked[:2])  # not counted: what is built or laid out at first use
            ask.waiting[:] = 0
        for _ in range(rounds):
            for name, ask in up.items():
                found[name].append(ask("load", asked))
        spun = max(used / waited for waited, used in (ask.waiting for ask in up.values()))
    share = float(np.median([of["decode_attention_share"] for of in found["stock"]]))
    report: dict[str, Any] = {}
    for name, of_rounds in found.items():
        bytes_ratio = memory["stock"]["blocks"] / memory[name]["blocks"]
        report[name] = {key: spread([of[key] for of in of_rounds]) for key in of_rounds[0]} | {
            "times_stock": {
                key: spread(
                    [
                        of[key] / stock[key]
                        for of, stock in zip(of_rounds, found["stock"], strict=True)
                    ]
                )
                for key in (
                    "tokens_per_second",
                    "decode_tokens_per_second",
                    "decode_batch",
                    "decode_attention_seconds_a_token",
                )
            },
            "bytes_over_stock": round(bytes_ratio, 3),
            "bounds_of_decode": {
                "equal_batch": round(1 / (1 - share * (1 - bytes_ratio)), 3),
                "batch_limited_by_memory": round(1 / bytes_ratio, 3),
            },
        }
    return {
        "engines": report,
        "requests": count,
        "prompt_tokens": sum(len(prompt) for prompt, _ in asked),
        "new_tokens": sum(n for _, n in asked),
        "block_size": LOAD_BLOCK,
        "pool_bytes": LOAD_POOL,
        "rounds": rounds,
        "threads": sorted(threads),
        "most_of_a_core_while_waiting": round(float(spun), 4),
        "load_average": {"before": before, "after": os.getloadavg()[0]},
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median over rounds, with the lowest and the highest."""
    found = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{x:.4g}") for name, x in found.items()}


def show(report: dict[str, Any]) -> None:
    for size, engines in report["capacity"].items():
        for name, of in engines.items():
            print(
                f"blocks of {size:4} {name:20} {of['blocks']:5} x{of['times_the_blocks']:.2f}   "
                + "   ".join(
                    f"{of['sequences'][tokens]:6.2f} of {tokens} x{times:.2f}"
                    for tokens, times in of["times_the_sequences"].items()
                )
            )
    told = report["identity"]
    print(
        f"none = stock: {told['prompts_with_equal_tokens']} of {told['prompts']} prompts, "
        f"log-probabilities to {told['max_logprob_difference']:.1e}"
    )
    for name, of in report.get("load", {"engines": {}})["engines"].items():
        times, bounds = of["times_stock"], of["bounds_of_decode"]
        print(
            f"load {name:20} x{times['tokens_per_second']['median']:.2f} tokens/s, decode "
            f"x{times['decode_tokens_per_second']['median']:.2f} (bounds "
            f"{bounds['batch_limited_by_memory']:.2f}, at equal batch "
            f"{bounds['equal_batch']:.2f}), batch {of['decode_batch']['median']:.1f}, attention "
            f"{of['decode_attention_share']['median']:.0%} of decode, "
            f"{of['preemptions']['median']:.0f} preemptions"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="gzipped text of the prompts")
    parser.add_argument("--calibration", type=Path, required=True, help="gzipped, of the masks")
    parser.add_argument("--requests", type=int, default=32, help="of the load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-load", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before anything here or in the engines brings torch in

    from transformers import AutoTokenizer

    with gzip.open(args.calibration, "rt", encoding="utf-8") as file:
        calibration = file.read()
    with gzip.open(args.text, "rt", encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(model())(file.read(400_000)).input_ids
    with TemporaryDirectory() as folder:
        engines = with_masks(calibrated(calibration, Path(folder)))
        report = {
            "pool_bytes": POOL,
            "capacity": capacities(engines),
            "identity": identity(ids),
        }
        if not args.skip_load:
            report["load"] = loads(engines, ids, args.requests, args.rounds)
    report["provenance"] = provenance(seed=0)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "serving.json", report)
    show(report)


if __name__ == "__main__":
    main()
