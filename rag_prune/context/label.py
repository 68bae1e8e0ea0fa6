"""Silver labels: a language model says which sentences answer, and is asked twice more to be sure.

Paper: Provence: efficient and robust context pruning for retrieval-augmented generation (2025),
    arXiv:2501.16214, §3: a model answers a question from numbered sentences and cites those it
    used; what it cites is the label.
Differs from the paper: the reply is JSON of a given form instead of free text; sentences are those
    of our splitter, which the pruner is trained on; and an answer counts only when it is

    supported    half of its words stand in the cited sentences
    sufficient   asked with the cited sentences alone, the model gives the same answer
    necessary    asked with all the others alone, it finds no answer

    while "no answer" counts only where the answer is known, from the row or from another passage
    of the question, and does not stand in the passage: a weak model overlooks most answers.
    What fails is dropped, not kept without weight: rows without weight still serve the trainer as
    passages that do not answer, and whether they do is what is in doubt.
Cost: one prompt a passage; where it answers two more, whose passages together are one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import reprlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from prune_core.errors import InputError
from prune_core.provenance import provenance
from prune_core.storage import Shards, StrPath, read_jsonl, write_json, write_jsonl
from rag_prune.context.evaluate import contains, normalise_answer, token_f1
from rag_prune.context.highlight import write_page
from rag_prune.context.result import Budget, Passage, PrunedContext, Request, Scores
from rag_prune.context.sentences import readable

SAME = 0.5  # token F1 of two answers that say the same; share of an answer's words in its evidence
NO_ANSWER_WEIGHT = 0.5  # of a passage that does not answer, beside 1 for one that does
KEEP_EVERY = 32  # replies that a killed run may have to ask for again; a stopped one loses none

WORDING = """\
Question: {question}

{title}Passage, one numbered sentence a line:
{sentences}

Answer the question from these sentences and from nothing else that you know. Reply with JSON: \
"answer" is as short as it can be, in the passage's own words; "sentences" lists the numbers of \
all sentences that someone must read to give this answer and be sure of it, and of no others. If \
the sentences do not answer the question, reply {{"answer": null, "sentences": []}}"""
LONGEST_ANSWER = 200  # characters; a model that rambles stops there

_NOTHING = ("", "null", "no answer")  # how some models spell null inside a string
# Scripts that do not put spaces between words: each character counts as one.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")

Outcome = Literal[
    "answered",
    "no answer",
    "refused",
    "malformed",
    "uncited",
    "contradicts",
    "unsupported",
    "indiscriminate",
    "insufficient",
    "unnecessary",
    "unconfirmed",
]
KEPT: tuple[Outcome, ...] = ("answered", "no answer")
DROPPED: dict[Outcome, str] = {
    "refused": "the model could not read the prompt",
    "malformed": "the reply is not the JSON asked for, or names a sentence that is not there",
    "uncited": "it answers without citing, or cites without an answer",
    "contradicts": "it differs from the answer that is known, or overlooks it",
    "unsupported": "the answer does not stand in the cited sentences",
    "indiscriminate": "it cites every sentence, so that no second look could tell",
    "insufficient": "the cited sentences alone give another answer, or none",
    "unnecessary": "the other sentences answer without the cited ones",
    "unconfirmed": "it finds no answer here, and none in another passage of the question",
}


@dataclass(frozen=True)
class Prompt:
    """One user message, and the JSON schema of the reply."""

    text: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and its cost; `refused` when it could not, and `text` says why."""

    text: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    refused: bool = False


class Ask(Protocol):
    """A language model. `name` stands for it and for all that its replies depend on."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the prompt, its reply), each prompt once, in any order, as they come."""
        ...


