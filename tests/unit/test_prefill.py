"""Prefill over a pruned past, against attention that looks at one pair of positions at a time."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rag_prune.kv import partial
from rag_prune.kv import prefill as module
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.partial import _by_hand, _by_sdpa
from rag_prune.kv.prefill import prefill
from rag_prune.kv.spec import PageSpec

HEADS, KV_HEADS, SIZE, SCALE = 6, 2, 16, 0.3


def made(tokens, seed=0, dtype=torch.float32):
    """Queries, keys, values, and what pages would keep of the keys and values."""
    noise = torch.Generator().manual_seed(seed)
    queries = 3 * torch.randn(HEADS, tokens, SIZE, generator=noise)
    whole = torch.randn(2, KV_HEADS, tokens, SIZE, generator=noise)
    far = whole * (torch.rand(whole.shape, generator=noise) < 0.5)
    return [x.to(dtype) for x in (queries, *whole, *far)]


def starts(tokens, recent):
    spec = PageSpec.of(KVPruneConfig(recent=recent), head_size=16, block_size=16, itemsize=4)
    return torch.tensor([spec.cut(position) for position in range(tokens)])


def oracle(queries, keys, values, far_keys, far_values, whole_from):
    """One query at a time, in float64; [HEADS, S, D]."""
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for head, at in product(range(HEADS), range(queries.shape[1])):
        shared = head // (HEADS // KV_HEADS)
        weights, read = [], []
        for token in range(at + 1):
            near = token >= int(whole_from[at])
            key = (keys if near else far_keys)[shared, token].double()
            read.append((values if near else far_values)[shared, token].double())
            weights.append(queries[head, at].double() @ key * SCALE)
        out[head, at] = torch.stack(weights).softmax(0) @ torch.stack(read)
    return out.float()


def call(tensors, whole_from, first, last, spare=0):
    """The queries from `first` to `last`, given the whole tokens that they need, and `spare`."""
    queries, keys, values, far_keys, far_values = tensors
    near = max(0, int(whole_from[first]) - spare)

    def afar(tiles, lengths):
        out, log_sums = torch.zeros_like(tiles), torch.full(tiles.shape[:-1], -torch.inf)
        for tile, length in enumerate(lengths.tolist()):
            assert length <= int(whole_from[last - 1])
            if length:
                rows = tiles[tile].unflatten(0, (KV_HEADS, -1)).flatten(1, 2)
                part = partial.attend(
                    rows, far_keys[:, :length], far_values[:, :length], None, SCALE
                )
                out[tile], log_sums[tile] = (
                    x.reshape(y.shape)
                    for x, y in zip(part, (out[tile], log_sums[tile]), strict=True)
                )
        return out, log_sums

    return prefill(
        queries[:, first:last],
        keys[:, near:last],
        values[:, near:last],
        whole_from[first:last],
        SCALE,
        last,
        afar,
    )


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[5, 128], ids="{} rows at once".format)
def rows(request, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("recent", [1, 8, 100])
def test_each_query_reads_its_own_window_whole(recent):
    tensors, whole_from = made(40), starts(40, recent)
    want = oracle(*tensors, whole_from)
    close(call(tensors, whole_from, 0, 40), want)
    close(call(tensors, whole_from, 17, 40), want[:, 17:])
    close(call(tensors, whole_from, 39, 40), want[:, 39:])


@pytest.mark.parametrize("past", [1, 16, 37, 50])
def test_a_call_whose_own_tokens_are_whole(past):
    tensors = made(90)
    whole_from = starts(90, 20)
    whole_from[past:] = whole_from[past:].clamp(max=past)
    want = oracle(*tensors, whole_from)
    close(call(tensors, whole_from, past, 90), want[:, past:])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(1, 90),
    st.integers(1, 50),
    st.integers(0, 20),
)
def test_chunks_give_what_one_call_gives(data, tokens, recent, spare):
    tensors, whole_from = made(tokens, seed=tokens), starts(tokens, recent)
    inner = data.draw(st.sets(st.integers(1, tokens)))
    ends = [0, *sorted({*inner, tokens})]
    chunks = [call(tensors, whole_from, a, b, spare) for a, b in pairwise(ends)]
    close(torch.cat(chunks, 1), call(tensors, whole_from, 0, tokens))


@pytest.mark.parametrize("first", [0, 7, 29])
def test_nothing_read_from_afar_is_ordinary_attention(first):
    tensors, whole_from = made(30), torch.zeros(30, dtype=torch.int64)
    mask = torch.arange(30) <= torch.arange(first, 30)[:, None]
    queries, keys, values = (x[None] for x in tensors[:3])
    want = scaled_dot_product_attention(
        queries[:, :, first:], keys, values, mask, scale=SCALE, enable_gqa=True
    )
    close(call(tensors, whole_from, first, 30), want[0])


def test_sixteen_bit_tensors_stay_within_their_precision():
    tensors, whole_from = made(60, dtype=torch.bfloat16), starts(60, 8)
    got = call(tensors, whole_from, 0, 60)
    assert got.dtype == torch.bfloat16
    want = oracle(*tensors, whole_from)
    close(got.float(), want, 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_attend_to_a_part_agree(dtype):
    """The one of the CPU, and the one of every other device; both where a row sees nothing."""
    torch.manual_seed(0)
    rows, keys, values = (torch.randn(2, n, 16).to(dtype) for n in (15, 40, 40))
    bias = torch.zeros(15, 40, dtype=dtype)
    bias[torch.rand(15, 40) < 0.5] = -torch.inf
    bias[7] = -torch.inf
    out, log_sum = _by_sdpa(rows, keys, values, bias, 0.25)
    by_hand, log_by_hand = _by_hand(rows, keys, values, bias, 0.25)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    sees = torch.arange(15) != 7
    torch.testing.assert_close(out[:, sees], by_hand[:, sees], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        log_sum[:, sees], log_by_hand[:, sees], atol=tolerance, rtol=tolerance
    )
    for x in (out, log_sum, by_hand, log_by_hand):
        assert x.isfinite().all()
