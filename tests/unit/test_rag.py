"""Retrieve → prune → answer, with stand-ins that write down when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import Answer, answer
from pipelines.language_model import Completion, Message
from pipelines.rag import INSTRUCTION, joined, messages
from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.result import PrunedContext

PASSAGES = [
    {"id": "a", "title": "Paris", "text": "Paris is big. It has a tower."},
    {"id": "b", "title": "Radium", "text": "Radium glows. Marie Curie found radium in 1898."},
]


class Steps:
    """A retriever, a pruner and a model that note their calls in one list."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found = found
        self.calls: list[str] = []
        self.k = 0
        self.budget: dict[str, Any] = {}
        self.asked: list[Message] = []
        self.max_new_tokens = 0
        self._pruner = ContextPruner.from_pretrained(method="bm25")

    def search(self, question: str, k: int = 5) -> list[dict[str, Any]]:
        self.calls.append("search")
        self.k = k
        return self.found

    def prune(self, question: str, passages: Sequence[Any], **budget: Any) -> PrunedContext:
        self.calls.append("prune")
        self.budget = budget
        return self._pruner.prune(question, passages, **budget)

    def complete(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Completion:
        self.calls.append("complete")
        self.asked, self.max_new_tokens = list(messages), max_new_tokens
        return Completion("Marie Curie", 20, 2, 0.1)


def ask(steps: Steps, question: str = "Who found radium?", **options: Any) -> Answer:
    pruner: Any = steps
    return answer(question, retriever=steps, pruner=pruner, model=steps, **options)


def test_passages_are_found_then_pruned_then_read() -> None:
    steps = Steps(PASSAGES)
    result = ask(steps, threshold=0.9, k=2, max_new_tokens=9)
    assert steps.calls == ["search", "prune", "complete"]
    assert (steps.k, steps.max_new_tokens, steps.budget) == (2, 9, {"threshold": 0.9})
    kept = "Radium\nMarie Curie found radium in 1898."
    assert result.context.text == kept
    assert steps.asked == [
        {"role": "user", "content": f"{INSTRUCTION}\n\n{kept}\n\nQuestion: Who found radium?"}
    ]
    assert result.text == "Marie Curie"
    assert result.completion == Completion("Marie Curie", 20, 2, 0.1)
    assert [p.passage for p in result.context.passages] == PASSAGES


@pytest.mark.parametrize(
    ("found", "question"), [(PASSAGES, "Why do penguins swim?"), ([], "Who found radium?")]
)
def test_a_model_without_a_context_is_not_asked(found: list[dict[str, Any]], question: str) -> None:
    steps = Steps(found)
    result = ask(steps, question)
    assert steps.calls == ["search", "prune"]
    assert (result.text, result.completion) == ("", None)
    assert all(not p.kept for p in result.context.passages)


@pytest.mark.parametrize("found", [PASSAGES, []])
@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(found: list[dict[str, Any]], question: str) -> None:
    steps = Steps(found)
    with pytest.raises(InputError, match="question must be a string with some text"):
        ask(steps, question)
    assert "complete" not in steps.calls


@pytest.mark.parametrize("budget", [{"threshold": 2}, {"threshold": 0.1, "keep_ratio": 0.5}])
def test_a_bad_budget_is_refused_before_the_model_is_asked(budget: dict[str, Any]) -> None:
    steps = Steps(PASSAGES)
    with pytest.raises(InputError):
        ask(steps, **budget)
    assert "complete" not in steps.calls


texts = st.text(alphabet=st.sampled_from("ab. \n\r\té。#-🙂"), max_size=40)
passages = st.lists(
    st.fixed_dictionaries({"text": texts}, optional={"title": st.none() | texts}),
    max_size=4,
    # An exact copy of a passage is dropped, which `joined` leaves to its caller.
    unique_by=lambda p: (p.get("title") or None, p["text"]),
)


@settings(deadline=None)
@given(passages)
def test_full_and_pruned_contexts_are_laid_out_alike(found: list[dict[str, Any]]) -> None:
    pruner = ContextPruner.from_pretrained(method="keep_all")
    everything = pruner.prune("Who?", found, keep_ratio=1.0, reorder=False)
    assert joined(found) == everything.text


def test_messages_hold_context_and_question_as_they_are() -> None:
    context = "A\n\n{b} %s </s>"
    (message,) = messages("Who is {x}?", context)
    assert message["role"] == "user"
    assert message["content"].endswith(f"\n\n{context}\n\nQuestion: Who is {{x}}?")
