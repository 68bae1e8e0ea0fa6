"""Rewrites drawn by vLLM: as transformers greedily, and by each request's own seed."""

import pytest

from data_prune.self_distill import Request, SelfDistill
from engines import engine
from pipelines.ask import AskLocal
from pipelines.small_model import small_model

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": f"What is the capital of {country}?", "response": f"{city} is."}
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"))
]


class InVllm:
    """What `AskVllm` answers in the engine's process, and how often it was asked."""

    name = "smollm2"

    def __init__(self, ask):
        self.ask = ask
        self.asked = 0

    def __call__(self, requests):
        self.asked += len(requests)
        return self.ask("replies", requests)


@pytest.fixture(scope="module")
def folder():
    return small_model(progress=False)


@pytest.fixture(scope="module")
def vllm(folder):
    with engine(folder, max_model_len=512) as ask:
        yield InVllm(ask)


def drawn(prompt, seed, temperature=1.0):
    return Request(({"role": "user", "content": prompt},), 24, temperature, seed)


def test_greedy_replies_are_those_of_transformers(folder, vllm):
    asked = [drawn(row["prompt"], seed=0, temperature=0.0) for row in ROWS]
    here = dict(AskLocal.from_pretrained(folder)(asked))
    there = dict(vllm(asked))
    assert [there[i].text for i in range(3)] == [here[i].text for i in range(3)]
    assert [there[i].new_tokens for i in range(3)] == [here[i].new_tokens for i in range(3)]


def test_a_seed_draws_the_same_whatever_else_is_asked(vllm):
    one = drawn("Tell me of a king.", seed=1)
    [(_, alone)] = vllm([one])
    others = [drawn("Tell me of a king.", seed) for seed in (2, 3)]
    among = dict(vllm([others[0], one, others[1], *(drawn("Count.", s) for s in range(4))]))
    assert among[1].text == alone.text
    assert len({among[i].text for i in range(3)}) == 3
    [(_, refused)] = vllm([drawn("long " * 600, seed=0)])
    assert refused.refused


def test_rows_are_rewritten_and_asked_once(vllm, tmp_path):
    how = SelfDistill(max_new_tokens=48, temperature=0.7, attempts=2)
    before = vllm.asked
    found = how.run(ROWS, vllm, tmp_path)
    assert 3 <= vllm.asked - before <= 6
    assert all(rewrite.rewrite for rewrite in found.rewrites)
    for row, out, rewrite in zip(ROWS, found.dataset(), found.rewrites, strict=True):
        assert out["response"] == (rewrite.rewrite if rewrite.accepted else row["response"])
    asked = vllm.asked
    assert how.run(ROWS, vllm, tmp_path).rewrites == found.rewrites
    assert vllm.asked == asked
