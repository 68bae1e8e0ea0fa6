"""What a pruning left and dropped, with scores and reasons; cut again without a model call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune_core.errors import InputError
from prune_core.results import cut
from rag_prune.context.sentences import Span, readable, split

PassageLike = str | Mapping[str, Any]


@dataclass(frozen=True)
class Passage:
    """A passage as the caller gave it, and its sentences: character spans that tile `text`."""

    given: PassageLike
    title: str | None
    text: str
    spans: tuple[Span, ...]

    @classmethod
    def read(cls, given: PassageLike, index: int) -> Passage:
        """Raises InputError unless `given` is a string, or a mapping with `text`, maybe `title`."""
        text, title = (
            (given.get("text"), given.get("title")) if isinstance(given, Mapping) else (given, None)
        )
        if not isinstance(text, str) or not (title is None or isinstance(title, str)):
            keys = f" with {sorted(map(str, given))}" if isinstance(given, Mapping) else ""
            raise InputError(
                f"Passage {index} must be a string, or a mapping with the strings 'text' and maybe "
                f"'title', got {type(given).__name__}{keys}."
            )
        return cls(given, title or None, text, tuple(split(text)))


@dataclass(frozen=True)
class Request:
    """A question and its passages: what a scorer scores."""

    question: str
    passages: tuple[Passage, ...]

    @classmethod
    def read(cls, question: str, passages: Sequence[PassageLike]) -> Request:
        """Raises InputError for an empty question, and for passages that are no list of them."""
        if not isinstance(question, str) or not question.strip():
            raise InputError(
                f"The question must be a string with some text in it, got {question!r}."
            )
        if isinstance(passages, str | bytes | Mapping) or not isinstance(passages, Sequence):
            raise InputError(
                "The passages must be a list of strings or mappings, got "
                f"{type(passages).__name__}."
            )
        return cls(question, tuple(Passage.read(p, i) for i, p in enumerate(passages)))


@dataclass(frozen=True, eq=False)
class Scores:
    """relevance: of the passage, in [0, 1].   sentences: (n_sentences,) probabilities to help.

    A scorer that cuts finer than sentences gives the spans that it scored: they tile the text.
    """

    relevance: float
    sentences: NDArray[np.float64]
    spans: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Budget:
    """How much may stay: exactly one of `threshold`, `keep_ratio` and `max_tokens`; maybe `top_k`.

    The fields are the arguments of `ContextPruner.prune`.

    Raises:
        InputError: No budget, two budgets, or a value outside its range.
    """

    threshold: float | None = None
    keep_ratio: float | None = None
    max_tokens: int | None = None
    tokenizer: Any = field(default=None, repr=False)
    top_k: int | None = None

    def __post_init__(self) -> None:
        budgets = ("threshold", "keep_ratio", "max_tokens")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                "Give exactly one of threshold, keep_ratio and max_tokens, got "
                f"{' and '.join(given) or 'none'}: choose one budget."
            )
        if self.max_tokens is None:
            cut([], [], threshold=self.threshold, keep_ratio=self.keep_ratio)  # checks their range
        elif not _is_count(self.max_tokens, least=0):
            raise InputError(
                f"max_tokens must be a whole number >= 0, got {self.max_tokens!r}: try 512."
            )
        elif self.tokenizer is None:
            raise InputError(
                "max_tokens needs tokenizer=…, the one of the model that reads the text: anything "
                "with encode(text), such as a transformers or tiktoken tokenizer."
            )
        if self.top_k is not None and not _is_count(self.top_k, least=1):
            raise InputError(
                f"top_k must be a whole number of passages >= 1, got {self.top_k!r}: try 5."
            )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


@dataclass(frozen=True)
class Sentence:
    """One sentence: `text` is the caller's string from `start` to `end`."""

    start: int
    end: int
    score: float
    reason: str
    text: str


