"""When pruning a KV cache pays: what fits into memory, how many bytes a step reads. Numbers only.

A step of decoding reads the weights once and the cache of every sequence in the batch, so it takes
at least (W + M) / bandwidth, with W bytes of weights and M bytes of cache. Pruning leaves a share r
of M. At the same batch a step is (W + M) / (W + r·M) times as fast; where memory caps the batch,
1 / r times as many sequences share a step that reads as much as before.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune_core.errors import CheckpointError, InputError, unknown_name
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.models import check_attention
from rag_prune.kv.spec import PageSpec

USABLE = (
    0.9  # share of the memory for weights and cache; the rest is for activations and the driver
)
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
WORTH = 1.05  # gain in tokens a second below which pruning is not worth what it loses
_UNITS = {
    prefix + unit: base**power
    for base, unit in ((1000, "b"), (1024, "ib"))
    for power, prefix in enumerate(("k", "m", "g", "t"), 1)
}


# ------------------------------------------------------------------------------ the model
@dataclass(frozen=True, kw_only=True)
class Model:
    """What the arithmetic needs of a model.

    layers, kv_heads, head_size: of its attention; every layer keeps all tokens.
    weights_bytes: once loaded.   weights_from: "safetensors" or "config.json".
    """

    layers: int
    kv_heads: int
    head_size: int
    weights_bytes: int
    weights_from: str

    @classmethod
    def read(cls, model: str | Path, dtype: str = "bfloat16") -> Model:
        """Read a folder's config.json, or a hub name's with transformers; never remote code.

        dtype: of the weights once loaded; quantised ones stay as they are.
        The weights' size is that of the folder's safetensors. Where there are none it is counted
        from the config as for Llama: gated MLPs, no biases, two embeddings unless it says tied.

        Raises CheckpointError where there is no config to be read, InputError for another dtype
        and for a model whose cache cannot be pruned or whose weights cannot be counted.
        """
        if dtype not in ITEMSIZE:
            raise unknown_name("dtype of the weights", dtype, ITEMSIZE)
        folder = Path(model)
        whole = _config_of(folder) if folder.is_dir() else _config_from_hub(str(model))
        # A model of text and images keeps what is asked for here in a section of its own.
        text = {**whole, **(whole.get("text_config") or {})}
        check_attention(str(model), text)
        heads = _count(model, text, "num_attention_heads")
        if text.get("head_dim") is None:
            size = _count(model, text, "hidden_size") // heads
        else:
            size = _count(model, text, "head_dim")
        layers, kv_heads = (
            _count(model, text, name) for name in ("num_hidden_layers", "num_key_value_heads")
        )
        weights = _stored_bytes(folder, text, dtype)
        return cls(
            layers=layers,
            kv_heads=kv_heads,
            head_size=size,
            weights_bytes=weights or _parameters(model, text, heads * size) * ITEMSIZE[dtype],
            weights_from="safetensors" if weights else "config.json",
        )


def _config_of(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model's folder: it has no config.json.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must be a JSON object.")
    return config


def _config_from_hub(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{name}' is neither a folder here nor a model on the hub whose config transformers "
            f"knows: name a folder that holds its config.json. {error}"
        ) from error
    fields: dict[str, Any] = config.to_dict()
    return fields


def _count(model: str | Path, config: Mapping[str, Any], name: str) -> int:
    count = config.get(name)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(
            f"The config of '{model}' must have {name}, a whole number above 0, got {count!r}: "
            f"the plan is for decoders like Llama, Mistral or Qwen."
        )
    return count


def _stored_bytes(folder: Path, config: Mapping[str, Any], dtype: str) -> int:
    """The folder's safetensors, as they will be in memory; 0 where there are none."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            stored = int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{index} does not say metadata.total_size: save the model again."
            ) from None
    else:
        stored = single.stat().st_size if single.is_file() else 0
    saved_as = config.get("dtype") or config.get("torch_dtype")
    if config.get("quantization_config") or saved_as not in ITEMSIZE:
        return stored
    return stored * ITEMSIZE[dtype] // ITEMSIZE[saved_as]


def _parameters(model: str | Path, config: Mapping[str, Any], query_size: int) -> int:
    unlike = [
        name
        for name in (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "quantization_config",
            "vision_config",
            "audio_config",
        )
        if config.get(name)
    ]
    if unlike:
        raise InputError(
            f"The weights of '{model}' cannot be counted from its config ({unlike[0]}): name a "
            f"folder that also holds model.safetensors, or its model.safetensors.index.json."
        )
    hidden, inner, vocabulary, layers, kv_heads = (
        _count(model, config, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_hidden_layers",
            "num_key_value_heads",
        )
    )
    kv_size = kv_heads * query_size // _count(model, config, "num_attention_heads")
    attention = 2 * hidden * query_size + 2 * hidden * kv_size
    embeddings = 1 if config.get("tie_word_embeddings") else 2
    layer = attention + 3 * hidden * inner + 2 * hidden
    return embeddings * vocabulary * hidden + layers * layer + hidden