@dataclass(frozen=True)
class Item:
    """What is labelled: a question and one passage; `answers` are those known before, if any."""

    question: str
    passage: Passage
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Label:
    """What became of an item.

    answer: what the model said first; None where it found no answer or no reply could be read.
    cited: the indices of the sentences it named, ascending.
    looks: of `supported`, `sufficient` and `necessary`, whether it passed those that were asked.
    """

    item: Item
    outcome: Outcome
    answer: str | None
    cited: tuple[int, ...]
    looks: dict[str, bool]

    def row(self) -> dict[str, Any]:
        """The training row (see `rag_prune.context.train_rows`) of an item that is kept."""
        passage, answers = self.item.passage, list(self.item.answers)
        if self.answer and self.answer in passage.text and self.answer not in answers:
            answers.append(self.answer)
        sentences = [passage.spans[i] for i in self.cited]
        return {
            "question": self.item.question,
            "title": passage.title,
            "passage": passage.text,
            "answers": answers,
            "evidence": [
                [start, start + len(passage.text[start:end].rstrip())] for start, end in sentences
            ],
            "weight": 1.0 if sentences else NO_ANSWER_WEIGHT,
        }


def read_items(path: StrPath) -> list[Item]:
    """Read a JSONL file of questions with a `passage` (and maybe `title`), or with `passages`.

    `passages` is a list of strings, or of objects with `text` and maybe `title`; a row may hold
    `answers` that are known. Raises InputError, naming the line, for anything else.
    """
    items: list[Item] = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            items += _items(row)
        except InputError as error:
            raise InputError(
                f"'{path}', line {number} (blank ones not counted): {error} A row has a question "
                "and a passage, or passages, and may have a title and answers."
            ) from None
    if not items:
        raise InputError(f"'{path}' holds nothing to label: give one JSON object a line.")
    return items


def _items(row: Mapping[str, Any]) -> Iterator[Item]:
    if ("passage" in row) == ("passages" in row):
        raise InputError("there must be either 'passage' or 'passages'.")
    given = row.get("passages", [{"text": row.get("passage"), "title": row.get("title")}])
    request = Request.read(row.get("question"), given)  # type: ignore[arg-type]
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        raise InputError(f"'answers' must be a list of texts, got {reprlib.repr(answers)}.")
    for i, passage in enumerate(request.passages):
        if not passage.text.strip():
            raise InputError(f"passage {i} holds no text.")
        yield Item(request.question, passage, tuple(answers))


def prompt(question: str, title: str | None, sentences: Sequence[str]) -> Prompt:
    """The prompt that asks for an answer and the sentences it needs, numbered from 1."""
    lines = (f"[{i}] {' '.join(sentence.split())}" for i, sentence in enumerate(sentences, 1))
    text = WORDING.format(
        question=question.strip(),
        title=f"Title: {title}\n\n" if title else "",
        sentences="\n".join(lines),
    )
    return Prompt(readable(text), _schema(len(sentences)))


def _schema(n_sentences: int) -> dict[str, Any]:
    """Of a reply: an answer with at least one citation, or neither.

    The numbers are listed and nothing asks for unique ones, as servers differ in whether they heed
    `minimum` and `maximum`, and xgrammar does not know `uniqueItems`.
    """

    def form(answer: dict[str, Any], **bounds: int) -> dict[str, Any]:
        numbers = {"type": "integer", "enum": list(range(1, n_sentences + 1))}
        return {
            "type": "object",
            "properties": {
                "answer": answer,
                "sentences": {"type": "array", "items": numbers, **bounds},
            },
            "required": ["answer", "sentences"],
            "additionalProperties": False,
        }

    text = {"type": "string", "minLength": 1, "maxLength": LONGEST_ANSWER}
    return {
        "anyOf": [
            form(text, minItems=1, maxItems=n_sentences),
            form({"type": "null"}, maxItems=0),
        ]
    }