@dataclass(frozen=True, eq=False)
class PrunedPassage:
    """One passage after pruning.

    Attributes:
        passage: The caller's own object, untouched.
        index: Its place in the caller's list.
        relevance: Its ranking score in [0, 1]; higher is better.
        rank: 0 for the most relevant passage of the request.
    """

    passage: PassageLike
    index: int
    relevance: float
    rank: int
    _text: str = field(repr=False)
    _spans: tuple[Span, ...] = field(repr=False)
    _scores: NDArray[np.float64] = field(repr=False)
    _kept: NDArray[np.bool_] = field(repr=False)
    _reasons: tuple[str, ...] = field(repr=False)

    @property
    def kept(self) -> list[Sentence]:
        """The sentences that stay, in the order of the passage."""
        return self._select(True)

    @property
    def dropped(self) -> list[Sentence]:
        """The sentences that go; with `kept` they tile the passage."""
        return self._select(False)

    def _select(self, wanted: bool) -> list[Sentence]:
        return [
            Sentence(start, end, float(self._scores[i]), self._reasons[i], self._text[start:end])
            for i, (start, end) in enumerate(self._spans)
            if self._kept[i] == wanted
        ]

    @property
    def text(self) -> str:
        """The kept sentences joined as they stand; no character is added or changed."""
        return "".join(
            self._text[start:end] for i, (start, end) in enumerate(self._spans) if self._kept[i]
        )

    @property
    def pruned(self) -> PassageLike:
        """The passage in the type it was given in, its text cut; a mapping keeps its other keys."""
        return self.text if isinstance(self.passage, str) else {**self.passage, "text": self.text}


