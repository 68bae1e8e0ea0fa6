"""What a real model's keys and values lose, and what its attention makes of the rest.

The rules are derived again here, slowly, from the papers and their code.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipelines.small_model import small_model
from rag_prune.kv import mustafar, pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.pages import Storage
from rag_prune.kv.prefill import prefill
from rag_prune.kv.spec import PageSpec
from rag_prune.kv.think import best_channels, channel_scores

pytestmark = pytest.mark.slow

HEADS, KV_HEADS, SIZE, TOKENS, WINDOW, SCALE = 9, 3, 64, 500, 32, 64**-0.5


@pytest.fixture(scope="module")
def layers():
    """Queries, keys and values of each layer, after RoPE, of a text of 500 tokens."""
    folder = small_model(progress=False)
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recorded(module, query, key, value, *args, **kwargs):
        seen.append((query[0], key[0], value[0]))
        return sdpa(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = recorded
    try:
        with torch.inference_mode():
            model(ids)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # uncovers the model library's own
    assert len(seen) == 30
    assert [x.shape for x in seen[0]] == [
        (HEADS, TOKENS, SIZE),
        (KV_HEADS, TOKENS, SIZE),
        (KV_HEADS, TOKENS, SIZE),
    ]
    return seen


@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_think_keeps_the_channels_of_the_largest_outer_products(layers, ratio):
    kept, _ = KVPruneConfig(key_ratio=ratio).kept(SIZE)
    for queries, keys, _ in layers:
        squares = torch.zeros(KV_HEADS, SIZE, dtype=torch.float64)
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            for channel in range(SIZE):
                outer = torch.outer(queries[head, -WINDOW:, channel], keys[shared, :, channel])
                squares[shared, channel] += outer.double().square().sum()
        got = best_channels(channel_scores(queries[:, -WINDOW:], keys), kept)
        assert got.tolist() == squares.topk(kept).indices.sort().values.tolist()


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_mustafar_keeps_the_published_entries_but_the_smallest(layers, ratio):
    kept, _ = KVPruneConfig(method="mustafar", key_ratio=ratio).kept(SIZE)
    for x in (x for layer in layers for x in layer[1:]):
        threshold = x.abs().kthvalue(int(ratio * SIZE), dim=-1, keepdim=True).values
        published = x * (x.abs() >= threshold)
        ours = mustafar.unpack(*mustafar.pack(x, mustafar.largest(x, kept)))
        smallest = x.abs() == threshold
        untied = smallest.sum(-1) == 1
        assert untied.float().mean() > 0.999
        assert torch.equal(ours[untied], (published * ~smallest)[untied])
        assert torch.equal((ours != 0).sum(-1)[untied], torch.full((untied.sum(),), kept))


def afar_in(store, table):
    ring = torch.zeros(1, dtype=torch.int64)
    return lambda tiles, lengths: pages.afar(store, tiles, table, lengths, ring, SCALE)


@pytest.mark.parametrize(
    "config",
    [
        KVPruneConfig(key_ratio=0.5),
        KVPruneConfig(method="mustafar", key_ratio=0.5, value_ratio=0.5),
        KVPruneConfig(key_ratio=0.4, value_ratio=0.5, recent=32, sinks=1),
    ],
    ids=["thin", "packed", "thin keys, packed values"],
)
def test_prefill_and_decode_agree_on_real_tensors(layers, config):
    """The last token of a prompt gets the same from prefill as from pages and ring."""
    spec = PageSpec.of(config, head_size=SIZE, block_size=32, itemsize=4)
    blocks = -(-TOKENS // 32)
    positions, table = torch.arange(TOKENS), torch.arange(blocks).flip(0)
    starts = torch.tensor([spec.cut(position) for position in range(TOKENS)])
    for queries, keys, values in layers[::5]:
        store = Storage(
            spec,
            torch.float32,
            torch.empty(blocks, KV_HEADS, spec.page_bytes, dtype=torch.uint8),
            torch.zeros(1, KV_HEADS, spec.ring_slots * spec.slot_bytes, dtype=torch.uint8),
        )
        if spec.thin_keys:
            scores = channel_scores(queries[:, -WINDOW:], keys)
            pages.set_ids(store, table, best_channels(scores, spec.kept_keys))
        ring = torch.zeros(TOKENS, 1, dtype=torch.int64)
        for chunk in (slice(0, 300), slice(300, 499), slice(499, 500)):
            pages.write(
                store,
                table[positions[chunk] // 32],
                positions[chunk],
                torch.full_like(positions[chunk], chunk.stop),
                ring[chunk],
                keys.transpose(0, 1)[chunk],
                values.transpose(0, 1)[chunk],
            )
        for pruned, whole in zip(pages.read(store, table), (keys, values), strict=True):
            pruned = pruned[:, :TOKENS]
            assert torch.equal(pruned[pruned != 0], whole[pruned != 0])
        want = prefill(queries, keys, values, starts, SCALE, TOKENS, afar_in(store, table))
        last = torch.tensor([TOKENS])
        got = pages.decode(store, queries[:, -1][None], table[None], last, ring[:1], SCALE)
        torch.testing.assert_close(got[0], want[:, -1], atol=1e-4, rtol=1e-4)
        whole = scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=SCALE, enable_gqa=True
        )[0]
        torch.testing.assert_close(want[:, : config.recent], whole[:, : config.recent])
        assert not torch.allclose(want, whole, atol=1e-4, rtol=1e-4)