def read_reply(text: str, n_sentences: int) -> tuple[str | None, tuple[int, ...]] | None:
    """(answer or None, indices of the cited sentences from 0); None for a reply of another form.

    The JSON may stand in a fence or after other words, as models write it where no server holds
    them to a schema.
    """
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
        answer, numbers = value["answer"], value["sentences"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(answer, str | None) or not isinstance(numbers, list):
        return None
    if not all(type(n) is int and 1 <= n <= n_sentences for n in numbers):
        return None
    if answer is not None and answer.strip().lower().rstrip(".") in _NOTHING:
        answer = None
    return answer, tuple(sorted({n - 1 for n in numbers}))


def label(items: Sequence[Item], ask: Ask, folder: StrPath, *, progress: bool = True) -> Labels:
    """Label items, in their order; goes on where an earlier run with the same folder stopped.

    Args:
        items: Questions and passages, see `read_items`.
        ask: The language model, see `pipelines.ask`.
        folder: Keeps the replies, so that no prompt is put to the model twice, in no run: not
            after a stop, and not when items are added.
        progress: Show progress bars.

    Raises:
        InputError: The folder holds the replies of another model, or the model refused every
            prompt.
    """
    replies = _Replies(ask, folder, progress)
    firsts = replies.get([_about(item) for item in items], "labelling")
    if firsts and all(reply.refused for reply in firsts):
        raise InputError(
            f"The model refused all {len(firsts)} prompts. Of the first it said: {firsts[0].text}"
        )
    labels = [_first_look(item, reply) for item, reply in zip(items, firsts, strict=True)]
    doubtful = [i for i, found in enumerate(labels) if found.outcome == "answered"]
    pairs = [_second_prompts(labels[i]) for i in doubtful]
    answers = iter(replies.get([p for pair in pairs for p in pair], "checking"))
    for i, pair in zip(doubtful, pairs, strict=True):
        labels[i] = _second_look(labels[i], [next(answers) for _ in pair])
    _confirm(labels)
    return Labels(labels, replies.cost(), ask.name)


def _about(item: Item, sentences: Sequence[int] | None = None) -> Prompt:
    """The prompt on all of an item's sentences, or on some."""
    text, spans = item.passage.text, item.passage.spans
    chosen = spans if sentences is None else [spans[i] for i in sentences]
    return prompt(item.question, item.passage.title, [text[start:end] for start, end in chosen])


def _first_look(item: Item, reply: Reply) -> Label:
    passage = item.passage
    if reply.refused:
        return Label(item, "refused", None, (), {})
    read = read_reply(reply.text, len(passage.spans))
    if read is None:
        return Label(item, "malformed", None, (), {})
    answer, cited = read
    outcome: Outcome = "answered"
    looks = {}
    if (answer is None) != (not cited):
        outcome = "uncited"
    elif answer is None:
        there = any(_holds(passage.text, known) for known in item.answers)
        outcome = "contradicts" if there else "no answer"
    elif item.answers and not any(_same(answer, known) for known in item.answers):
        outcome = "contradicts"
    else:
        evidence = " ".join(passage.text[slice(*passage.spans[i])] for i in cited)
        looks["supported"] = _supports(evidence, answer)
        if not looks["supported"]:
            outcome = "unsupported"
        elif len(cited) == len(passage.spans) > 1:
            outcome = "indiscriminate"
    return Label(item, outcome, answer, cited, looks)


def _second_prompts(found: Label) -> list[Prompt]:
    """With the cited sentences alone; and with the others alone, where there are any."""
    others = [i for i in range(len(found.item.passage.spans)) if i not in found.cited]
    parts = [found.cited, others] if others else [found.cited]
    return [_about(found.item, part) for part in parts]


def _second_look(found: Label, replies: Sequence[Reply]) -> Label:
    read = []
    others = len(found.item.passage.spans) - len(found.cited)
    for reply, n in zip(replies, (len(found.cited), others), strict=False):
        read.append(None if reply.refused else read_reply(reply.text, n))
    with_cited = read[0]
    again = with_cited[0] if with_cited else None
    looks = found.looks | {"sufficient": again is not None and _same(again, found.answer or "")}
    if others:
        looks["necessary"] = read[1] is not None and read[1][0] is None
    outcome = found.outcome
    if not looks["sufficient"]:
        outcome = "insufficient"
    elif not looks.get("necessary", True):
        outcome = "unnecessary"
    return Label(found.item, outcome, found.answer, found.cited, looks)


def _confirm(labels: list[Label]) -> None:
    """Let "no answer" stand only beside an answer that is known and not in the passage."""
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for found in labels:
        if found.outcome == "answered" and found.answer:
            answers[found.item.question].append(found.answer)
    for i, found in enumerate(labels):
        if found.outcome == "no answer" and not found.item.answers:
            known = answers[found.item.question]
            if any(_holds(found.item.passage.text, answer) for answer in known):
                labels[i] = replace(found, outcome="contradicts")
            elif not known:
                labels[i] = replace(found, outcome="unconfirmed")


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text)


