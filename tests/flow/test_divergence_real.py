"""Divergence of a real model and copies of it that lost weights; docs have the figures."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prune.divergence import ResponseDivergence, jensen_shannon
from data_prune.divergence_interval import TopTokens, jensen_shannon_interval, top_tokens_interval
from data_prune.pairs import encode, worded
from model_prune import Calibration, load_method

pytestmark = pytest.mark.slow

ROWS = [
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Name three colours.", "Red, blue and yellow are three colours."),
    (
        "Ann has 12 apples and gives 5 of them to Ben. How many apples are left?",
        "Ann had 12 apples. She gave away 5, so 12 - 5 = 7 apples are left.",
    ),
    (
        "A shirt costs 20 dollars and is sold at half the price. What do three of them cost?",
        "Half of 20 dollars is 10 dollars. Three shirts cost 3 * 10 = 30 dollars.",
    ),
    ("Write a sentence about the sea.", "The sea was calm, and small waves ran up the beach."),
    (
        "Summarise: The meeting was moved from Monday to Thursday because the room was taken.",
        "The meeting will now be held on Thursday.",
    ),
    ("Translate into French: Good morning.", "Bonjour."),
    ("Give an antonym of 'hot'.", "An antonym of 'hot' is 'cold'."),
    (
        "Why do leaves fall in autumn?",
        "Trees drop their leaves to save water and energy while the days are short and cold.",
    ),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Is a tomato a fruit?", "Yes. It grows from the flower and holds the seeds."),
    (
        "Rewrite politely: Give me the report.",
        "Could you please send me the report when you have a moment?",
    ),
]
PROMPTS, RESPONSES = map(list, zip(*ROWS, strict=True))


@pytest.fixture(scope="module")
def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pruned(original, tokenizer):
    """By sparsity: the smallest weights are zero."""
    text = " ".join(RESPONSES)
    calibration = Calibration.from_text(text, tokenizer, windows=1, tokens=16)
    found = {}
    for sparsity in (0.2, 0.5):
        model = copy.deepcopy(original)
        method = load_method("magnitude", sparsity=sparsity)
        method.plan(model, calibration, progress=False).apply(model)
        found[sparsity] = model
    return found


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_more_weights_are_lost_the_further_apart(original, pruned, tokenizer, template):
    found = {
        sparsity: ResponseDivergence(original, model, tokenizer, template=template)(
            PROMPTS, RESPONSES
        )
        for sparsity, model in pruned.items()
    }
    print({sparsity: scores.round(3).tolist() for sparsity, scores in found.items()})
    assert (found[0.2] > 0.005).all()
    assert (found[0.5] > 3 * found[0.2]).all()
    assert (found[0.5] < np.log(2)).all()


@torch.no_grad()
def test_bounds_of_the_twenty_likeliest_tokens_hold(original, pruned, tokenizer):
    scorer = ResponseDivergence(original, pruned[0.5], tokenizer)
    scores = scorer(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores, strict=True):
        ids, start = encode(tokenizer, worded(tokenizer, prompt, "plain"), response)
        text = torch.tensor(ids)
        both = [
            torch.log_softmax(model(text[None]).logits[0, start - 1 : -1].double(), dim=-1)
            for model in (original, pruned[0.5])
        ]
        exact = jensen_shannon(*both).numpy()
        assert exact.mean() == pytest.approx(score, abs=1e-5)

        top = [x.topk(20).indices for x in both]
        union = torch.cat(top, dim=1)
        asked = []
        for x in both:
            x = x.gather(1, union).numpy()
            for row, tokens in zip(x, union.tolist(), strict=True):
                row[[t in tokens[:j] for j, t in enumerate(tokens)]] = -np.inf  # told before
            asked.append(x)
        lists = [
            TopTokens.read([None, *map(listed, x.tolist(), t.tolist(), ids[start:])], 20)
            for x, t in zip(both, top, strict=True)
        ]
        for found in (jensen_shannon_interval(*asked), top_tokens_interval(*lists)):
            assert (found.low <= exact + 1e-9).all()
            assert (exact <= found.high + 1e-9).all()
            mean = found.mean()
            assert 0 < mean.low <= score + 1e-5
            assert score - 1e-5 <= mean.high < np.log(2)


def listed(log_probs, top, token):
    """As a server tells it."""
    return {t: SimpleNamespace(logprob=log_probs[t]) for t in {*top, token}}