@dataclass(frozen=True, eq=False)
class PrunedContext:
    """The result of pruning the passages of one question; `passages` are in the caller's order."""

    question: str
    passages: tuple[PrunedPassage, ...]
    method: str
    reorder: bool
    budget: Budget
    _request: Request = field(repr=False)
    _scores: tuple[Scores, ...] = field(repr=False)

    @classmethod
    def from_scores(
        cls,
        request: Request,
        scores: Sequence[Scores],
        budget: Budget,
        *,
        method: str,
        reorder: bool = True,
    ) -> PrunedContext:
        """Cut scored passages at a budget."""
        passages = (
            p if s.spans is None else replace(p, spans=s.spans)
            for p, s in zip(request.passages, scores, strict=True)
        )
        request = replace(request, passages=tuple(passages))
        uncut = cls(request.question, (), method, reorder, budget, request, tuple(scores))
        return uncut._cut() if budget.max_tokens is None else uncut._cut_at_tokens()

    def recut(
        self,
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        tokenizer: Any = None,
    ) -> PrunedContext:
        """The same passages cut at another budget, as a new result; no model is called.

        Exactly one budget is given: `threshold` in [0, 1] keeps the sentences whose probability is
        at least that; `keep_ratio` in [0, 1] keeps the best sentences up to that share of the
        characters; `max_tokens` keeps the best sentences such that `text` has at most that many
        tokens of `tokenizer`. A `top_k` given before still holds.

        Raises:
            InputError: No budget, two budgets, or one outside its range.
        """
        return PrunedContext.from_scores(
            self._request,
            self._scores,
            Budget(threshold, keep_ratio, max_tokens, tokenizer, self.budget.top_k),
            method=self.method,
            reorder=self.reorder,
        )

    def _cut(
        self, sizes: Sequence[int] | None = None, max_size: int | None = None
    ) -> PrunedContext:
        """Cut at the budget; one of tokens as `max_size` for `sizes`, one a sentence."""
        passages, budget = self._request.passages, self.budget
        relevance = np.array([s.relevance for s in self._scores])
        order = np.argsort(-relevance, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        barred = _barred(passages, order.tolist(), budget.top_k)
        counts = np.array([len(p.spans) for p in passages], dtype=np.int64)
        owner = np.repeat(np.arange(len(passages)), counts).tolist()
        eligible = np.array([barred[i] is None for i in owner], dtype=np.bool_)
        lengths = np.array(
            [end - start for p in passages for start, end in p.spans], dtype=np.int64
        )
        if budget.keep_ratio is not None:  # of all characters, also of those that may not stay
            max_size = math.floor(budget.keep_ratio * int(lengths.sum()))
        decision = cut(
            np.concatenate([np.zeros(0), *(s.sentences for s in self._scores)])[eligible],
            (lengths if sizes is None else np.array(sizes, dtype=np.int64))[eligible],
            threshold=budget.threshold,
            max_size=max_size,
        )
        kept = np.zeros(len(lengths), dtype=np.bool_)
        kept[eligible] = decision.kept
        reasons = list(decision.reasons)
        if budget.max_tokens is not None:  # max_size leaves room for titles and seams
            name = f"the budget of {budget.max_tokens} tokens"
            reasons = [f"{'fits' if keep else 'over'} {name}" for keep in decision.kept.tolist()]
        cut_reasons = iter(reasons)
        reasons = [barred[i] or next(cut_reasons) for i in owner]
        ends = np.cumsum([0, *counts]).tolist()
        return replace(
            self,
            passages=tuple(
                PrunedPassage(
                    p.given,
                    i,
                    float(relevance[i]),
                    int(rank[i]),
                    p.text,
                    p.spans,
                    self._scores[i].sentences,
                    kept[low:high],
                    tuple(reasons[low:high]),
                )
                for i, (p, (low, high)) in enumerate(zip(passages, pairwise(ends), strict=True))
            ),
        )

    def _cut_at_tokens(self) -> PrunedContext:
        """Sentences are counted alone, then the whole: titles and seams cost tokens as well."""
        tokenizer, most = self.budget.tokenizer, self.budget.max_tokens
        assert most is not None
        # At least one token each, so that the smallest room holds nothing, not even a bare title.
        sizes = [
            max(1, count_tokens(tokenizer, p.text[start:end]))
            for p in self._request.passages
            for start, end in p.spans
        ]
        result = self._cut(sizes, sum(sizes))
        if result.tokens(tokenizer) <= most:
            return result
        result, fitting, room = self._cut(sizes, 0), 0, most
        while fitting < room:
            tried = (fitting + room + 1) // 2
            larger = self._cut(sizes, tried)
            if larger.tokens(tokenizer) <= most:
                result, fitting = larger, tried
            else:
                room = tried - 1
        return result

    @property
    def remaining(self) -> list[PrunedPassage]:
        """The passages that keep something, best first when `reorder`."""
        order = sorted(self.passages, key=lambda p: p.rank) if self.reorder else self.passages
        return [p for p in order if p._kept.any()]

    @property
    def text(self) -> str:
        """The shorter context: what is kept of each passage, under its title, a line between."""
        blocks = []
        for passage in self.remaining:
            title = self._request.passages[passage.index].title
            if kept := passage.text.lstrip("\r\n").rstrip():  # code keeps its indentation
                blocks.append(f"{title}\n{kept}" if title else kept)
        return "\n\n".join(blocks)

    @property
    def pruned(self) -> list[PassageLike]:
        """The passages that keep something, in the types they were given in."""
        return [p.pruned for p in self.remaining]

    @property
    def keep_ratio(self) -> float:
        """Share of the passages' characters that is kept; 1.0 when there were none."""
        total = sum(len(p.text) for p in self._request.passages)
        kept = sum(len(p.text) for p in self.passages)
        return kept / total if total else 1.0

    def tokens(self, tokenizer: Any) -> int:
        """Tokens of `text` under a tokenizer with `encode(text)`, special tokens not counted."""
        return count_tokens(tokenizer, self.text)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "question": self.question,
            "method": self.method,
            "threshold": self.budget.threshold,
            "keep_ratio": self.keep_ratio,
            "text": self.text,
            "passages": [
                {
                    "index": p.index,
                    "title": self._request.passages[p.index].title,
                    "text": self._request.passages[p.index].text,
                    "relevance": p.relevance,
                    "rank": p.rank,
                    "kept": [_sentence_dict(s) for s in p.kept],
                    "dropped": [_sentence_dict(s) for s in p.dropped],
                }
                for p in self.passages
            ],
        }

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write a self-contained page: kept text dark, dropped text faint, a slider to re-cut."""
        from rag_prune.context.highlight import write_page

        write_page([self.to_dict()], path)


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of `text` without special tokens, for transformers, tokenizers and tiktoken alike."""
    text = readable(text)
    if hasattr(tokenizer, "encode_ordinary"):  # tiktoken's `encode` refuses "<|endoftext|>"
        return len(tokenizer.encode_ordinary(text))
    try:
        return len(tokenizer.encode(text, add_special_tokens=False))
    except TypeError:
        return len(tokenizer.encode(text))


def _barred(passages: Sequence[Passage], order: list[int], top_k: int | None) -> list[str | None]:
    """For each passage why none of its sentences may stay, or None.

    The model reads an exact copy for the tokens of one and learns nothing from it.
    """
    first: dict[tuple[str | None, str], int] = {}
    why: list[str | None] = [None] * len(passages)
    for i, passage in enumerate(passages):
        if (same := first.setdefault((passage.title, passage.text), i)) != i:
            why[i] = f"duplicate of passage {same}"
    distinct = [i for i in order if why[i] is None]
    for place, i in enumerate(distinct, 1):
        if top_k is not None and place > top_k:
            why[i] = f"relevance rank {place} is beyond top_k {top_k}"
    return why


def _sentence_dict(sentence: Sentence) -> dict[str, Any]:
    return {
        "start": sentence.start,
        "end": sentence.end,
        "score": sentence.score,
        "reason": sentence.reason,
    }
