"""The demo's documents: Python's language reference, as every interpreter carries it for `help()`.

It is real technical prose of some half a megabyte, and already on the machine. The questions in
`questions.json` were written for it, with the sentences that answer them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.retrieve import cut_passages


def demo_passages() -> list[dict[str, Any]]:
    """Cut the reference into passages, each with `id`, `title`, `text` and `start`.

    `text` is an exact slice, from the character `start`, of the article named before the `#` in
    `id` (`pydoc_data.topics.topics`). The reference prints many sections twice, as an article and
    inside a longer one; a passage appears once, under the shorter article.
    """
    from pydoc_data.topics import topics

    passages: dict[str, dict[str, Any]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for passage in cut_passages(topics[name], source=name):
            passages.setdefault(passage["text"], passage)
    return list(passages.values())


def demo_questions() -> list[dict[str, Any]]:
    """Read the questions about the reference.

    Each has `question`; `answers`, short strings any of which is right; `topic`, the article that
    answers; and `evidence`, its sentences that do, with white space as single spaces. Where the
    reference has no answer, `answers` and `evidence` are empty and `topic` is None.
    """
    text = Path(__file__).with_name("questions.json").read_text(encoding="utf-8")
    questions: list[dict[str, Any]] = json.loads(text)
    return questions
