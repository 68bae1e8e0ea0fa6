"""A page to look at: what was kept and dropped of each passage, and a slider to cut again.

The passages are hostile text. Three walls stand between them and the reader's browser: Jinja
escapes every string, `_presentable` shows the characters that work unseen, and the page's policy
lets no script or style run except the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from prune_core.errors import InputError
from prune_core.storage import atomic_write

LIMIT = 20_000
"""Characters that one text of the caller's takes on the page at most; a passage's last sentence
may pass it."""

# Why a whole passage is out, whatever its sentences score; `result.py` words the reasons.
_BARRED = ("duplicate of ", "relevance rank ")

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # controls, but for tab and line ends
    "\u202a-\u202e\u2066-\u2069"  # what turns the direction of text around
    "\ud800-\udfff]"  # halves of a character, which no file can hold
)

_WORDS = re.compile(r"\S[^\n]*")
# The end of a line that was wrapped by hand: a long one, with prose going on below.
_WRAPPED = re.compile(r"\n(?<=[^\n]{40}\n)(?=[^\W\d_]|[\"'“‘(`])")


def write_page(
    results: Sequence[Mapping[str, Any]],
    path: str | PathLike[str],
    *,
    title: str = "prunekit",
    summary: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write one self-contained HTML page: what was kept, what was dropped, a slider to re-cut.

    The page loads nothing from anywhere and appears under `path` only when it is complete.

    Args:
        results: What `PrunedContext.to_dict()` gives, one for each question. Each may also carry
            `answers`, what a language model made of its contexts: a list of {"context": "pruned",
            "answer": "…", "prompt_tokens": 176, "seconds": 1.2, "correct": True, False or None}.
        path: The file to write; its folder is made if need be.
        title: Names the page.
        summary: The rows of a table above the questions, as {column: cell}; the first row names
            the columns.

    Raises:
        InputError: No results.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    if not results:
        raise InputError(
            "A page needs at least one result, got none: prune a question and pass "
            "[result.to_dict()]."
        )
    here = Path(__file__)
    style, script, template = (
        here.with_name(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "page.html.j2")
    )
    environment = Environment(
        autoescape=True, finalize=_presentable, undefined=StrictUndefined, trim_blocks=True
    )
    questions = [_Question.read(result) for result in results]
    thresholds = {result["threshold"] for result in results}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    page = environment.from_string(template).generate(
        title=title,
        summary=summary,
        questions=questions,
        methods=sorted({result["method"] for result in results}),
        threshold=threshold,
        # The slider moves along the root, which is finer near 0, where most probabilities are.
        position=math.sqrt(0.1 if threshold is None else threshold),
        size=sum(question.size for question in questions),
        kept_size=sum(question.kept_size for question in questions),
        style=Markup(style),
        style_hash=_sha256(style),
        script=Markup(script),
        script_hash=_sha256(script),
    )
    with atomic_write(path) as file:
        file.writelines(page)


@dataclass(frozen=True)
class _Sentence:
    """runs: what the page shows of it, see `_runs`.   shown, size: characters, there and in all."""

    runs: tuple[tuple[str, bool, str], ...]
    shown: int
    size: int
    score: float
    reason: str
    kept: bool

    @property
    def barred(self) -> bool:
        """Whether no threshold brings it back."""
        return self.reason.startswith(_BARRED)

    @property
    def why(self) -> str:
        """Its score and reason."""
        return (
            self.reason
            if self.reason.startswith("score ")
            else f"score {self.score:.3g}, {self.reason}"
        )


@dataclass(frozen=True)
class _Passage:
    """One passage; its `sentences` are all there, whatever the page shows of them."""

    index: int
    title: str | None
    rank: int
    relevance: float
    sentences: tuple[_Sentence, ...]

    @classmethod
    def read(cls, passage: Mapping[str, Any]) -> _Passage:
        """Over the limit, kept sentences are shown before dropped ones, high scores before low."""
        spans = sorted(
            [(span, True) for span in passage["kept"]]
            + [(span, False) for span in passage["dropped"]],
            key=lambda pair: (pair[0]["start"], pair[0]["end"]),
        )
        shown = [0] * len(spans)
        room = LIMIT
        for i in sorted(range(len(spans)), key=lambda i: (not spans[i][1], -spans[i][0]["score"])):
            if room > 0:
                shown[i] = min(spans[i][0]["end"] - spans[i][0]["start"], LIMIT)
                room -= shown[i]
        return cls(
            passage["index"],
            passage["title"],
            passage["rank"],
            passage["relevance"],
            tuple(
                _Sentence(
                    tuple(_runs(passage["text"], span["start"], span["start"] + length))
                    if length
                    else (),
                    length,
                    span["end"] - span["start"],
                    span["score"],
                    span["reason"],
                    kept,
                )
                for (span, kept), length in zip(spans, shown, strict=True)
            ),
        )

    @property
    def stretches(self) -> Iterator[tuple[list[_Sentence], list[tuple[float, int]] | None]]:
        """Runs of sentences that are shown, with None, or not, with what a new cut must know."""
        for shown, group in groupby(self.sentences, lambda sentence: sentence.shown > 0):
            run = list(group)
            yield run, None if shown else [(s.score, s.size) for s in run if not s.barred]

    @property
    def kept(self) -> int:
        """How many sentences are kept."""
        return sum(sentence.kept for sentence in self.sentences)

    @property
    def barred(self) -> str | None:
        """Why none of its sentences may stay, if so."""
        return next((s.reason for s in self.sentences if s.barred), None)


@dataclass(frozen=True)
class _Question:
    """passages: the most relevant one first.   size, kept_size: in characters."""

    question: str
    passages: tuple[_Passage, ...]
    answers: Sequence[Mapping[str, Any]]
    size: int
    kept_size: int

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> _Question:
        """From `PrunedContext.to_dict()`, maybe with answers."""
        passages = sorted(map(_Passage.read, result["passages"]), key=lambda p: p.rank)
        sentences = [sentence for passage in passages for sentence in passage.sentences]
        return cls(
            result["question"],
            tuple(passages),
            result.get("answers", ()),
            sum(s.size for s in sentences),
            sum(s.size for s in sentences if s.kept),
        )


def _runs(text: str, start: int, end: int) -> Iterator[tuple[str, bool, str]]:
    """The text from start to end, in runs of white space and the words of one line after it.

    Only words are underlined, and a narrow screen does not keep the line ends of prose that was
    wrapped by hand: those are marked with True.
    """
    at = start
    for match in _WORDS.finditer(text, start, end):
        words = match[0].rstrip()
        yield text[at : match.start()], _is_wrapped(text, at, match.start()), words
        at = match.start() + len(words)
    yield text[at:end], _is_wrapped(text, at, end), ""


def _is_wrapped(text: str, start: int, end: int) -> bool:
    return start < end and _WRAPPED.match(text, end - 1) is not None


def _presentable(value: object) -> object:
    """What the template prints, where every string passes: short enough, with nothing unseen in it.

    Our own style, script and escaped text, which say so with `__html__`, stay as they are.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    unshown = len(value) - LIMIT
    return _UNSEEN.sub(_seen, value[:LIMIT]) + (
        f" … {unshown:,} characters not shown" if unshown > 0 else ""
    )


def _seen(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\ufffd" if code == 0 or 0xD800 <= code <= 0xDFFF else f"⟨U+{code:04X}⟩"


def _sha256(text: str) -> str:
    """The name by which a content security policy allows an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
