"""One layer of a pruned cache, scheduled as vLLM might, against a mask over whole attention."""

import importlib.util
import random

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm not installed here; see `make test-vllm`", allow_module_level=True)

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kv_oracle import attend, channel_mask, largest, window
from rag_prune.kv import vllm_backend
from rag_prune.kv.think import channel_scores
from rag_prune.kv.vllm_backend import Builder, PrunedAttention, PrunedBackend, RingBuilder

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 32, 16, 64
RECENT, SINKS, WINDOW = 20, 3, 8
NAME = "model.layers.0.self_attn.attn"
CPU = torch.device("cpu")
WHOLE = {"recent": RECENT, "sinks": SINKS, "obs_window": WINDOW}
METHODS = {
    "none": {"method": "none"},
    "think": {"key_ratio": 0.5},
    "think and values": {"key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar": {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7},
}


class Layer:
    """What stands around one attention layer in vLLM: blocks, tables, a scheduler."""

    def __init__(self, options):
        self.config = VllmConfig(additional_config={"prunekit_kv": WHOLE | options})
        self.config.cache_config.block_size = BLOCK
        with set_current_vllm_config(self.config):
            self.impl = PrunedAttention(HEADS, SIZE, SIZE**-0.5, KV_HEADS)
        self.impl.kv_cache_torch_dtype, self.impl.impl = torch.float32, self.impl
        context = self.config.compilation_config.static_forward_context
        context[NAME] = self.impl  # a layer as far as the implementation looks at one
        self.impl.process_weights_after_loading(torch.float32)
        size = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": SIZE}
        spec = PrunedBackend.customize_spec(FullAttentionSpec(dtype=torch.float32, **size))
        memory = torch.zeros(BLOCKS, KV_HEADS, BLOCK, spec.state_content_bytes, dtype=torch.uint8)
        self.memory, self.cache = memory, memory.view(torch.float32)
        self.builder = Builder(spec, [NAME], self.config, CPU)
        self.ring_builder = None
        if self.impl.ring is not None:
            self.impl.ring.kv_cache = memory
            ring = self.impl.ring.get_kv_cache_spec(self.config)
            self.ring_builder = RingBuilder(ring, [self.impl.ring_name], self.config, CPU)
        self.free = random.sample(range(1, BLOCKS), BLOCKS - 1)
        self.tables, self.rings, self.done = {}, {}, {}

    def claim(self, count):
        blocks, self.free = self.free[:count], self.free[count:]
        self.memory[blocks] = 0
        return blocks

    def release(self, name):
        self.free += self.tables.pop(name, []) + self.rings.pop(name, [])
        self.done[name] = 0

    def step(self, counts, tokens):
        """Run `counts[name]` tokens of each sequence; `tokens[name]` are its queries, keys, values.

        Returns their outputs by name, [heads, T, D].
        """
        order = sorted(counts, key=lambda name: (counts[name] > 1, not self.done.get(name)))
        for name in order:
            self.done.setdefault(name, 0)
            total = self.done[name] + counts[name]
            table = self.tables.setdefault(name, [])
            table += self.claim(-(-total // BLOCK) - len(table))
            if self.ring_builder is not None and name not in self.rings:
                self.rings[name] = self.claim(self.ring_builder.kv_cache_spec.blocks)
        past = [self.done[name] for name in order]
        starts = torch.tensor([0, *(counts[name] for name in order)]).cumsum(0).int()
        totals = torch.tensor([self.done[name] + counts[name] for name in order]).int()

        def common(tables):
            table = torch.zeros(len(order), 20, dtype=torch.int32)
            for row, name in enumerate(order):
                table[row, : len(tables[name])] = torch.tensor(tables[name])
            return CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=totals,
                seq_lens_cpu_upper_bound=totals,
                num_reqs=len(order),
                num_actual_tokens=int(starts[-1]),
                max_query_len=max(counts.values()),
                max_seq_len=int(totals.max()),
                block_table_tensor=table,
                slot_mapping=torch.empty(0),
            )

        metadata = {NAME: self.builder.build(0, common(self.tables))}
        if self.ring_builder is not None:
            metadata[self.impl.ring_name] = self.ring_builder.build(0, common(self.rings))
        given = [
            torch.cat(
                [tokens[n][i][:, p : p + counts[n]] for n, p in zip(order, past, strict=True)], 1
            )
            for i in range(3)
        ]
        query, key, value = (x.transpose(0, 1) for x in given)
        output = torch.full_like(query, torch.nan)
        with set_forward_context(metadata, self.config):
            self.impl.forward(self.impl, query, key, value, self.cache, metadata[NAME], output)
        for name in order:
            self.done[name] += counts[name]
        rows = output.split([counts[name] for name in order])
        return {name: out.transpose(0, 1) for name, out in zip(order, rows, strict=True)}


@pytest.fixture
def scores(monkeypatch):
    """Those of static masks, [H, D]."""
    scores = torch.rand(KV_HEADS, SIZE)
    monkeypatch.setattr(vllm_backend, "_static_scores", lambda *asked: scores[None])
    monkeypatch.setattr(vllm_backend, "get_tensor_model_parallel_rank", lambda: 0)
    return scores


def sequence(length):
    return (
        torch.randn(HEADS, length, SIZE) * 2,
        torch.randn(KV_HEADS, length, SIZE) * torch.rand(KV_HEADS, 1, SIZE) * 2,
        torch.randn(KV_HEADS, length, SIZE),
    )


def expected(tokens, pruned_key, pruned_value, whole=None):
    """[heads, T, D]. whole: bool [T, T], the tokens that each query reads whole."""
    if whole is None:
        whole = window(tokens[0].shape[1], RECENT, SINKS)
    return attend(*tokens, pruned_key, pruned_value, whole, SIZE**-0.5)


def of_channels(key, scores, kept):
    return key * channel_mask(scores, kept)[:, None]


# ------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", METHODS)
def test_any_schedule_gives_what_positions_say(method, seed, scores):
    random.seed(seed)
    torch.manual_seed(seed)
    options = METHODS[method] | ({"masks": "a file"} if "think" in method else {})
    layer = Layer(options)
    config = layer.impl.config
    kept_keys, kept_values = config.kept(SIZE)
    tokens = {name: sequence(random.randint(1, 130)) for name in range(4)}
    outputs = {name: torch.full_like(x[0], torch.nan) for name, x in tokens.items()}
    while True:
        left = {n: x[0].shape[1] - layer.done.get(n, 0) for n, x in tokens.items()}
        going = [n for n, rest in left.items() if rest]
        if not going:
            break
        if random.random() < 0.05:
            layer.release(random.choice(going))
            continue
        some = random.sample(going, random.randint(1, len(going)))
        counts = {n: min(left[n], random.choice([1, 1, 1, 2, 7, 16, 50])) for n in some}
        before = dict(layer.done)
        for name, out in layer.step(counts, tokens).items():
            start = before.get(name, 0)
            outputs[name][:, start : start + counts[name]] = out
    for name, (_, key, value) in tokens.items():
        if config.method == "think":
            key = of_channels(key, scores, kept_keys)
        else:
            key = largest(key, kept_keys)
        torch.testing.assert_close(
            outputs[name], expected(tokens[name], key, largest(value, kept_values))
        )


def test_policy_prompt_reads_a_call_whole_and_decodes_with_its_channels():
    layer = Layer({"policy": "prompt"})
    tokens = sequence(150)
    query, key, value = tokens
    scores = channel_scores(query[:, 100 - WINDOW : 100], key[:, :100])
    whole = torch.ones(150, 150, dtype=torch.bool)
    seen = torch.arange(150)
    cut = (seen[100:, None] + 1 - RECENT) // 16 * 16
    whole[100:] = (seen >= cut) | (seen < SINKS)
    want = expected(tokens, of_channels(key, scores, SIZE // 2), value, whole)
    got = [layer.step({0: count}, {0: tokens})[0] for count in (100, *[1] * 50)]
    torch.testing.assert_close(torch.cat(got, 1), want)


def test_policy_prompt_reads_the_past_pruned_in_a_second_call():
    layer = Layer({"policy": "prompt"})
    tokens = sequence(130)
    query, key, value = tokens
    first = of_channels(key, channel_scores(query[:, 64 - WINDOW : 64], key[:, :64]), SIZE // 2)
    whole = torch.ones(130, 130, dtype=torch.bool)
    seen = torch.arange(130)
    cut = ((seen[64:, None] + 1 - RECENT) // 16 * 16).clamp(max=64)
    whole[64:] = (seen >= cut) | (seen < SINKS)
    got = [layer.step({0: count}, {0: tokens})[0] for count in (64, 66)]
    torch.testing.assert_close(torch.cat(got, 1), expected(tokens, first, value, whole))


def test_policy_causal_scores_each_page_by_the_queries_up_to_its_end():
    layer = Layer({"policy": "causal"})
    tokens = sequence(150)
    query, key, value = tokens
    pruned = torch.zeros_like(key)
    scores = None
    for start in range(0, 150, BLOCK):
        if start < 144:  # the last page begins in a decode step and takes the one before it over
            end = min(start + BLOCK, 138)
            last = slice(end - WINDOW, end)
            scores = channel_scores(query[:, last], key[:, last])
        page = slice(start, start + BLOCK)
        pruned[:, page] = of_channels(key[:, page], scores, SIZE // 2)
    got = [layer.step({0: count}, {0: tokens})[0] for count in (48, 32, 58, *[1] * 12)]
    torch.testing.assert_close(torch.cat(got, 1), expected(tokens, pruned, value))


def test_blocks_of_another_sequence_are_read_pruned():
    """As after a hit of the prefix cache: pages are there, their rest is not."""
    layer = Layer(METHODS["mustafar"])
    tokens = sequence(100)
    layer.step({0: 96}, {0: tokens})
    layer.tables[1], layer.done[1] = layer.tables[0][:4], 64
    got = layer.step({1: 36}, {1: tokens})[1]
    kept = layer.impl.config.kept(SIZE)[0]
    seen = torch.arange(100)
    whole = (seen >= (seen[:, None] + 1 - RECENT).clamp(min=0) // 16 * 16) & (seen >= 64)
    want = expected(tokens, largest(tokens[1], kept), largest(tokens[2], kept), whole)
    torch.testing.assert_close(got, want[:, 64:])
