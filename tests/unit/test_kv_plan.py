"""The plan of KV pruning: numbers worked by hand, and a sentence for whatever cannot be planned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_core.errors import CheckpointError, InputError, UnknownName
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.plan import Model, memory_bytes, plan, report

ROOT = Path(__file__).parents[2]
LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
THINK = KVPruneConfig()
MUSTAFAR = KVPruneConfig(method="mustafar", key_ratio=0.7, value_ratio=0.7)
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A model's folder: a config with fields changed (None takes one out), and files beside it."""

    def make(config: dict[str, Any] = LLAMA_8B, /, **changes: Any) -> Path:
        fields = {k: v for k, v in {**config, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return make


# ----------------------------------------------------------------------------------- by hand


def test_llama_8b_in_bfloat16(folder: Folder) -> None:
    got = plan(folder(), THINK, memory="80GB", context=8192)
    # 2 · 128256 · 4096 of embeddings; a layer has 4096 · (4096 + 1024) · 2 for attention,
    # 3 · 4096 · 14336 for the MLP and two norms; one norm at the end.
    parameters = 1_050_673_152 + 32 * (41_943_040 + 176_160_768 + 8192) + 4096
    assert parameters == 8_030_261_248
    assert (got.weights_bytes, got.weights_from) == (2 * parameters, "config.json")
    assert got.kv_bytes == 72_000_000_000 - 2 * parameters == 55_939_477_504

    heads = 32 * 8
    # Whole: 2 · 128 entries of 2 bytes.  426,784 tokens are 26,674 blocks of 2 MiB, and a sequence
    # takes 512 of them.
    assert got.dense.token_bytes == 512 * heads
    assert (got.dense.ring_bytes, got.dense.read_bytes) == (0, 8192 * 512 * heads)
    assert got.dense.tokens == 16 * (55_939_477_504 // 2**21) == 426_784
    assert got.dense.sequences == 26_674 // 512 == 52
    # ThinK: 16 · 64 key entries, 16 · 128 value entries and 64 ids are 6,208 bytes, 388 a token.
    assert got.pruned.token_bytes == 388 * heads
    # A slot: its position, and 64 entries; 4 sinks and 64 + 16 newest make 84. A page of 6,208
    # bytes holds 47, so the ring takes two.
    assert got.pruned.ring_bytes == 2 * 6208 * heads
    assert got.pruned.read_bytes == (8192 * 388 + 84 * 132) * heads
    blocks = 55_939_477_504 // (6208 * heads)
    assert (got.pruned.tokens, got.pruned.sequences) == (16 * blocks, blocks // (512 + 2))

    assert got.token_factor == pytest.approx(512 / 388)
    assert got.attention_speedup == pytest.approx(8192 * 512 / (8192 * 388 + 84 * 132))
    weights, whole = 2 * parameters, got.dense.read_bytes
    assert got.step_speedup(52) == pytest.approx(
        (weights + 52 * whole) / (weights + 52 * got.pruned.read_bytes)
    )
    assert got.throughput_factor == pytest.approx(
        (68 / (weights + 68 * got.pruned.read_bytes)) / (52 / (weights + 52 * whole))
    )
    assert got.kv_share == pytest.approx(52 * whole / (weights + 52 * whole))
    assert got.balance_tokens == 122_533  # the 16.06 GB of the weights in units of 131,072 bytes
    assert got.verdict.startswith("Memory-bound, it pays")


def test_mustafar_packs_each_token(folder: Folder) -> None:
    got = plan(folder(), MUSTAFAR, memory="80GB", context=8192)
    # Of 128 entries 128 − int(89.6) = 39 stay: 16 bytes of bitmap and 78 of entries, twice.
    assert got.pruned.token_bytes == 188 * 256
    # A slot: position and 178 entries, 360 bytes, of which a page of 3,008 bytes holds 8.
    assert got.pruned.ring_bytes == 11 * 3008 * 256
    assert got.pruned.sequences == 138


def test_smollm2_in_float32(folder: Folder) -> None:
    got = plan(folder(SMOLLM2), THINK, memory="1GiB", context=2048, dtype="float32", block_size=32)
    assert got.weights_bytes == 4 * 134_515_008
    heads = 30 * 3
    assert got.dense.token_bytes == 512 * heads
    # 32 · 32 key entries, 32 · 64 value entries and 32 ids: 385 bytes a token, of which vLLM makes
    # 388, whole entries of 4.
    assert got.pruned.token_bytes == 388 * heads
    # 84 slots of 4 + 32 · 4 bytes fit into one page of 12,416.
    assert got.pruned.ring_bytes == 12_416 * heads
    assert got.pruned.sequences == int(0.9 * 2**30 - 538_060_032) // (12_416 * heads) // 65


def test_a_cache_in_another_dtype_than_the_weights(folder: Folder) -> None:
    size = {"memory": "80GB", "context": 8192, "kv_dtype": "float32"}
    got = plan(folder(), THINK, **size)
    assert got.weights_bytes == 2 * 8_030_261_248
    assert got.dense.token_bytes == 1024 * 256


def test_dropping_nothing_changes_nothing(folder: Folder) -> None:
    got = plan(folder(), KVPruneConfig(method="none"), memory="80GB", context=8192)
    assert got.pruned == got.dense
    assert got.token_factor == got.throughput_factor == got.step_speedup(52) == 1
    assert got.verdict.startswith("It does not pay")


# ------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("memory", "context", "says"),
    [
        ("80GB", 8192, "Memory-bound, it pays"),
        ("24GiB", 8192, "Weights-bound"),
        ("80GB", 100, "It does not pay"),  # 84 of the 100 tokens are in the ring as well
        ("18GiB", 10_000, "It does not pay"),  # one sequence fits either way, beside the weights
        ("18GiB", 12_000, "It pays: whole, not one sequence of 12,000 tokens fits; pruned, 1."),
        ("18GiB", 100_000, "It does not help: not one sequence of 100,000 tokens fits"),
    ],
)
def test_the_verdict(folder: Folder, memory: str, context: int, says: str) -> None:
    got = plan(folder(), THINK, memory=memory, context=context)
    assert got.verdict.startswith(says)
    assert (got.throughput_factor is None) == (got.dense.sequences == 0)
    assert json.loads(json.dumps(got.to_dict()))["verdict"] == got.verdict


def test_full_memory_gains_the_inverse_of_the_bytes_whatever_the_weights(folder: Folder) -> None:
    for memory in ("40GB", "400GB"):
        got = plan(folder(), MUSTAFAR, memory=memory, context=4096)
        assert got.throughput_factor == pytest.approx(got.attention_speedup, rel=0.03)
        assert 1 < got.step_speedup(1) < got.step_speedup(50) < got.attention_speedup


def test_the_report_shows_every_plan_and_groups_verdicts(folder: Folder) -> None:
    plans = [
        plan(folder(), config, memory="18GiB", context=10_000)
        for config in (THINK, replace(THINK, value_ratio=0.5), MUSTAFAR)
    ]
    text, none = report(plans), replace(plans[0].dense, sequences=0)
    assert [each.label for each in plans] == [
        "ThinK 0.5",
        "ThinK 0.5 + values 0.5",
        "Mustafar 0.7/0.7",
    ]
    table = text.splitlines()[2:7]
    assert table[1].split() == ["dense", "131,072", "0", "10,176", "1"]
    assert table[4].split()[-3:] == ["×2.68", "×1.05", "×2.04"]
    assert [verdict[:33] for verdict in text.split("\n\n")[2:]] == [
        "ThinK 0.5: It does not pay: with ",
        "ThinK 0.5 + values 0.5: It does n",
        "Mustafar 0.7/0.7: Weights-bound: ",
    ]
    nowhere = [replace(each, context=10**6, dense=none, pruned=none) for each in plans]
    assert report(nowhere).split("\n\n")[2].startswith("It does not help: not one")
    short = report([plan(folder(), THINK, memory="18GiB", context=12_000)])
    assert short.splitlines()[4].split()[-3:] == ["×1.32", "–", "–"]
    assert short.splitlines()[-1].startswith("It pays")


# ------------------------------------------------------------------------------- the weights


def test_safetensors_are_weighed_and_turned_into_the_dtype(folder: Folder) -> None:
    path = folder(SMOLLM2, dtype="float32")
    (path / "model.safetensors").write_bytes(bytes(1000))
    assert Model.read(path, "float32").weights_bytes == 1000
    assert Model.read(path, "bfloat16").weights_bytes == 500
    index = {"metadata": {"total_size": 8000}, "weight_map": {}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    got = Model.read(path, "bfloat16")
    assert (got.weights_bytes, got.weights_from) == (4000, "safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"does not say metadata\.total_size"):
        Model.read(path)


def test_quantised_weights_stay_as_they_are(folder: Folder) -> None:
    path = folder(dtype="float32", quantization_config={"quant_method": "awq"})
    (path / "model.safetensors").write_bytes(bytes(1000))
    assert Model.read(path, "bfloat16").weights_bytes == 1000


def test_a_model_of_text_and_images_keeps_its_fields_in_a_section(folder: Folder) -> None:
    path = folder({"model_type": "both", "text_config": LLAMA_8B, "vision_config": {"depth": 2}})
    with pytest.raises(InputError, match=r"cannot be counted from its config \(vision_config\)"):
        Model.read(path)
    (path / "model.safetensors").write_bytes(bytes(1000))
    got = Model.read(path)
    assert (got.layers, got.kv_heads, got.head_size, got.weights_bytes) == (32, 8, 128, 1000)


def test_a_name_is_read_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaConfig

    def from_pretrained(name: str, **options: Any) -> LlamaConfig:
        assert (name, options) == ("org/model", {"trust_remote_code": False})
        return LlamaConfig(**LLAMA_8B)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    got = Model.read("org/model")
    assert (got.layers, got.kv_heads, got.head_size) == (32, 8, 128)
    assert got.weights_bytes == 2 * 8_030_261_248


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_lora_rank": 512}, "latent for all heads (MLA: kv_lora_rank)"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "it has layers of kind sliding_attention",
        ),
        ({"layer_types": ["linear_attention"]}, "it has layers of kind linear_attention"),
        ({"sliding_window": 4096}, "its layers attend to 4096 tokens (sliding_window), not to all"),
        ({"attention_chunk_size": 8192}, "8192 tokens (attention_chunk_size)"),
        ({"mamba_d_state": 16}, "keep a state instead of tokens (mamba_d_state)"),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}},
            "asks for a quantised cache (kv_cache_scheme)",
        ),
        ({"num_key_value_heads": None}, "must have num_key_value_heads, a whole number above 0"),
        ({"num_attention_heads": "32"}, "must have num_attention_heads"),
        ({"head_dim": 80.0}, "must have head_dim"),
        ({"head_dim": 576}, "The head size must be a multiple of 16 up to 256, got 576"),
        ({"head_dim": 40}, "The head size must be a multiple of 16 up to 256, got 40"),
        ({"num_local_experts": 8}, "cannot be counted from its config (num_local_experts)"),
        ({"intermediate_size": None}, "must have intermediate_size"),
    ],
)
def test_a_model_that_cannot_be_planned(folder: Folder, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(folder(**changes), THINK, memory="800GB", context=8192)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 32, "sliding_window": 4096},
        {"sliding_window": 131072, "use_sliding_window": False},
        {"layer_types": ["attention"] * 32, "mamba_d_state": None},
    ],
)
def test_a_window_that_no_layer_uses_is_no_matter(folder: Folder, changes: dict[str, Any]) -> None:
    assert plan(folder(**changes), THINK, memory="80GB", context=8192).dense.sequences == 52


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "17GB"}, "15.83 GiB of memory are too small for the weights of"),
        ({"context": 0}, "context must be a whole number of tokens above 0, got 0"),
        ({"block_size": 24}, "The block size must be a multiple of 16 tokens, got 24"),
        ({"kv_dtype": "fp8"}, "A cache in fp8 cannot be pruned: pages hold entries of 2 or 4"),
    ],
)
def test_options_that_cannot_be(folder: Folder, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(folder(), THINK, **{"memory": "80GB", "context": 8192, **options})
    assert says in str(caught.value)


def test_an_unknown_dtype(folder: Folder) -> None:
    with pytest.raises(UnknownName, match=r"dtype of the weights 'bfloat1'\. Did you mean"):
        Model.read(folder(), "bfloat1")


def test_a_slot_of_the_ring_must_fit_into_a_page(folder: Folder) -> None:
    most = KVPruneConfig(key_ratio=0.99, value_ratio=0.99)
    with pytest.raises(InputError, match=r"cannot hold a slot of the ring.*larger block size"):
        plan(folder(head_dim=256), most, memory="80GB", context=8192)
    assert plan(folder(head_dim=256), most, memory="80GB", context=8192, block_size=32)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "it has no config.json"), ("{", "is not valid JSON"), ("[]", "must be a JSON object")],
)
def test_a_folder_without_a_config(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        Model.read(tmp_path)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def from_pretrained(name: str, **options: Any) -> None:
        raise OSError(f"{name} is not there.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"'no/where' is neither a folder here nor a model"):
        Model.read("no/where")


# ------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24576MiB", 24 * 2**30),
        (" 24 gib ", 24 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("80GB", 80 * 10**9),
        ("0.5kB", 500),
        ("1TiB", 2**40),
        ("25769803776", 24 * 2**30),
        ("7B", 7),
        (123, 123),
    ],
)
def test_sizes(size: str | int, count: int) -> None:
    assert memory_bytes(size) == count


@pytest.mark.parametrize("size", ["", "0", "0GiB", "24G", "GiB", "-1GiB", "1,5GiB", "1e9", -5])
def test_sizes_that_are_none(size: str | int) -> None:
    with pytest.raises(InputError, match=r"must be a number above 0 with a unit, got"):
        memory_bytes(size)


def test_planning_for_a_folder_loads_no_model_library(folder: Folder) -> None:
    code = (
        "import sys; from rag_prune.kv.plan import *; from rag_prune.kv.config import *\n"
        "plan(sys.argv[1], KVPruneConfig(), memory='80GB', context=8192)\n"
        "print({'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(folder())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