def _holds(text: str, answer: str) -> bool:
    return bool(contains(_spaced(text), [_spaced(answer)]))


def _same(one: str, other: str) -> bool:
    """Whether two answers say the same: one holds the other, or they share most of their words."""
    f1 = token_f1(_spaced(one), [_spaced(other)])
    return f1 >= SAME or _holds(one, other) or _holds(other, one)


def _supports(evidence: str, answer: str) -> bool:
    """Whether an answer's words stand in its evidence; yes and no need not, the looks decide."""
    words = Counter(normalise_answer(_spaced(answer)))
    if set(words) <= {"yes", "no"}:
        return True
    there = words & Counter(normalise_answer(_spaced(evidence)))
    return there.total() >= SAME * words.total()


class _Replies:
    """A model's replies in a folder, found again by what was asked."""

    def __init__(self, ask: Ask, folder: StrPath, progress: bool) -> None:
        self.ask, self.progress = ask, progress
        self.shards = Shards(folder, {"model": ask.name})
        self.rows = {row["asked"]: row for row in self.shards.rows()}

    def get(self, prompts: Sequence[Prompt], doing: str) -> list[Reply]:
        """The replies to prompts, in their order; only what was never asked goes to the model."""
        from tqdm.auto import tqdm

        keys = [_key(p) for p in prompts]
        new = {key: p for key, p in zip(keys, prompts, strict=True) if key not in self.rows}
        refused: dict[str, Reply] = {}  # not kept: another setting of the server may help
        unsaved: list[dict[str, Any]] = []
        order = list(new)
        started = time.monotonic()
        bar = tqdm(total=len(new), desc=doing, unit=" prompts", disable=not self.progress)
        try:
            for i, reply in self.ask(list(new.values())) if new else ():
                bar.update()
                if reply.refused:
                    refused[order[i]] = reply
                    continue
                now = time.monotonic()
                # Replies come many at a time: what they took together is the sum of these.
                row = {"asked": order[i], **asdict(reply), "seconds": round(now - started, 4)}
                del row["refused"]
                started = now
                self.rows[order[i]] = row
                unsaved.append(row)
                if len(unsaved) == KEEP_EVERY:
                    self._save(unsaved)
        finally:
            bar.close()
            self._save(unsaved)
        return [refused.get(key) or self._reply(key) for key in keys]

    def _reply(self, key: str) -> Reply:
        row = self.rows[key]
        return Reply(row["text"], row["prompt_tokens"], row["new_tokens"])

    def _save(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            free = next(i for i in itertools.count() if i not in self.shards)
            self.shards.write(free, rows)
            rows.clear()

    def cost(self) -> dict[str, Any]:
        """Prompts, tokens and seconds of all that is kept, in this run and in earlier ones."""
        kept = self.rows.values()
        counts = {name: sum(r[name] for r in kept) for name in ("prompt_tokens", "new_tokens")}
        seconds = round(sum(r["seconds"] for r in kept), 1)
        return {"prompts": len(kept), **counts, "seconds": seconds}


def _key(asked: Prompt) -> str:
    whole = json.dumps([asked.text, asked.schema], ensure_ascii=False)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Labels:
    """All labels, in the order of the items, and what they cost."""

    labels: Sequence[Label]
    cost: dict[str, Any]
    model: str

    def report(self) -> dict[str, Any]:
        """Counts by outcome, how many passed each look that they were given, and the cost."""
        outcomes = Counter(found.outcome for found in self.labels)
        looks: dict[str, dict[str, int]] = {}
        for name in ("supported", "sufficient", "necessary"):
            passed = [found.looks[name] for found in self.labels if name in found.looks]
            looks[name] = {"passed": sum(passed), "of": len(passed)}
        answered = [found for found in self.labels if found.outcome == "answered"]
        cited = sum(len(found.cited) for found in answered)
        return {
            "model": self.model,
            "items": len(self.labels),
            "kept": sum(outcomes[name] for name in KEPT),
            "outcomes": {name: outcomes[name] for name in (*KEPT, *DROPPED)},
            "looks": looks,
            "evidence_sentences_an_answer": round(cited / max(1, len(answered)), 2),
            "cost": self.cost,
        }

    def summary(self) -> str:
        """The report in a few lines."""
        report = self.report()
        cost, looks = report["cost"], report["looks"]
        counts = ", ".join(f"{n} {name}" for name, n in report["outcomes"].items() if n)
        passed = ", ".join(f"{x['passed']} of {x['of']} {name}" for name, x in looks.items())
        return (
            f"{report['kept']} of {report['items']} kept: {counts}\n"
            f"looks passed: {passed}\n"
            f"{cost['prompts']} prompts, {cost['prompt_tokens']} tokens read, "
            f"{cost['new_tokens']} written, {cost['seconds']} s"
        )

    def save(self, out: Path, page: Path | None = None, *, shown: int = 50) -> None:
        """Write the training rows to `out`, and what was dropped and the report beside it.

        For rows.jsonl that is rows.dropped.jsonl, with the reason and what the model said, and
        rows.report.json. `page`: also an HTML page of the first `shown` answers that are kept.

        Raises InputError when no row was kept.
        """
        kept = [found for found in self.labels if found.outcome in KEPT]
        dropped = [found for found in self.labels if found.outcome not in KEPT]
        write_jsonl(out.with_suffix(".dropped.jsonl"), [_dropped(found) for found in dropped])
        record = provenance(report=self.report())
        write_json(out.with_suffix(".report.json"), record)
        if not kept:
            raise InputError(
                f"None of the {len(self.labels)} labels held: see why in "
                f"'{out.with_suffix('.dropped.jsonl')}', and ask a larger model."
            )
        write_jsonl(out, [found.row() for found in kept])
        if page:
            self.write_page(page, shown=shown)

    def write_page(self, path: str | PathLike[str], *, shown: int = 50) -> None:
        """Write a page of the answers that are kept: evidence dark, the rest faint."""
        answered = [found for found in self.labels if found.outcome == "answered"][:shown]
        if not answered:
            raise InputError("There is no answered row to show: ask a larger model.")
        write_page([_shown(found) for found in answered], path, title=f"Labels of {self.model}")


def _dropped(found: Label) -> dict[str, Any]:
    passage = found.item.passage
    return {
        "question": found.item.question,
        "title": passage.title,
        "passage": passage.text,
        "reason": f"{found.outcome}: {DROPPED[found.outcome]}",
        "answer": found.answer,
        "cited": [passage.text[slice(*passage.spans[i])].strip() for i in found.cited],
    }


def _shown(found: Label) -> dict[str, Any]:
    """A label in the form of a pruning, the answer behind the question."""
    passage = found.item.passage
    cited = np.zeros(len(passage.spans))
    cited[list(found.cited)] = 1.0
    request = Request(found.item.question, (passage,))
    result = PrunedContext.from_scores(
        request, [Scores(1.0, cited)], Budget(threshold=0.5), method="silver label"
    )
    return result.to_dict() | {"question": f"{found.item.question} → {found.answer}"}
