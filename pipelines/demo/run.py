"""The demo: questions on Python's own reference, answered from full and from pruned contexts."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.language_model import Completion, LanguageModel, LocalModel
from pipelines.rag import joined, messages
from pipelines.retrieve import Retriever
from pipelines.small_model import small_model
from prune_core.errors import InputError, PruneError
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune.context.evaluate import contains
from rag_prune.context.highlight import write_page
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PrunedContext

K = 5
MAX_NEW_TOKENS = 48
NOT_ASKED = "(not asked: no sentence was kept)"


def run(
    page: Path,
    *,
    questions: int | None = None,
    results: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo, print its table through `say`, write the page; returns the figures.

    Args:
        page: HTML file to write.
        questions: How many questions; all of them by default.
        results: JSON file for figures and provenance, if wanted.

    Without the language model the demo still prunes, and says what is missing.
    """
    asked = demo_questions()
    if questions is not None and not 1 <= questions <= len(asked):
        raise InputError(
            f"The demo has {len(asked)} questions, so --questions must be 1 to {len(asked)}, got "
            f"{questions}."
        )
    asked = asked[:questions]
    passages = demo_passages()
    say(f"{len(passages)} passages of Python's language reference, {len(asked)} questions")
    retriever = Retriever(passages)
    retrieved = [retriever.search(q["question"], K) for q in asked]
    pruner = ContextPruner.from_pretrained()
    contexts = pruner.prune_many(
        [(q["question"], found) for q, found in zip(asked, retrieved, strict=True)]
    )
    pages = [context.to_dict() for context in contexts]
    figures = _evidence(asked, retrieved, contexts)
    try:
        model = LocalModel.from_pretrained(small_model())
    except PruneError as error:
        say(f"No language model, so nothing is answered: {error}")
    else:
        texts = [
            {"full": joined(found), "pruned": context.text}
            for found, context in zip(retrieved, contexts, strict=True)
        ]
        figures |= _answer(model, asked, texts, pages)
    rows = _rows(figures)
    width = max(len(row["figure"]) for row in rows)
    say(f"{'':{width}}  {'full':>10}  {'pruned':>10}")
    for row in rows:
        say(f"{row['figure']:{width}}  {row['full']:>10}  {row['pruned']:>10}")
    write_page(pages, page, title="prunekit demo", summary=rows)
    say(f"Look at it: {page.resolve().as_uri()}")
    if results is not None:
        write_json(results, {"figures": figures, "provenance": provenance()})
    return figures


def _answer(
    model: LanguageModel,
    asked: Sequence[dict[str, Any]],
    texts: Sequence[dict[str, str]],
    pages: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Ask every question with each of its contexts; answers go into `pages`, figures come back."""
    given: dict[str, list[tuple[Completion, bool]]] = {name: [] for name in texts[0]}
    rows = list(zip(asked, texts, pages, strict=True))
    for question, contexts, page in tqdm(rows, desc=f"answering, {' and '.join(given)}"):
        page["answers"] = []
        for name, text in contexts.items():
            if text:
                completion = model.complete(messages(question["question"], text), MAX_NEW_TOKENS)
            else:  # as `pipelines.answer` does: without a context a model would make one up
                completion = Completion(NOT_ASKED, 0, 0, 0.0)
            right = bool(contains(completion.text, question["answers"]))
            given[name].append((completion, right))
            page["answers"].append(
                {
                    "context": name,
                    "answer": completion.text,
                    "prompt_tokens": completion.prompt_tokens,
                    "seconds": round(completion.seconds, 2),
                    "correct": right if question["answers"] else None,
                }
            )
    return {name: _cost(asked, completions) for name, completions in given.items()}


def _evidence(
    asked: Sequence[dict[str, Any]],
    retrieved: Sequence[list[dict[str, Any]]],
    contexts: Sequence[PrunedContext],
) -> dict[str, Any]:
    """What survived of the sentences that answer, among those that were retrieved at all."""
    kept = found = 0
    first = []
    for question, passages, context in zip(asked, retrieved, contexts, strict=True):
        whole, left = _plain(joined(passages)), _plain(context.text)
        found += sum(_plain(e) in whole for e in question["evidence"])
        kept += sum(_plain(e) in whole and _plain(e) in left for e in question["evidence"])
        right = [
            any(_plain(e) in _plain(p["text"]) for e in question["evidence"]) for p in passages
        ]
        if any(right):
            by_rank = sorted(context.passages, key=lambda p: p.rank)
            before = 1 + right.index(True)
            after = 1 + [right[p.index] for p in by_rank].index(True)
            first.append((1 / before, 1 / after))
    return {
        "questions": len(asked),
        "evidence_found": found,
        "evidence_kept": kept,
        "mrr_before": statistics.fmean(b for b, _ in first) if first else None,
        "mrr_after": statistics.fmean(a for _, a in first) if first else None,
        "keep_ratio": statistics.fmean(c.keep_ratio for c in contexts),
    }


def _cost(
    asked: Sequence[dict[str, Any]], given: Sequence[tuple[Completion, bool]]
) -> dict[str, float]:
    answerable = [right for q, (_, right) in zip(asked, given, strict=True) if q["answers"]]
    return {
        "right": sum(answerable),
        "answerable": len(answerable),
        "prompt_tokens": round(statistics.fmean(c.prompt_tokens for c, _ in given), 1),
        "seconds": round(statistics.fmean(c.seconds for c, _ in given), 2),
    }


def _rows(figures: dict[str, Any]) -> list[dict[str, str]]:
    """The table of the terminal and of the page."""

    def row(figure: str, full: str, pruned: str) -> dict[str, str]:
        return {"figure": figure, "full": full, "pruned": pruned}

    rows = [row("characters kept", "100 %", f"{figures['keep_ratio']:.0%}".replace("%", " %"))]
    found = figures["evidence_found"]
    rows.append(row("evidence sentences", f"{found}", f"{figures['evidence_kept']} of {found}"))
    if figures["mrr_before"] is not None:
        before, after = figures["mrr_before"], figures["mrr_after"]
        rows.append(row("right passage (MRR)", f"{before:.2f}", f"{after:.2f}"))
    if "full" in figures:
        full, pruned = figures["full"], figures["pruned"]
        rows += [
            row("prompt tokens", f"{full['prompt_tokens']:.0f}", f"{pruned['prompt_tokens']:.0f}"),
            row("seconds an answer", f"{full['seconds']:.2f}", f"{pruned['seconds']:.2f}"),
            row(
                "right answers",
                f"{full['right']} of {full['answerable']}",
                f"{pruned['right']} of {pruned['answerable']}",
            ),
        ]
    return rows


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
