"""A pruned cache inside vLLM's server: its tokens are those of a mask over whole attention."""

import json
import re
from contextlib import contextmanager

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kv_oracle import oracle_logits
from serving import served

pytestmark = pytest.mark.slow
BLOCK = 32
LAYERS, KV_HEADS, SIZE = 4, 2, 64
NOTHING = {"method": "mustafar", "key_ratio": 0.0}  # is dropped


STOCK = (1 << 30) // (2 * LAYERS * KV_HEADS * BLOCK * SIZE * 4)  # blocks, of 1 GiB


@pytest.fixture(scope="module")
def small():
    from pipelines.small_model import small_model

    return small_model()


@pytest.fixture(scope="module")
def prompts(small):
    """Token ids of 24 prompts, 18 to 300 tokens long; none begins as another does."""
    from pipelines.demo.corpus import demo_passages

    tokenizer = AutoTokenizer.from_pretrained(small)
    ids = tokenizer("\n".join(p["text"] for p in demo_passages())).input_ids
    return [ids[400 * i : 400 * i + 18 + 41 * i % 283] for i in range(24)]


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A random Llama with the small model's tokenizer, whose heads look at few tokens."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(small)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=2 * KV_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=SIZE,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def masks(folder, model, prompts, tmp_path_factory):
    from rag_prune.kv.masks import calibrate_masks

    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer.batch_decode(prompts[-4:])
    return calibrate_masks(model, tokenizer, texts, path, progress=False)


@contextmanager
def serving(folder, options, tmp_path, *arguments):
    if options is not None:
        asked = json.dumps({"prunekit_kv": options}, default=str)
        arguments = ("--additional-config", asked, *arguments)
    arguments = ("--model", str(folder), "--served-model-name", "small", *arguments)
    arguments += ("--block-size", str(BLOCK), "--max-model-len", "1024")
    log = tmp_path / "log"
    with served(log, *arguments) as url:
        yield Engine(url, log.read_text(errors="replace"))


class Engine:
    def __init__(self, url, log):
        self.url, self.log = url, log

    @property
    def blocks(self):
        """How many fit into the memory, whatever is used."""
        found = re.search(r"Overriding num_gpu_blocks=(\d+)", self.log)
        text = found or re.search(r'num_gpu_blocks="(\d+)"', httpx.get(f"{self.url}/metrics").text)
        return int(text[1])

    def counter(self, name):
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(n) for n in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)", text, re.M))

    def complete(self, prompts, tokens):
        """The greedy tokens of each prompt and their logprobs; all prompts are sent together."""
        asked = {"model": "small", "prompt": prompts, "max_tokens": tokens, "temperature": 0}
        asked |= {"logprobs": 1, "return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=600)
        choices = answer.raise_for_status().json()["choices"]
        return [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]


# ------------------------------------------------------------------------------ what to expect
def expected(model, prompt, answer, **rule):
    """The logits at each token of the answer under a rule of `oracle_logits`."""
    row = torch.tensor([prompt + answer[:-1]])
    return oracle_logits(model, row, prompt=len(prompt), **rule)[0, len(prompt) - 1 :]


def assert_expected(model, prompts, answers, ties=0, **rule):
    """Every token is the best one, with its logprob.

    ties: of so many sequences two entries may be so close that rounding decides which is kept.
    """
    apart = changed = 0
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        logits = expected(model, prompt, tokens, **rule)
        chosen = torch.tensor(tokens)[:, None]
        found = logits.gather(-1, chosen)[:, 0]
        differences = torch.tensor(logprobs) - (found - logits.logsumexp(-1))
        furthest = max(differences.abs().max(), (logits.max(-1).values - found).max())
        assert furthest < (1e-3 if apart == ties else 0.2)
        apart += bool(furthest > 1e-3)
        whole = expected(model, prompt, tokens, **NOTHING)
        changed += int((whole.argmax(-1) != chosen[:, 0]).sum())
    assert changed > len(prompts)  # what was pruned matters


# ------------------------------------------------------------------------------ tests
def test_nothing_pruned_is_stock_vllm(small, prompts, tmp_path, record_property):
    with serving(small, None, tmp_path) as stock:
        assert "prunekit KV" not in stock.log
        told, blocks = stock.complete(prompts, 16), stock.blocks
    with serving(small, {"method": "none"}, tmp_path) as engine:
        assert "prunekit KV: none" in engine.log
        assert engine.blocks == blocks
        ours = engine.complete(prompts, 16)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in told]
    ours, told = (torch.tensor([logprobs for _, logprobs in x]) for x in (ours, told))
    record_property("max_logprob_difference", float((ours - told).abs().max()))
    torch.testing.assert_close(ours, told, atol=1e-4, rtol=0)


def test_think_however_requests_are_scheduled(
    folder, model, prompts, masks, tmp_path, record_property
):
    """In chunks of 64 tokens, in mixed batches, and in a pool that is too small for all at once."""
    tight = ("--num-gpu-blocks-override", "48", "--max-num-batched-tokens", "64")
    tight += ("--max-num-seqs", "8", "--no-enable-prefix-caching")
    options = {"method": "think", "key_ratio": 0.5, "masks": masks}
    with serving(folder, options, tmp_path, *tight) as engine:
        assert "prunekit KV: think, policy static" in engine.log
        record_property("blocks", engine.blocks / STOCK)
        assert engine.blocks / STOCK >= 1.30
        answers = engine.complete(prompts, 90)
        assert engine.counter("num_preemptions") > 0
        assert engine.complete(prompts[:1], 90)[0][0] == answers[0][0]

    scores = load_file(masks)["scores"]
    assert_expected(model, prompts, answers, policy="static", scores=scores)


def test_mustafar_and_a_shared_prefix(folder, model, prompts, tmp_path, record_property):
    options = {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.7}
    with serving(folder, options, tmp_path, "--max-num-batched-tokens", "64") as engine:
        record_property("blocks", engine.blocks / STOCK)
        assert engine.blocks / STOCK >= 2.2
        answers = engine.complete(prompts, 40)
        again = max(prompts, key=len)
        hits = [engine.complete([again], 40)[0] for _ in range(2)]
        assert engine.counter("prefix_cache_hits") > len(again)
    assert_expected(model, prompts, answers, ties=3, **options)
    # The pages came from the first request and its ring did not: tokens before the hit are read
    # pruned, until the window has moved past them.
    assert hits[0] == hits[1]
    first = answers[prompts.index(again)]
    assert abs(hits[0][1][0] - first[1][0]) < 1
