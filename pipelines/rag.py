"""Retrieve → prune context → answer: a whole RAG request, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.language_model import Completion, LanguageModel, Message
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PrunedContext

INSTRUCTION = "Answer the question with a few words from the context."


class Searches(Protocol):
    """Whatever finds passages: `pipelines.retrieve.Retriever`, or yours."""

    def search(self, question: str, k: int = 5) -> list[dict[str, Any]]:
        """At most `k` passages with `text`, best first."""
        ...


@dataclass(frozen=True)
class Answer:
    """text: the model's answer; empty, with no completion, when no sentence was left to read.

    `context` says what was kept and dropped, and why; its passages are those that were retrieved.
    """

    text: str
    context: PrunedContext
    completion: Completion | None


def answer(
    question: str,
    *,
    retriever: Searches,
    pruner: ContextPruner,
    model: LanguageModel,
    k: int = 5,
    max_new_tokens: int = 64,
    **budget: Any,
) -> Answer:
    """Answer a question from documents.

    Args:
        question: What to ask.
        retriever: Finds `k` passages.
        pruner: Drops what does not help; `budget` is handed to its `prune` (threshold=…, …).
        model: Answers from what is left. It is not asked when nothing is left: a model without a
            context answers from memory, which looks the same and is not.
        k: Passages to retrieve.
        max_new_tokens: The longest answer, in the model's tokens.

    Raises:
        InputError: An empty question, two budgets, or one outside its range.
    """
    context = pruner.prune(question, retriever.search(question, k), **budget)
    if not context.text:
        return Answer("", context, None)
    completion = model.complete(messages(question, context.text), max_new_tokens)
    return Answer(completion.text, context, completion)


def messages(question: str, context: str) -> list[Message]:
    """The conversation that asks a model to answer from a context."""
    return [{"role": "user", "content": f"{INSTRUCTION}\n\n{context}\n\nQuestion: {question}"}]


def joined(passages: Sequence[Mapping[str, Any]]) -> str:
    """Unpruned passages as one context, laid out as `PrunedContext.text` is."""
    blocks = []
    for passage in passages:
        if text := passage["text"].lstrip("\r\n").rstrip():
            blocks.append(f"{passage['title']}\n{text}" if passage.get("title") else text)
    return "\n\n".join(blocks)
