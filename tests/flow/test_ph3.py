"""PH3's claim in short: a real model without four memory heads follows its context more."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.small_model import small_model
from rag_prune.heads import PH3, Conflict

CAPITALS = (
    "France Paris; Italy Rome; Germany Berlin; Spain Madrid; Japan Tokyo; Russia Moscow; "
    "Egypt Cairo; Greece Athens; Portugal Lisbon; Austria Vienna; Poland Warsaw; Sweden Stockholm"
)
# Another relation than the one in which the heads are found.
CITIES = (
    "Munich Germany; Hamburg Germany; Lyon France; Marseille France; Milan Italy; Venice Italy; "
    "Barcelona Spain; Osaka Japan; Shanghai China; Mumbai India; Toronto Canada; Sydney Australia; "
    "Melbourne Australia; Alexandria Egypt; Istanbul Turkey; Porto Portugal"
)


def conflicts(statement, facts):
    pairs = [fact.split() for fact in facts.split("; ")]

    def told(i, shift):
        asked = statement.format(pairs[i % len(pairs)][0])
        return f"{asked} {pairs[(i + shift) % len(pairs)][1]}. {asked}"

    return [
        Conflict(told(i, 5), told(i + 3, 4), f" {right}", f" {pairs[(i + 5) % len(pairs)][1]}")
        for i, (_, right) in enumerate(pairs)
    ]


@pytest.mark.slow
def test_without_memory_heads_a_real_model_follows_its_context() -> None:
    folder = small_model(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = PH3.find(model, tokenizer, conflicts("The capital of {} is", CAPITALS), progress=False)
    asked = conflicts("{} is a city in the country of", CITIES)

    @torch.no_grad()
    def share(answer: str) -> float:
        hits = []
        for conflict in asked:
            ids = tokenizer(conflict.prompt, return_tensors="pt").input_ids
            said = tokenizer.decode(model(ids).logits[0, -1].argmax())
            hits.append(getattr(conflict, answer).startswith(said))
        return sum(hits) / len(hits)

    before = share("context")
    with PH3(prefer="context", heads=4, scores=scores).apply(model):
        assert share("context") >= before + 0.15
    assert share("context") == before
    layers = [layer for layer, _ in scores.ranked("context")[:4]]
    with PH3(heads=tuple((layer, 8) for layer in set(layers))).apply(model):
        assert share("context") < before + 0.15
