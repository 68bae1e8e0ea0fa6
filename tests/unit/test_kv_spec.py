"""Sizes of pages and rings, worked by hand and against real tensors; windows, against a list."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_core.errors import InputError
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.spec import PageSpec

LAYOUTS = [  # method, key and value ratio, head size, block, bytes of an entry
    ("think", 0.5, 0.0, 128, 16, 2),
    ("think", 0.4, 0.0, 64, 32, 4),
    ("think", 0.5, 0.5, 128, 16, 2),
    ("think", 0.0, 0.7, 64, 128, 2),
    ("mustafar", 0.5, 0.5, 128, 16, 2),
    ("mustafar", 0.7, 0.7, 64, 32, 4),
    ("mustafar", 0.4, 0.0, 128, 64, 2),
    ("mustafar", 0.0, 0.7, 80, 16, 2),
    ("none", 0.5, 0.5, 64, 16, 4),
]


def spec_of(method, key_ratio, value_ratio, head_size, block_size, itemsize, **options):
    config = KVPruneConfig(method=method, key_ratio=key_ratio, value_ratio=value_ratio, **options)
    return PageSpec.of(config, head_size=head_size, block_size=block_size, itemsize=itemsize)


@pytest.mark.parametrize(
    ("layout", "values_offset", "ids_offset", "token", "slot"),
    [
        # 64 · 16 · 2 = 2048;  + 128 · 16 · 2 = 6144;  + 64 ids = 6208 = 16 · 388;  4 + 64 · 2
        (LAYOUTS[0], 2048, 6144, 388, 132),
        # 39 · 32 · 4 = 4992;  + 64 · 32 · 4 = 13184;  + 39 ids = 13223 ≤ 32 · 414;  4 + 25 · 4
        (LAYOUTS[1], 4992, 13184, 414, 104),
        # 2048;  + 16 · (16 + 64 · 2) = 4352;  + 64 ids = 4416 = 16 · 276;  4 + 128 · 2
        (LAYOUTS[2], 2048, 4352, 276, 260),
        # 16 · (16 + 64 · 2) = 2304, twice = 16 · 288;  4 + 128 · 2
        (LAYOUTS[4], 2304, 4608, 288, 260),
        # 32 · (8 + 20 · 4) = 2816, twice = 32 · 176;  4 + 88 · 4
        (LAYOUTS[5], 2816, 5632, 176, 356),
        # 64 · (16 + 77 · 2) = 10880;  + 64 · 256 = 27264 = 64 · 426;  4 + 51 · 2, and 2 to spare
        (LAYOUTS[6], 10880, 27264, 426, 108),
    ],
)
def test_sizes_worked_by_hand(layout, values_offset, ids_offset, token, slot):
    spec = spec_of(*layout)
    assert spec.values_offset == values_offset
    assert spec.ids_offset == ids_offset
    assert (spec.token_bytes, spec.page_bytes) == (token, token * spec.block_size)
    assert spec.dense_token_bytes == 2 * spec.head_size * spec.itemsize
    assert spec.slot_bytes == slot
    assert spec.ring_slots == 4 + 64 + 16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_page_is_its_tensors_end_to_end(layout):
    method, _, _, size, block, itemsize = layout
    spec = spec_of(*layout)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    bitmap = torch.empty(block, size // 8, dtype=torch.uint8).nbytes
    keys = torch.empty(spec.kept_keys, block, dtype=dtype).nbytes
    values = torch.empty(block, spec.kept_values, dtype=dtype).nbytes
    if method == "mustafar" and spec.kept_keys < size:
        keys += bitmap
    if spec.kept_values < size:
        values += bitmap
    ids = spec.kept_keys if method == "think" and spec.kept_keys < size else 0
    assert spec.values_offset == keys
    assert spec.ids_offset == keys + values
    assert 0 <= spec.page_bytes - (keys + values + ids) < block
    rest = torch.empty(2 * size - spec.kept_keys - spec.kept_values, dtype=dtype).nbytes
    assert 0 <= spec.slot_bytes - (4 + rest) < 4
    # Every part can be viewed as entries, in pages and slots that lie one after another.
    for offset in (spec.values_offset, spec.ids_offset, spec.page_bytes, spec.slot_bytes):
        assert offset % itemsize == 0


def test_nothing_pruned_is_a_dense_page_without_a_ring():
    for spec in (spec_of(*LAYOUTS[-1]), spec_of("think", 0, 0, 64, 16, 4)):
        assert spec.token_bytes == spec.dense_token_bytes
        assert spec.ring_slots == 0
        assert not any((spec.prunes, spec.thin_keys, spec.packed_keys, spec.packed_values))


def test_slots_for_tokens_taken_back_are_beside_those_of_the_window():
    config = KVPruneConfig(recent=32, sinks=2)
    spec = PageSpec.of(config, head_size=64, block_size=16, itemsize=2, slack=5)
    assert spec.window_slots == 32 + 16 + 5
    assert spec.ring_slots == 2 + 53


@pytest.mark.parametrize("block_size", [0, 8, 24, 100, -16])
def test_a_block_size_that_windows_do_not_fit_is_refused(block_size):
    with pytest.raises(InputError) as error:
        spec_of("think", 0.5, 0.0, 64, block_size, 2)
    assert str(error.value) == (
        f"The block size must be a multiple of 16 tokens, got {block_size}: "
        "choose 16, 32, 64 or 128."
    )


@pytest.mark.parametrize("head_size", [0, 8, 72, 272, 576])
def test_a_head_size_that_kernels_do_not_know_is_refused(head_size):
    with pytest.raises(InputError) as error:
        spec_of("mustafar", 0.5, 0.5, head_size, 16, 2)
    assert f"must be a multiple of 16 up to 256, got {head_size}" in str(error.value)


windows = st.builds(
    lambda recent, sinks: spec_of("think", 0.5, 0, 16, 16, 2, recent=recent, sinks=sinks),
    st.integers(1, 100),
    st.integers(0, 40),
)


@given(windows, st.integers(0, 1_000))
def test_the_window_holds_recent_tokens_and_at_most_15_more(spec, position):
    cut = spec.cut(position)
    held = position + 1 - cut
    assert min(spec.recent, position + 1) <= held <= spec.recent + 15
    assert cut % 16 == 0
    assert spec.cut(position + 1) in (cut, cut + 16)


@given(windows, st.integers(0, 1_000))
def test_no_two_tokens_that_are_read_whole_share_a_slot(spec, position):
    whole = {*range(min(spec.sinks, position + 1)), *range(spec.cut(position), position + 1)}
    slots = {spec.slot(token) for token in whole}
    assert len(slots) == len(whole)
    assert slots <= set(range(spec.ring_slots))
