"""What KV pruning may be asked for, and how it says no."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_core.errors import InputError, UnknownName
from rag_prune.kv.config import KVPruneConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_ratio": -0.1}, "key_ratio must be in [0, 1), the share of each head that is "),
        ({"key_ratio": 1}, "dropped, got 1."),
        ({"key_ratio": 1.0}, "dropped, got 1.0."),
        ({"key_ratio": float("nan")}, "got nan."),
        ({"key_ratio": "0.5"}, "got '0.5'."),
        ({"key_ratio": True}, "got True."),
        ({"value_ratio": 2}, "value_ratio must be in [0, 1), the share of each head that is "),
        ({"obs_window": 0}, "obs_window must be a whole number >= 1, got 0."),
        ({"recent": 0}, "recent must be a whole number >= 1, got 0."),
        ({"recent": 32.0}, "recent must be a whole number >= 1, got 32.0."),
        ({"sinks": -1}, "sinks must be a whole number >= 0, got -1."),
        ({"sinks": True}, "sinks must be a whole number >= 0, got True."),
        ({"policy": "static"}, "policy='static' needs masks: pass the path of a file that "),
        ({"masks": "m.safetensors"}, "masks='m.safetensors' is only read by method 'think' with "),
        ({"policy": "static", "key_ratio": 0, "masks": "m"}, "a key_ratio above 0: leave it out"),
        ({"method": "mustafar", "policy": "static", "masks": "m"}, "masks='m' is only read by"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(options, message):
    with pytest.raises(InputError) as error:
        KVPruneConfig(**options)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "thnk"}, "Unknown method of KV pruning 'thnk'. Did you mean 'think'? Known: "),
        ({"method": "Mustafar"}, "Did you mean 'mustafar'?"),
        ({"method": None}, "Unknown method of KV pruning None. Did you mean 'none'? Known: m"),
        ({"policy": "casual"}, "Unknown policy of KV pruning 'casual'. Did you mean 'causal'?"),
        ({"key_ration": 0.5}, "Unknown option of KV pruning 'key_ration'. Did you mean 'key_rati"),
        ({5: 0.5}, "Unknown option of KV pruning 5. Known: key_ratio, masks, method, obs_window, "),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(options, message):
    with pytest.raises(UnknownName) as error:
        KVPruneConfig.parse(options)
    assert message in str(error.value)


def test_options_are_read_as_they_are_written_in_json():
    read = KVPruneConfig.parse({"method": "mustafar", "key_ratio": 0, "value_ratio": 0.7})
    assert read == KVPruneConfig(method="mustafar", key_ratio=0, value_ratio=0.7)
    assert KVPruneConfig.parse({}) == KVPruneConfig()
    for other in (None, "think", [["method", "think"]]):
        with pytest.raises(InputError, match="must be an object like"):
            KVPruneConfig.parse(other)


@pytest.mark.parametrize(
    ("head_size", "ratio", "kept"),
    [(128, 0.4, 77), (64, 0.4, 39), (128, 0.5, 64), (128, 0.7, 39), (64, 0.0, 64), (16, 0.99, 1)],
)
def test_kept_is_what_the_published_count_of_dropped_ones_leaves(head_size, ratio, kept):
    config = KVPruneConfig(key_ratio=ratio, value_ratio=0.25)
    assert config.kept(head_size) == (kept, head_size * 3 // 4)
    assert KVPruneConfig(method="mustafar", key_ratio=ratio).kept(head_size)[0] == kept
    none = KVPruneConfig(method="none", key_ratio=ratio, value_ratio=ratio)
    assert none.kept(head_size) == (head_size, head_size)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 256))
def test_some_entry_is_always_kept(ratio, head_size):
    kept, _ = KVPruneConfig(key_ratio=ratio).kept(head_size)
    assert 1 <= kept <= head_size