# ------------------------------------------------------------------------------ the plan
@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one layout of pages comes to; bytes are of all layers and KV heads together.

    token_bytes: of a token in pages, rounded as vLLM rounds: up to whole entries.
    ring_bytes: of a sequence's ring, in whole blocks.
    read_bytes: what a step reads for one sequence of the context: its tokens and its ring.
    tokens: in whole blocks, if pages had all the memory.
    sequences: of the context, rings included.
    """

    token_bytes: int
    ring_bytes: int
    read_bytes: int
    tokens: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """What pruning a model's cache saves; `plan` makes it. All sizes are in bytes.

    memory_bytes: of the GPU, or what the CPU may give.   kv_bytes: what is left for the cache.
    context: tokens of each sequence.   block_size: tokens of a page.
    dense, pruned: the cache whole, and as `config` leaves it.
    """

    model: str
    config: KVPruneConfig
    weights_bytes: int
    weights_from: str
    memory_bytes: int
    kv_bytes: int
    context: int
    block_size: int
    dense: Fit
    pruned: Fit

    @property
    def label(self) -> str:
        """The method and its ratios: "ThinK 0.5", "ThinK 0.5 + values 0.5", "Mustafar 0.7/0.7"."""
        keys, values = self.config.key_ratio, self.config.value_ratio
        if self.config.method == "mustafar":
            return f"Mustafar {keys:g}/{values:g}"
        if self.config.method == "none":
            return "none"
        return f"ThinK {keys:g}" + (f" + values {values:g}" if values else "")

    @property
    def token_factor(self) -> float:
        """How many times as many tokens fit."""
        return self.dense.token_bytes / self.pruned.token_bytes

    @property
    def attention_speedup(self) -> float:
        """Of a step's attention, where reading the cache is all it waits for."""
        return self.dense.read_bytes / self.pruned.read_bytes

    def step_speedup(self, sequences: int) -> float:
        """Of a whole step with that many sequences, dense or pruned."""
        return self._read(self.dense, sequences) / self._read(self.pruned, sequences)

    @property
    def throughput_factor(self) -> float | None:
        """Of tokens a second, each cache with as many sequences as fit; None if none fits dense."""
        if not self.dense.sequences:
            return None
        rate = self.pruned.sequences / self._read(self.pruned, self.pruned.sequences)
        return rate / (self.dense.sequences / self._read(self.dense, self.dense.sequences))

    @property
    def kv_share(self) -> float:
        """The dense cache's share of what a step reads when memory is full of sequences."""
        whole = self._read(self.dense, self.dense.sequences)
        return 1 - self.weights_bytes / whole

    @property
    def balance_tokens(self) -> int:
        """Tokens in a batch from which on a step reads more dense cache than weights."""
        return -(-self.weights_bytes // self.dense.token_bytes)

    @property
    def verdict(self) -> str:
        """Whether it pays, in a sentence or two."""
        whole, pruned = self.dense.sequences, self.pruned.sequences
        factor = self.throughput_factor
        of_context = f"of {self.context:,} tokens"
        if not pruned:
            return (
                f"It does not help: not one sequence {of_context} fits, even pruned. Take a "
                f"shorter context, more memory or a larger ratio."
            )
        if factor is None:
            return f"It pays: whole, not one sequence {of_context} fits; pruned, {pruned:,}."
        reads = (
            f"with as many sequences {of_context} as fit whole, {whole:,}, the cache is "
            f"{self.kv_share:.0%} of the bytes that a step reads"
        )
        if factor < WORTH:
            return (
                f"It does not pay: {reads}, and pruning gives at most {factor:.2f} times the "
                f"tokens a second. Take a longer context, more memory or a larger ratio."
            )
        more = "more sequences share it" if pruned > whole else "no more sequences fit"
        if self.kv_share >= 0.5:
            return f"Memory-bound, it pays: {reads}. A step gets faster, and {more}."
        return (
            f"Weights-bound: {reads}, so less than half of a step gets faster. It pays mainly "
            f"where requests wait for memory, as more of them then share a step; the cache is half "
            f"of a step from {self.balance_tokens:,} tokens in a batch on."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON types; step_speedup is of as many sequences as fit dense."""
        masks = self.config.masks
        return asdict(self) | {
            "config": asdict(self.config) | {"masks": None if masks is None else str(masks)},
            "token_factor": self.token_factor,
            "attention_speedup": self.attention_speedup,
            "step_speedup": self.step_speedup(self.dense.sequences),
            "throughput_factor": self.throughput_factor,
            "kv_share": self.kv_share,
            "balance_tokens": self.balance_tokens,
            "verdict": self.verdict,
        }

    def _read(self, fit: Fit, sequences: int) -> int:
        return self.weights_bytes + sequences * fit.read_bytes


def plan(
    model: str | Path,
    config: KVPruneConfig,
    *,
    memory: str | int,
    context: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    block_size: int = 16,
) -> KVPlan:
    """Work out what `config` saves on one GPU, or one CPU's memory.

    model: a folder or a hub name.   memory: bytes, or a size such as "24GiB"; 0.9 of it is counted
    on, as serving leaves the rest to activations.   context: tokens of each sequence.
    dtype: of the weights.   kv_dtype: of the cache; that of the weights by default.
    block_size: tokens of a page: 16 on a GPU and 128 on a CPU in vLLM.

    Raises what `Model.read` does, and InputError for a size that cannot be read, a quantised cache,
    pages that cannot be, and memory that is too small for the weights.
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise InputError(f"context must be a whole number of tokens above 0, got {context!r}.")
    if (kv_dtype or dtype) not in ITEMSIZE:
        raise InputError(
            f"A cache in {kv_dtype or dtype} cannot be pruned: pages hold entries of 2 or 4 bytes. "
            f"Choose {', '.join(ITEMSIZE)}."
        )
    total = memory_bytes(memory)
    read = Model.read(model, dtype)
    left = int(total * USABLE) - read.weights_bytes
    if left <= 0:
        raise InputError(
            f"{gib(total)} of memory are too small for the weights of '{model}': they take "
            f"{gib(read.weights_bytes)} in {dtype}, and {USABLE:.0%} of the memory is "
            f"{gib(int(total * USABLE))}. Give more memory, that of all GPUs if "
            f"several share the model, or a narrower dtype."
        )
    itemsize = ITEMSIZE[kv_dtype or dtype]

    def fit(config: KVPruneConfig) -> Fit:
        spec = PageSpec.of(
            config, head_size=read.head_size, block_size=block_size, itemsize=itemsize
        )
        return _fit(spec, read.layers * read.kv_heads, left, context)

    return KVPlan(
        model=str(model),
        config=config,
        weights_bytes=read.weights_bytes,
        weights_from=read.weights_from,
        memory_bytes=total,
        kv_bytes=left,
        context=context,
        block_size=block_size,
        dense=fit(KVPruneConfig(method="none")),
        pruned=fit(config),
    )


def _fit(spec: PageSpec, heads: int, memory: int, context: int) -> Fit:
    """heads: KV heads of all layers.   memory: for the cache, in bytes."""
    token, ring_blocks = spec.served_token_bytes, spec.ring_blocks
    page = spec.block_size * token
    blocks = memory // (page * heads)
    return Fit(
        token_bytes=token * heads,
        ring_bytes=ring_blocks * page * heads,
        read_bytes=(context * token + spec.ring_slots * spec.slot_bytes) * heads,
        tokens=blocks * spec.block_size,
        sequences=blocks // (-(-context // spec.block_size) + ring_blocks),
    )


# ------------------------------------------------------------------------------ to read
def report(plans: Sequence[KVPlan]) -> str:
    """A table of plans that differ in their config, and their verdicts. At least one."""
    first = plans[0]
    lines = [
        f"{first.model}: {gib(first.weights_bytes)} of weights (from {first.weights_from}), "
        f"{gib(first.kv_bytes)} left for the cache of {gib(first.memory_bytes)} "
        f"({USABLE:.0%} counted on)",
        "",
    ]
    head = ["", "bytes/token", "ring/sequence", "tokens", f"sequences of {first.context:,}"]
    rows = [[*head, "attention", "step", "throughput"], ["dense", *_cells(first.dense)]]
    for each in plans:
        gained = (
            each.attention_speedup,
            each.step_speedup(first.dense.sequences) if first.dense.sequences else None,
            each.throughput_factor,
        )
        gains = ("–" if gain is None else f"×{gain:.2f}" for gain in gained)
        rows.append([each.label, *_cells(each.pruned), *gains])
    rows[1] += [""] * 3
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    verdicts: dict[str, list[str]] = {}
    for each in plans:
        verdicts.setdefault(each.verdict, []).append(each.label)
    for verdict, labels in verdicts.items():
        of = f"{', '.join(labels)}: " if len(verdicts) > 1 else ""
        lines += ["", *textwrap.wrap(of + verdict, 100)]
    return "\n".join(lines)


def _cells(fit: Fit) -> list[str]:
    return [f"{n:,}" for n in (fit.token_bytes, fit.ring_bytes, fit.tokens, fit.sequences)]


def memory_bytes(size: str | int) -> int:
    """The bytes of 25769803776, "25769803776", "24GiB", "24576 MiB" or "80GB".

    Raises InputError for anything else, and for none at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if found and (unit := {"": 1, "b": 1, **_UNITS}.get(found[2])):
        count = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
        if count:
            return count
    raise InputError(
        f"The size of the memory must be a number above 0 with a unit, got {size!r}: write 24GiB, "
        f"24576MiB, 80GB or the number of bytes."
    )


def gib(size: int) -> str:
    """A size to read: 14.96 GiB."""
    return f"{size / 2**30:.2f} GiB"
