"""How long a decode step's attention takes over pruned pages, and over whole ones of others.

    python benchmarks/kv/attention.py --dtype bfloat16
    python benchmarks/kv/attention.py --dtype float32 --heads 9 --kv-heads 3 --head-size 64

Sequences of random tokens, one query each. Every path reads the same number of tokens through as
many threads: our kernel with nothing dropped (`dense`), ThinK's channels and Mustafar's entries at
some ratios, torch's attention over contiguous float32, and vLLM's own kernel on the CPU where vllm
can be imported. A path goes through several layers in turn, which together are at least four times
the cache. Rounds go through all paths in turn, and ratios are taken within a round, so that a noisy
machine wrongs none; one thread is timed by the processor's clock, which others' work does not turn.
Writes results/attention-*.json.
"""

import argparse
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune.kv import pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.kernels import cpu
from rag_prune.kv.spec import PageSpec
from rag_prune.kv.think import best_channels

HERE = Path(__file__).parent / "results"
BASE = ("dense", "sdpa_float32", "vllm")
PRUNED: dict[str, dict[str, Any]] = {
    "think .25": {"key_ratio": 0.25},
    "think .4": {"key_ratio": 0.4},
    "think .5": {"key_ratio": 0.5},
    "think .6": {"key_ratio": 0.6},
    "think .5, values .5": {"key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar .5": {"method": "mustafar", "key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar .7": {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7},
}

Path_ = Callable[[int], Tensor]  # the attention of one layer


def cache_bytes() -> int:
    """The last level that the first core sees, as Linux says; 0 where it does not."""
    try:
        found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        return int(found[-1].read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError, IndexError):
        return 0


class Step:
    """What all paths are given: queries [batch, heads, D], and keys and values of every token."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dtype = getattr(torch, args.dtype)
        self.batch, self.tokens, self.block = args.batch, args.tokens, args.block_size
        self.size, self.kv_heads = args.head_size, args.kv_heads
        self.scale = self.size**-0.5
        self.queries = torch.randn(self.batch, args.heads, self.size).to(self.dtype)
        shape = (self.batch, self.tokens, self.kv_heads, self.size)
        self.keys, self.values = (
            torch.randn(shape).to(self.dtype),
            torch.randn(shape).to(self.dtype),
        )
        of_a_layer = 2 * self.keys.numel() * self.dtype.itemsize
        self.layers = max(2, -(-4 * cache_bytes() // of_a_layer))
        self.lengths = torch.full((self.batch,), self.tokens, dtype=torch.int32)
        per_row = -(-self.tokens // self.block)
        # As a server hands pages out: not in order.
        self.table = torch.randperm(self.batch * per_row).int().view(self.batch, per_row)

    @property
    def slots(self) -> Tensor:
        """Where each token lies in a pool of blocks, [batch, tokens]."""
        positions = torch.arange(self.tokens)
        return self.table[:, positions // self.block].long() * self.block + positions % self.block


def ours(step: Step, **options: Any) -> tuple[Path_, int]:
    """Our kernel, and the bytes of a layer's pages."""
    spec = PageSpec.of(
        KVPruneConfig(**options),
        head_size=step.size,
        block_size=step.block,
        itemsize=step.dtype.itemsize,
    )
    blocks = step.table.numel()
    store = pages.Storage(
        spec,
        step.dtype,
        torch.zeros(blocks, step.kv_heads, spec.page_bytes, dtype=torch.uint8),
        torch.zeros(step.batch, step.kv_heads, spec.ring_slots * spec.slot_bytes, dtype=torch.uint8)
        if spec.prunes
        else None,
    )
    if spec.thin_keys:
        channels = best_channels(torch.rand(step.kv_heads, step.size), spec.kept_keys)
        pages.set_ids(store, torch.arange(blocks), channels)
    rings = torch.arange(step.batch, dtype=torch.int32)[:, None]
    for row in range(step.batch):
        cpu.write(
            store,
            step.slots[row] // step.block,
            torch.arange(step.tokens),
            step.lengths[row].expand(step.tokens),
            rings[row].expand(step.tokens, 1),
            step.keys[row],
            step.values[row],
        )
    layers = [
        pages.Storage(spec, step.dtype, store.pages.clone(), store.ring) for _ in range(step.layers)
    ]

    def run(layer: int) -> Tensor:
        return cpu.decode(layers[layer], step.queries, step.table, step.lengths, rings, step.scale)

    return run, store.pages.numel()


def sdpa(step: Step) -> Path_:
    queries = step.queries.float()[:, :, None]
    layers = [
        [x.transpose(1, 2).float().contiguous().clone() for x in (step.keys, step.values)]
        for _ in range(step.layers)
    ]

    def run(layer: int) -> Tensor:
        keys, values = layers[layer]
        return scaled_dot_product_attention(
            queries, keys, values, scale=step.scale, enable_gqa=True
        )[:, :, 0]

    return run


def vllm(step: Step) -> Path_:
    """As its backend CPU_ATTN calls it; the schedule, made once for all layers, is not timed."""
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends import cpu_attn

    isa = cpu_attn._get_attn_isa(step.dtype, step.block, step.size)
    starts = torch.arange(step.batch + 1, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=step.batch,
        num_heads=step.queries.shape[1],
        num_kv_heads=step.kv_heads,
        head_dim=step.size,
        seq_lens=step.lengths,
        dtype=step.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    shape = (step.table.numel(), step.kv_heads, 2 * step.block, step.size)
    cache = torch.zeros(shape, dtype=step.dtype)
    ops.cpu_attn_reshape_and_cache(
        step.keys.flatten(0, 1),
        step.values.flatten(0, 1),
        *cache.chunk(2, dim=2),
        step.slots.flatten(),
        isa,
    )
    layers = [cache.clone() for _ in range(step.layers)]

    def run(layer: int) -> Tensor:
        keys, values = layers[layer].chunk(2, dim=2)
        out = torch.empty_like(step.queries)
        ops.cpu_attention_with_kv_cache(
            query=step.queries,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=step.lengths,
            scale=step.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step.table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return out

    return run


def timed(path: Path_, layers: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for layer in range(layers):
        path(layer)
    return (clock() - started) / layers


def spread(values: np.ndarray) -> dict[str, float]:
    """The median, and the quartiles beside it."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": round(middle, 3), "p25": round(low, 3), "p75": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128, help="vLLM's on the CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--build", choices=cpu.available(), default=cpu.available()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = Step(args)
    library = cpu.load(step.dtype, args.build)
    cpu._kernels = lambda dtype: library  # type: ignore[assignment]

    paths: dict[str, Path_] = {}
    sizes: dict[str, int] = {}
    paths["dense"], sizes["dense"] = ours(step, method="none")
    for name, options in PRUNED.items():
        paths[name], sizes[name] = ours(step, **options)
    paths["sdpa_float32"] = sdpa(step)
    if find_spec("vllm"):
        paths["vllm"] = vllm(step)

    exact = paths["sdpa_float32"](0)
    apart = {
        name: round(float((paths[name](0).float() - exact).abs().max()), 6)
        for name in BASE
        if name in paths
    }
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    before = os.getloadavg()[0]
    for _ in range(args.rounds):
        for name, path in paths.items():
            seconds[name].append(timed(path, step.layers))

    def ratios(base: str) -> dict[str, Any]:
        slow = np.array(seconds[base])
        return {name: spread(slow / np.array(s)) for name, s in seconds.items() if name != base}

    report = {
        "attention": {
            name: value for name, value in vars(args).items() if name not in ("out", "rounds")
        },
        "layers": step.layers,
        "milliseconds_of_a_layer": {
            name: {"median": round(float(np.median(s)) * 1e3, 3), "min": round(min(s) * 1e3, 3)}
            for name, s in seconds.items()
        },
        "times_as_fast_as": {base: ratios(base) for base in BASE if base in paths},
        "bytes_over_dense": {name: round(n / sizes["dense"], 3) for name, n in sizes.items()},
        "dense_bytes_of_all_layers": sizes["dense"] * step.layers,
        "last_level_cache_bytes": cache_bytes(),
        "furthest_from_sdpa": apart,
        "rounds": args.rounds,
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "provenance": provenance(seed=0),
    }
    name = f"{args.dtype}-{args.heads}-{args.kv_heads}-{args.head_size}-{args.build}-{args.threads}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"attention-{name}.json", report)
    for path_name, of in report["milliseconds_of_a_layer"].items():
        faster = [
            f"{base} {given.get(path_name, {'median': 1.0})['median']:.2f}"
            for base, given in report["times_as_fast_as"].items()
        ]
        print(f"{path_name:20} {of['median']:8.2f} ms {of['min']:8.2f}   over {', '.join(faster)}")


if __name__ == "__main__":
    main()
