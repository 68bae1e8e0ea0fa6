"""Prefill over a pruned past, against attention that looks at one pair of positions at a time."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rag_prune.kv import prefill as module
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.prefill import prefill
from rag_prune.kv.spec import PageSpec

BATCH, HEADS, KV_HEADS, SIZE, SCALE = 2, 6, 2, 16, 0.3


def made(tokens, seed=0, dtype=torch.float32):
    """Queries, keys, values, and what pages would keep of the keys and values."""
    noise = torch.Generator().manual_seed(seed)
    queries = 3 * torch.randn(BATCH, HEADS, tokens, SIZE, generator=noise)
    whole = torch.randn(2, BATCH, KV_HEADS, tokens, SIZE, generator=noise)
    far = whole * (torch.rand(whole.shape, generator=noise) < 0.5)
    return [x.to(dtype) for x in (queries, *whole, *far)]


def starts(tokens, recent):
    spec = PageSpec.of(KVPruneConfig(recent=recent), head_size=16, block_size=16, itemsize=4)
    return torch.tensor([spec.cut(position) for position in range(tokens)])


def oracle(queries, keys, values, far_keys, far_values, whole_from, valid=None):
    """One query at a time, in float64; [BATCH, HEADS, S, D]."""
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for row, head, at in torch.cartesian_prod(
        torch.arange(BATCH), torch.arange(HEADS), torch.arange(queries.shape[2])
    ).tolist():
        shared = head // (HEADS // KV_HEADS)
        weights, read = [], []
        for token in range(at + 1):
            if valid is not None and not valid[row, token]:
                continue
            near = token >= int(whole_from[at])
            key = (keys if near else far_keys)[row, shared, token].double()
            read.append((values if near else far_values)[row, shared, token].double())
            weights.append(queries[row, head, at].double() @ key * SCALE)
        if read:
            out[row, head, at] = torch.stack(weights).softmax(0) @ torch.stack(read)
    return out.float()


def call(tensors, whole_from, first, last, valid=None, spare=(0, 0)):
    """The queries from `first` to `last`, given no more tokens than they need, and `spare`."""
    queries, keys, values, far_keys, far_values = tensors
    far = min(last, int(whole_from[last - 1]) + spare[0])
    near = max(0, int(whole_from[first]) - spare[1])
    return prefill(
        queries[:, :, first:last],
        far_keys[:, :, :far],
        far_values[:, :, :far],
        keys[:, :, near:last],
        values[:, :, near:last],
        whole_from[first:last],
        SCALE,
        last,
        None if valid is None else valid[:, :last],
    )


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def left_padding(tokens, *padding):
    return torch.arange(tokens) >= torch.tensor(padding)[:, None]


@pytest.fixture(params=[5, 128], ids="{} rows at once".format)
def rows(request, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("padding", [None, (0, 23), (40, 1)])
@pytest.mark.parametrize("recent", [1, 8, 100])
def test_each_query_reads_its_own_window_whole(recent, padding):
    tensors, whole_from = made(40), starts(40, recent)
    valid = None if padding is None else left_padding(40, *padding)
    want = oracle(*tensors, whole_from, valid)
    close(call(tensors, whole_from, 0, 40, valid), want)
    close(call(tensors, whole_from, 17, 40, valid), want[:, :, 17:])
    close(call(tensors, whole_from, 39, 40, valid), want[:, :, 39:])


def test_windows_may_begin_anywhere():
    tensors = made(12)
    whole_from = torch.tensor([0, 0, 1, 1, 4, 4, 4, 6, 7, 8, 10, 11])
    want = oracle(*tensors, whole_from)
    close(call(tensors, whole_from, 0, 12), want)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(1, 90),
    st.integers(1, 50),
    st.tuples(st.integers(0, 90), st.integers(0, 90)),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_chunks_give_what_one_call_gives(data, tokens, recent, padding, spare):
    tensors, whole_from = made(tokens, seed=tokens), starts(tokens, recent)
    valid = left_padding(tokens, *padding)
    inner = data.draw(st.sets(st.integers(1, tokens)))
    ends = [0, *sorted({*inner, tokens})]
    chunks = [call(tensors, whole_from, a, b, valid, spare) for a, b in pairwise(ends)]
    close(torch.cat(chunks, 2), call(tensors, whole_from, 0, tokens, valid))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 90), st.integers(0, 90))
def test_padding_changes_nothing_for_the_tokens_behind_it(tokens, padding):
    total, recent = tokens + padding, 8
    tensors = made(total)
    # Windows are counted from the first column, so the row alone has the same ones, moved.
    whole_from = starts(total, recent)
    valid = left_padding(total, padding, 0)
    together = call(tensors, whole_from, 0, total, valid)
    alone = call(
        [x[:, :, padding:] for x in tensors], (whole_from[padding:] - padding).clamp(0), 0, tokens
    )
    close(together[0, :, padding:], alone[0])
    assert not together[0, :, :padding].any()


@pytest.mark.parametrize("first", [0, 7, 29])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_read_from_afar_is_ordinary_attention(first, padded):
    tensors, whole_from = made(30), torch.zeros(30, dtype=torch.int64)
    valid = left_padding(30, 0, 4) if padded else None
    mask = torch.arange(30) <= torch.arange(first, 30)[:, None]
    if padded:
        mask = (mask & valid[:, None])[:, None]
    queries, keys, values = tensors[:3]
    want = scaled_dot_product_attention(
        queries[:, :, first:], keys, values, mask, scale=SCALE, enable_gqa=True
    )
    if padded:
        want = want.nan_to_num(0.0)
    close(call(tensors, whole_from, first, 30, valid), want)


def test_sixteen_bit_tensors_stay_within_their_precision():
    tensors, whole_from = made(60, dtype=torch.bfloat16), starts(60, 8)
    got = call(tensors, whole_from, 0, 60)
    assert got.dtype == torch.bfloat16
    want = oracle(*tensors, whole_from)
    close(got.float(), want, 0.03)
