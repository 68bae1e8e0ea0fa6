"""Mustafar's entries against the published rule, re-derived, and the format bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.mustafar import channels_of, largest, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def published(vector, ratio):
    """The channels that the published code keeps of one token: not below its k-th smallest.

    k is the count that the ratio drops, so the entry it names stays too, and all that tie with it.
    """
    dropped = max(1, int(ratio * len(vector)))
    threshold = sorted(abs(float(entry)) for entry in vector)[dropped - 1]
    return [c for c, entry in enumerate(vector) if abs(float(entry)) >= threshold]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("size", [64, 128])
def test_one_entry_fewer_stays_than_in_the_published_code(size, ratio):
    noise = torch.Generator().manual_seed(size)
    tokens = torch.randn(2, 30, size, generator=noise)
    kept, _ = KVPruneConfig(method="mustafar", key_ratio=ratio).kept(size)
    assert kept == size - int(size * ratio)
    ours, one_more = largest(tokens, kept), largest(tokens, kept + 1)
    for head, token in torch.cartesian_prod(torch.arange(2), torch.arange(30)).tolist():
        theirs = published(tokens[head, token], ratio)
        assert one_more[head, token].tolist() == theirs
        smallest = min(theirs, key=lambda channel: abs(tokens[head, token, channel]))
        assert ours[head, token].tolist() == [c for c in theirs if c != smallest]


def test_where_the_published_code_keeps_all_ties_the_count_stays():
    vector = torch.tensor([1.0, -2, 2, 0.5, 2, -2, 3, 2])
    assert published(vector, 0.5) == [1, 2, 4, 5, 6, 7]
    assert largest(vector, 4).tolist() == [1, 2, 4, 6]


def test_ties_go_to_the_lower_channel_whatever_the_sign():
    assert largest(torch.tensor([1.0, -1, 1, -1]), 2).tolist() == [0, 1]
    assert largest(torch.tensor([-0.0, 0.0, -0.0, 5]), 2).tolist() == [0, 3]
    assert largest(torch.zeros(3, 256), 5).tolist() == [list(range(5))] * 3


# Few distinct values, so that most tokens have ties; all are exact in every type.
entries = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0, 2.0**-14, 100.0])
vectors = st.integers(1, 32).flatmap(
    lambda n: st.lists(entries, min_size=8 * n, max_size=8 * n) | st.just([1.0] * 8 * n)
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data(), vectors, st.sampled_from(DTYPES))
def test_what_is_packed_comes_back_and_the_rest_is_zero(data, vector, dtype):
    kept = data.draw(st.integers(1, len(vector)))
    x = torch.tensor([vector, vector[::-1]], dtype=dtype)
    channels = largest(x, kept)
    for row, best in zip(x.tolist(), channels.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda channel: (-abs(row[channel]), channel))
        assert best == sorted(ranked[:kept])
    bitmap, values = pack(x, channels)
    assert (bitmap.dtype, bitmap.shape) == (torch.uint8, (2, len(vector) // 8))
    assert (values.dtype, values.shape) == (dtype, (2, kept))
    assert channels_of(bitmap, kept).tolist() == channels.tolist()
    whole = torch.zeros_like(x)
    for row, best in enumerate(channels.tolist()):
        whole[row, best] = x[row, best]
    assert torch.equal(unpack(bitmap, values), whole)


def test_channel_c_is_bit_c_mod_8_of_byte_c_div_8():
    x = torch.zeros(1, 24)
    for channel, entry in ((0, 1.0), (3, -2.0), (7, 3.0), (8, -4.0), (21, 5.0), (23, 6.0)):
        x[0, channel] = entry
    bitmap, values = pack(x, largest(x, 6))
    assert bitmap.tolist() == [[0b1000_1001, 0b0000_0001, 0b1010_0000]]
    assert values.tolist() == [[1, -2, 3, -4, 5, 6]]


def test_one_channel_alone_sets_one_bit():
    for channel in range(256):
        x = torch.zeros(256)
        x[channel] = -1
        bitmap, _ = pack(x, largest(x, 1))
        assert bitmap.tolist() == list((1 << channel).to_bytes(32, "little"))
        assert channels_of(bitmap, 1).tolist() == [channel]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_leading_shape_and_all_entries(dtype):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 80, generator=noise).to(dtype)
    bitmap, values = pack(x, largest(x, 80))
    assert bitmap.unique().tolist() == [255]
    assert torch.equal(unpack(bitmap, values), x)
    kept = largest(x, 31)
    assert torch.equal(unpack(*pack(x, kept))[1, 2, 3], unpack(*pack(x[1, 2, 3], kept[1, 2, 3])))
