"""Pruned caches in transformers against the definition, and at ratio 0 against DynamicCache."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DynamicCache, MistralConfig

from kv_oracle import oracle_logits, tiny_llama
from prune_core.errors import CheckpointError, InputError
from rag_prune.kv import (
    KVPruneConfig,
    MustafarCache,
    SnapKV,
    ThinKCache,
    ThinKPress,
    calibrate_masks,
    enable_kv_pruning,
    pages,
)
from rag_prune.kv.masks import load_masks, model_fingerprint

WINDOW = {"recent": 20, "sinks": 3}


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def masks(model, tmp_path):
    """A file of random scores for the tiny model, and the scores."""
    scores = torch.rand(3, 2, 32, generator=torch.Generator().manual_seed(5))
    told = {"format": "prunekit-kv-masks-1", "model": model_fingerprint(model.config)}
    save_file({"scores": scores}, tmp_path / "masks.safetensors", told)
    return tmp_path / "masks.safetensors", scores


def tokens(batch, count, seed=0):
    return torch.randint(2, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def by_cache(model, cache, ids, calls, attention_mask=None):
    """Logits of all tokens, which come in calls of so many tokens each."""
    found, start = [], 0
    for count in calls:
        part = slice(start, start + count)
        mask = None if attention_mask is None else attention_mask[:, : part.stop]
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, part]
        out = model(
            ids[:, part], past_key_values=cache, attention_mask=mask, position_ids=positions
        )
        found.append(out.logits)
        start += count
    assert start == ids.shape[1]
    return torch.cat(found, 1)


RULES = [
    {"method": "think", "policy": "prompt"},
    {"method": "think", "policy": "static"},
    {"method": "think", "policy": "causal", "obs_window": 8},
    {"method": "think", "policy": "prompt", "value_ratio": 0.5},
    {"method": "think", "key_ratio": 0.0, "value_ratio": 0.6},
    {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7},
    {"method": "mustafar", "key_ratio": 0.5, "value_ratio": 0.0},
]


def named(rule):
    return "-".join(str(value) for value in rule.values())


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_every_rule_is_its_definition(model, masks, rule):
    path, scores = masks
    static = {"masks": path} if rule.get("policy") == "static" else {}
    ids = tokens(2, 120)
    new_cache = enable_kv_pruning(model, KVPruneConfig(**rule, **WINDOW, **static))
    found = by_cache(model, new_cache(), ids, [90, *[1] * 30])
    wanted = oracle_logits(model, ids, prompt=90, scores=scores, **rule, **WINDOW)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    whole = model(ids).logits
    assert (found - whole)[:, 100:].abs().max() > 0.01  # something was pruned


@pytest.mark.parametrize("rule", [RULES[1], RULES[5]], ids=named)
def test_chunks_and_turns_change_nothing(model, masks, rule):
    static = {"masks": masks[0]} if rule.get("policy") == "static" else {}
    ids = tokens(1, 150)
    new_cache = enable_kv_pruning(model, KVPruneConfig(**rule, **WINDOW, **static))
    whole = by_cache(model, new_cache(), ids, [150])
    for calls in ([1] * 150, [7, 50, 1, 1, 30, 61], [149, 1], [16, 16, 118]):
        torch.testing.assert_close(
            by_cache(model, new_cache(), ids, calls), whole, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_padded_row_is_the_row_alone(model, masks, rule):
    static = {"masks": masks[0]} if rule.get("policy") == "static" else {}
    ids, mask = tokens(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[1, :37] = 0
    mask[2, :5] = 0
    new_cache = enable_kv_pruning(model, KVPruneConfig(**rule, **WINDOW, **static))
    found = by_cache(model, new_cache(), ids, [80, *[1] * 20], mask)
    for row, first in enumerate((0, 37, 5)):
        alone = by_cache(model, new_cache(), ids[row : row + 1, first:], [80 - first, *[1] * 20])
        torch.testing.assert_close(found[row : row + 1, first:], alone, atol=2e-4, rtol=1e-4)


def generate(model, ids, cache, **options):
    mask = (ids != 0).long()
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, **options
    )


@pytest.mark.parametrize("method", ["think", "mustafar", "none"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 32}], ids=str)
def test_ratio_0_is_the_dynamic_cache(model, method, options):
    ids = tokens(2, 70)
    ids[1, :23] = 0
    wanted = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=40, **options)
    config = KVPruneConfig(method=method, key_ratio=0.0, **WINDOW)
    new_cache = enable_kv_pruning(model, config)
    assert (generate(model, ids, new_cache(), max_new_tokens=40, **options) == wanted).all()


def test_other_caches_read_as_before(model):
    ids = tokens(2, 50)
    ids[0, :9] = 0
    wanted = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=20)
    enable_kv_pruning(model, KVPruneConfig())
    found = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=20)
    assert (found == wanted).all()


def test_rows_follow_the_beams(model):
    ids = tokens(3, 90)
    new_cache = enable_kv_pruning(
        model, KVPruneConfig(method="mustafar", value_ratio=0.5, **WINDOW)
    )
    order = torch.tensor([2, 0, 0])
    cache = new_cache()
    by_cache(model, cache, ids, [90])
    cache.reorder_cache(order)
    straight = new_cache()
    by_cache(model, straight, ids[order], [90])
    more = tokens(3, 30, seed=1)
    torch.testing.assert_close(
        by_cache(model, cache, more, [1] * 30), by_cache(model, straight, more, [1] * 30)
    )
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert by_cache(model, cache, more[:2], [30]).shape[0] == 2


@pytest.mark.parametrize("back", [1, 5, 16])
def test_cropped_tokens_leave_no_trace(model, back):
    ids = tokens(1, 130)
    new_cache = enable_kv_pruning(
        model, KVPruneConfig(method="mustafar", value_ratio=0.5, **WINDOW)
    )
    cache = new_cache()
    by_cache(model, cache, torch.cat([ids[:, :100], tokens(1, back, seed=3)], 1), [100, back])
    cache.crop(100)
    assert cache.get_seq_length() == 100
    straight = new_cache()
    by_cache(model, straight, ids[:, :100], [100])
    torch.testing.assert_close(
        by_cache(model, cache, ids[:, 100:], [1] * 30),
        by_cache(model, straight, ids[:, 100:], [1] * 30),
    )


def test_cropping_beyond_what_is_whole_is_refused(model):
    new_cache = enable_kv_pruning(model, KVPruneConfig(**WINDOW))
    cache = new_cache()
    by_cache(model, cache, tokens(1, 200), [200])
    with pytest.raises(InputError, match="at most 16 tokens, got 100"):
        cache.crop(100)
    assert cache.get_seq_length() == 200
    cache.crop(-3)
    assert cache.get_seq_length() == 197
    with pytest.raises(InputError, match="at most 16 tokens"):
        cache.crop(165)  # 3 have been taken back before
    with pytest.raises(InputError, match="at most 16 tokens"):
        cache.crop(2)
    with pytest.raises(InputError, match="cannot be cropped to -3"):
        cache.crop(-200)


def test_bytes_are_those_of_the_arithmetic(model):
    ids = tokens(2, 333)
    for config, most in (
        (KVPruneConfig(**WINDOW), 0.85),
        (KVPruneConfig(method="mustafar", key_ratio=0.7, value_ratio=0.7, **WINDOW), 0.6),
    ):
        new_cache = enable_kv_pruning(model, config)
        cache = new_cache()
        assert cache.nbytes() == 0
        by_cache(model, cache, ids, [333])
        spec = cache.layers[0].store.spec
        pages_of = -(-333 // 16) * spec.page_bytes
        ring = spec.ring_slots * spec.slot_bytes
        assert cache.nbytes() == 3 * 2 * 2 * (pages_of + ring)  # layers, rows, heads
        assert cache.nbytes() < most * 333 * spec.dense_token_bytes * 12


def test_the_other_methods_cache_is_refused(model):
    with pytest.raises(InputError, match="for method 'think', got 'mustafar'"):
        ThinKCache(model.config, KVPruneConfig(method="mustafar"))
    with pytest.raises(InputError, match="for method 'mustafar', got 'think'"):
        MustafarCache(model.config, KVPruneConfig())


def test_a_model_without_our_attention_is_told_so(model):
    with pytest.raises(InputError, match="call enable_kv_pruning"):
        model(tokens(1, 10), past_key_values=ThinKCache(model.config, KVPruneConfig()))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MistralConfig(sliding_window=64, hidden_size=64, num_attention_heads=2), "full attention"),
        (DeepseekV3Config(), "latent attention"),
        (tiny_llama(head_dim=24).config, "multiple of 16"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(config, sentence):
    with pytest.raises(InputError, match=sentence):
        ThinKCache(config, KVPruneConfig())


def test_a_mask_of_pairs_is_refused(model):
    new_cache = enable_kv_pruning(model, KVPruneConfig())
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    with pytest.raises(InputError, match="causal over one sequence a row"):
        model(tokens(1, 10), past_key_values=new_cache(), attention_mask=mask)


# ------------------------------------------------------------------------------ eviction
def test_evicted_tokens_are_gone_and_the_rest_is_exact(model):
    """Against a DynamicCache that holds the same tokens."""
    ids = tokens(2, 100)
    ids[1, :30] = 0
    mask = (ids != 0).long()
    snap = SnapKV(tokens=40, window=8)
    new_cache = enable_kv_pruning(model, KVPruneConfig(method="none"), eviction=snap)
    cache, dense = new_cache(), DynamicCache(config=model.config)
    by_cache(model, cache, ids, [100], mask)
    by_cache(model, dense, ids, [100], mask)
    assert cache.get_seq_length() == 100
    for layer, other in zip(cache.layers, dense.layers, strict=True):
        assert layer.lengths == [40, 40]
        for row, head in ((0, 0), (1, 1)):
            stored = pages.read(layer.store, layer.table[row])[0][head, :40]
            kept = torch.isclose(other.keys[row, head][:, None], stored, atol=1e-4).all(-1).any(1)
            assert kept.sum() == 40
            assert kept[-8:].all()
    one = tokens(2, 1, seed=9)
    at = (mask.sum(1, keepdim=True)).long()
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    out = model(one, past_key_values=cache, attention_mask=more, position_ids=at)
    assert out.logits.isfinite().all()
    assert cache.get_seq_length() == 101


def test_eviction_then_channels(model):
    ids = tokens(1, 200)
    snap = SnapKV(tokens=64, window=16)
    new_cache = enable_kv_pruning(model, KVPruneConfig(**WINDOW), eviction=snap)
    cache = new_cache()
    found = generate(model, ids, cache, max_new_tokens=30)
    assert found.shape[1] == 230
    assert cache.layers[0].lengths == [64 + 29]
    with pytest.raises(InputError, match="evicted"):
        cache.crop(150)


def test_snapkv_scores_are_the_published_ones():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16)
    snap = SnapKV(tokens=20, window=8, kernel=5)
    found = snap.select(q, k, 0.25)
    for row in range(2):
        for head in range(2):
            scores = torch.zeros(42)
            for g in (2 * head, 2 * head + 1):
                for t in range(42, 50):
                    logits = (k[row, head, : t + 1] @ q[row, g, t]) * 0.25
                    scores += logits.softmax(-1)[:42]
            pooled = torch.stack([scores[max(0, i - 2) : i + 3].max() for i in range(42)])
            wanted = pooled.argsort(descending=True, stable=True)[:12].sort().values
            assert found[row, head].tolist() == [*wanted.tolist(), *range(42, 50)]
    assert snap.select(q[:, :, :20], k[:, :, :20], 0.25) is None


@pytest.mark.parametrize("wrong", [{"tokens": 32}, {"tokens": 64, "kernel": 4}], ids=str)
def test_snapkv_refuses(wrong):
    with pytest.raises(InputError, match="SnapKV"):
        SnapKV(**wrong)


# ------------------------------------------------------------------------------ masks and press
class Words:
    """As much of a tokenizer as calibration asks for."""

    def __call__(self, text, add_special_tokens):
        return type("Encoding", (), {"input_ids": [2 + hash(w) % 90 for w in text.split()]})


def test_calibrated_masks_serve_every_ratio(model, tmp_path):
    text = " ".join(str(i * i) for i in range(700))
    path = calibrate_masks(
        model, Words(), [text, "short"], tmp_path / "m.safetensors", tokens=128, progress=False
    )
    assert model.config._attn_implementation != "prunekit_kv_calibration"
    scores = load_masks(path, model_fingerprint(model.config))
    assert scores.shape == (3, 2, 32)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, 2))
    for ratio in (0.25, 0.5):
        cache = ThinKCache(
            model.config, KVPruneConfig(key_ratio=ratio, policy="static", masks=path)
        )
        assert cache.layers[0].static.shape == (2, 32 - int(32 * ratio))


def test_masks_that_do_not_fit_are_refused(model, masks, tmp_path):
    path, _ = masks
    other = tiny_llama(num_hidden_layers=2)
    config = KVPruneConfig(policy="static", masks=path)
    with pytest.raises(InputError, match="another family or geometry"):
        ThinKCache(other.config, config)
    save_file({"scores": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("foreign", "broken", "absent"):
        bad = KVPruneConfig(policy="static", masks=tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match="KV masks"):
            ThinKCache(model.config, bad)
    with pytest.raises(InputError, match="at least 64 tokens"):
        calibrate_masks(model, Words(), ["too short"], tmp_path / "n", progress=False)
    assert not (tmp_path / "n").exists()


def test_the_press_stores_what_kvpress_zeroes(model):
    """kvpress zeroes the int(D · ratio) lowest scores of the last queries over the prompt."""
    ids = tokens(1, 120)
    dense = DynamicCache(config=model.config)
    seen = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, __, out, i=i: seen.__setitem__(i, out)
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        model(ids, past_key_values=dense)
        for hook in hooks:
            hook.remove()
        cos, sin = model.model.rotary_emb(seen[0], torch.arange(120)[None])
        cache = DynamicCache(config=model.config)
        with ThinKPress(key_channel_compression_ratio=0.4, window_size=32)(model):
            model(ids, past_key_values=cache)
    for i, (layer, other) in enumerate(zip(cache.layers, dense.layers, strict=True)):
        q = seen[i].view(1, 120, 4, 32).transpose(1, 2)
        half = torch.cat([-q[..., 16:], q[..., :16]], -1)
        q = (q * cos[:, None] + half * sin[:, None])[:, :, -32:]
        scores = q.pow(2).mean(2).view(1, 2, 2, 32).mean(2) * other.keys.pow(2).mean(2)
        lost = scores.topk(int(32 * 0.4), dim=-1, largest=False).indices
        zeroed = other.keys.scatter(-1, lost[:, :, None].expand(-1, -1, 120, -1), 0)
        stored = pages.read(layer.store, layer.table[0])[0][None, :, :120]
        torch.testing.assert_close(stored, zeroed)
    assert cache.nbytes() > 0
    assert ThinKPress(0.4).compression_ratio == 0.2


def test_the_press_makes_caches_and_leaves_no_hook(model):
    ids = tokens(1, 120)
    press = ThinKPress(key_channel_compression_ratio=0.5)
    with press(model):
        out = generate(model, ids, None, max_new_tokens=4, return_dict_in_generate=True)
        assert out.past_key_values.nbytes() > 0
        with pytest.raises(ValueError, match="stop"), press(model):
            raise ValueError("stop")
    assert not model.base_model._forward_pre_hooks
    out = generate(model, ids, None, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, DynamicCache)


@torch.inference_mode()
def test_nothing_is_read_beyond_the_length(model):
    """Pages hold what was cropped until it is overwritten; it must not be seen."""
    new_cache = enable_kv_pruning(model, KVPruneConfig(method="mustafar", **WINDOW))
    found = []
    for rubbish in (0, 255):
        cache = new_cache()
        by_cache(model, cache, tokens(1, 40), [40])
        cache.crop(33)
        for layer in cache.layers:
            spec = layer.store.spec
            keys = layer.store.pages[-1, :, : spec.values_offset]
            bitmaps = spec.block_size * spec.head_size // 8
            keys[:, bitmaps:].unflatten(-1, (spec.block_size, -1))[:, 2:] = rubbish
        found.append(by_cache(model, cache, tokens(1, 1, seed=4), [1]))
    assert found[0].isfinite().all()
    assert (found[0] == found[1]).all()


def test_turns_with_padding_between(model):
    """The second turn's rows differ in length: padding lies in the middle of what came in."""
    first, second = tokens(2, 60), tokens(2, 25, seed=1)
    mask = torch.ones(2, 85, dtype=torch.long)
    mask[0, :11] = 0
    mask[1, 60:68] = 0
    ids = torch.cat([first, second], 1)
    new_cache = enable_kv_pruning(
        model, KVPruneConfig(method="mustafar", value_ratio=0.5, **WINDOW)
    )
    found = by_cache(model, new_cache(), ids, [60, 25], mask)
    for row in range(2):
        real = mask[row].bool()
        alone = by_cache(model, new_cache(), ids[row : row + 1, real], [int(real.sum())])
        torch.testing.assert_close(found[row, real], alone[0], atol=2e-4, rtol=1e-4)
