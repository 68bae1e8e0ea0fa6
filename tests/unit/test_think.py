"""ThinK's scores against its paper's definition and two published implementations, re-derived."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_prune.kv.think import best_channels, channel_scores, others


def tensors(*shape, seed=0, dtype=torch.float32):
    """Queries and keys whose channels differ in size, as real ones do."""
    noise = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[-1], generator=noise) * 4
    return (torch.randn(*shape, generator=noise) * spread).to(dtype)


def frobenius(queries, keys):
    """The paper's score of one head: the norm of each channel's outer product. [D]."""
    return torch.stack(
        [
            torch.outer(queries[:, channel], keys[:, channel]).square().sum().sqrt()
            for channel in range(queries.shape[1])
        ]
    )


def test_one_head_is_ordered_as_by_the_paper():
    queries, keys = tensors(1, 32, 64), tensors(1, 100, 64, seed=1)
    scores = channel_scores(queries, keys)[0]
    paper = frobenius(queries[0].double(), keys[0].double())
    torch.testing.assert_close(scores.double(), paper**2 / (32 * 100), rtol=1e-5, atol=0)
    assert scores.argsort().tolist() == paper.argsort().tolist()


def test_the_dropped_channels_are_those_that_change_the_logits_least():
    """What the score is for: the sum of squares that dropping one channel alone adds to QKᵀ."""
    queries, keys = tensors(1, 8, 16).double(), tensors(1, 20, 16, seed=1).double()
    logits = queries[0] @ keys[0].T
    harm = []
    for channel in range(16):
        thin = keys[0].clone()
        thin[:, channel] = 0
        harm.append((logits - queries[0] @ thin.T).norm())
    kept = best_channels(channel_scores(queries, keys), 10)
    assert kept[0].tolist() == sorted(torch.stack(harm).topk(10).indices.tolist())


@pytest.mark.parametrize("group", [1, 3])
def test_heads_that_share_a_key_are_averaged_into_one_set(group):
    """The published code, one query head at a time; the mean over a group is kvpress's."""
    batch, kv_heads, size = 2, 2, 32
    queries = tensors(batch, kv_heads * group, 32, size)
    keys = tensors(batch, kv_heads, 50, size, seed=1)
    scores = channel_scores(queries, keys)
    assert scores.shape == (batch, kv_heads, size)
    for row in range(batch):
        for head in range(kv_heads):
            column = torch.zeros(size, dtype=torch.float64)
            for query in range(head * group, (head + 1) * group):
                for channel in range(size):
                    q = queries[row, query, :, channel].double()
                    k = keys[row, head, :, channel].double()
                    column[channel] += (q**2).mean() * (k**2).mean() / group
            torch.testing.assert_close(scores[row, head].double(), column, rtol=1e-5, atol=0)


def test_exactly_as_many_channels_are_kept_and_ties_go_to_the_lower_one():
    scores = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 3.0, 0.0, 1.0])
    kept = [best_channels(scores, count).tolist() for count in range(1, 9)]
    assert kept == [
        [2],
        [2, 5],
        [0, 2, 5],
        [0, 1, 2, 5],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert best_channels(torch.zeros(3, 256), 7).tolist() == [list(range(7))] * 3


few = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=40)


@given(st.data(), few)
def test_best_and_others_share_the_channels_out(data, scores):
    kept = data.draw(st.integers(0, len(scores)))
    best = best_channels(torch.tensor(scores), kept)
    rest = others(best, len(scores))
    ranked = sorted(range(len(scores)), key=lambda channel: (-scores[channel], channel))
    assert best.tolist() == sorted(ranked[:kept])
    assert rest.tolist() == sorted(ranked[kept:])


@pytest.mark.parametrize("tokens", [5, 32, 60])
def test_padding_says_nothing_about_keys_nor_queries(tokens):
    """A row with padding scores as it does alone, also if it is shorter than the window."""
    total, window = 60, 32
    queries, keys = tensors(2, 4, total, 16), tensors(2, 2, total, 16, seed=1)
    valid = torch.ones(2, total, dtype=torch.bool)
    valid[0, : total - tokens] = False
    together = channel_scores(queries[:, :, -window:], keys, valid)
    alone = channel_scores(
        queries[0, :, -min(window, tokens) :], keys[0, :, -tokens:], valid[0, -tokens:]
    )
    torch.testing.assert_close(together[0], alone)
    torch.testing.assert_close(together[1], channel_scores(queries[1, :, -window:], keys[1]))
    noise = keys.masked_fill(~valid[:, None, :, None], 1e4)
    torch.testing.assert_close(channel_scores(queries[:, :, -window:], noise, valid), together)


def test_more_queries_than_keys_of_one_page():
    """Queries from before a page score it too; `valid` then tells of them all."""
    queries, keys = tensors(2, 48, 16), tensors(1, 48, 16, seed=1)
    valid = torch.arange(48) >= 20
    page = channel_scores(queries[:, -32:], keys[:, -16:], valid)
    torch.testing.assert_close(page, channel_scores(queries[:, 20:], keys[:, -16:]))
    torch.testing.assert_close(page, channel_scores(queries[:, -32:], keys[:, -16:], valid[-32:]))


def test_a_row_of_padding_alone_scores_zero():
    scores = channel_scores(tensors(4, 8, 16), tensors(2, 8, 16), torch.zeros(8).bool())
    assert scores.tolist() == torch.zeros(2, 16).tolist()


def test_sixteen_bit_tensors_are_scored_in_full_precision():
    queries = tensors(4, 32, 64, dtype=torch.bfloat16) * 64
    keys = tensors(2, 3_000, 64, seed=1, dtype=torch.bfloat16) * 64
    scores = channel_scores(queries, keys)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, channel_scores(queries.float(), keys.float()))
    # Their squares are beyond float16, and their sums beyond bfloat16's steps.
    halves = channel_scores(queries.half(), keys.half())
    torch.testing.assert_close(halves, scores)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.permutations(range(12)))
def test_the_order_of_tokens_does_not_matter(seed, order):
    queries, keys = tensors(2, 4, 8, seed=seed), tensors(1, 12, 8, seed=seed + 1)
    torch.testing.assert_close(
        channel_scores(queries, keys[:, order]), channel_scores(queries, keys)
    )
