"""LLMLingua-2: words by a token classifier that reads no question.

Paper: LLMLingua-2: data distillation for efficient and faithful task-agnostic prompt compression
    (2024), arXiv:2403.12968; the owners' code in github.com/microsoft/LLMLingua.
Keeps: in each chunk of about 510 tokens, the words whose mean token probability is above a
    percentile of the chunk's, words counted by their tokens. The percentile is the share to drop,
    in whole per cents, and that share is what `threshold` means here: 0.5 is the owners' rate 0.5,
    0.7 their rate 0.3. A word's score is the largest share at which it still stays. The results'
    sentences are words; white space belongs to the word after it, so nothing is glued that was
    apart. A passage's relevance is the mean of its words' probabilities, the owners' order of
    contexts.
Differs from the release: kept words are slices of the input, and not decoded tokens; a word's
    tokens are the classifier's own unless `count_tokens` says otherwise (the owners count with
    tiktoken's cl100k_base, `lambda word: len(encoding.encode(word))`); characters that the
    vocabulary lacks go with the word before, and are not always lost; a force token that is not
    one token of the vocabulary keeps the words it touches, and is not shown to the model as a new
    token without training; where a chunk ends inside a word, its second part is a word of its own.
Cost: one pass a chunk, whatever the question.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from rag_prune.context.engine import Floats
from rag_prune.context.model import KEEP
from rag_prune.context.released.base import (
    Released,
    ReleasedEngine,
    columns,
    probabilities,
    sub_config,
)
from rag_prune.context.result import Passage, Request, Scores
from rag_prune.context.sentences import Span
from rag_prune.context.windows import encode_plain

WINDOW = 512
CHUNK_ENDS = (".", "\n")
PER_CENTS = range(1, 101)


class LLMLingua2Network(nn.Module):
    """A stock token classifier, its two labels seen as one keep logit."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.classifier = AutoModelForTokenClassification.from_config(config)  # type: ignore[no-untyped-call]

    def joint(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.classifier(input_ids=ids, attention_mask=mask).logits
        return columns(logits, logits[:, 0, 0])  # there is no ranking head


@dataclass(frozen=True)
class Word:
    """A word of a chunk: its token strings joined, its characters, the numbers of its tokens.

    forced: it is a force token, or holds one of several tokens.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    forced: bool


class LLMLingua2(ReleasedEngine):
    """Words by probability, question-blind.

    Args:
        checkpoint: A loaded release.
        force_tokens: Strings that always stay, such as "?" or "\\n".
        force_reserve_digit: Tokens with a digit count as certain.
        drop_consecutive: Of equal force tokens with nothing kept between them the first stays.
            With it a word may come back at a larger share in the owners' rule; here it stays out.
        count_tokens: Tokens of a word as the reader counts them.
    """

    name = "llmlingua2"
    default_threshold = 0.5  # the owners' default rate

    def __init__(
        self,
        checkpoint: Released,
        *,
        force_tokens: Sequence[str] = (),
        force_reserve_digit: bool = False,
        drop_consecutive: bool = False,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.force_tokens = tuple(force_tokens)
        self.force_reserve_digit = force_reserve_digit
        self.drop_consecutive = drop_consecutive
        self.count_tokens = count_tokens
        self._pieces = "roberta" in checkpoint.model.classifier.config.model_type

    @classmethod
    def build(cls, config: dict[str, Any], names: Iterable[str]) -> tuple[nn.Module, int]:
        stock = sub_config(config["model_type"], config)
        if stock.num_labels != 2:
            raise ValueError(f"it has {stock.num_labels} labels and not drop and keep")
        return LLMLingua2Network(stock), WINDOW

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"classifier.{name}": value for name, value in state.items()}

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request its passages' scores; equal passages are equal whatever is asked."""
        passages = [p for request in requests for p in request.passages]
        tokenizer = self.checkpoint.tokenizer
        encoded = encode_plain(tokenizer, [p.text for p in passages])
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        rows: list[list[int]] = []
        places: list[tuple[int, int, int]] = []
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["input_ids"]]
        for i, ids in enumerate(encoded["input_ids"]):
            for low, high in chunks(tokens[i]):
                rows.append([cls, *ids[low:high], sep][:WINDOW])  # the longest lose their [SEP]
                places.append((i, low, high))
        keep: list[Floats] = [np.empty(len(t)) for t in tokens]
        for row, values in self.run(self.checkpoint.model.joint, rows):
            i, low, high = places[row]
            keep[i][low:high] = probabilities(values[1 : 1 + high - low, KEEP])
        spread: list[list[tuple[int, int]]] = [[] for _ in passages]
        for i, low, high in places:
            spread[i].append((low, high))
        scored = iter(
            self._passage(p, tokens[i], encoded["offset_mapping"][i], keep[i], spread[i])
            for i, p in enumerate(passages)
        )
        return [[next(scored) for _ in request.passages] for request in requests]

    def _passage(
        self,
        passage: Passage,
        tokens: list[str],
        offsets: list[Span],
        chances: Floats,
        chunked: list[tuple[int, int]],
    ) -> Scores:
        words: list[Word] = []
        scores: list[float] = []
        for number, (low, high) in enumerate(chunked):
            first = offsets[low][0] if number else 0
            last = offsets[high][0] if high < len(tokens) else len(passage.text)
            inside = [s for s in self._forced(passage.text) if first <= s[0] < last]
            found = self._words(tokens, offsets, low, high, passage.text, inside)
            words += found
            scores += self._chunk(found, tokens, chances) if found else []
        if not words:
            return Scores(0.0, np.zeros(len(passage.spans)))
        means = [chances[list(word.tokens)].mean() for word in words if word.tokens]
        spans, kept = _tile(words, scores, passage.text)
        return Scores(float(np.mean(means)) if means else 0.0, np.array(kept), spans)

    def _words(
        self,
        tokens: list[str],
        offsets: list[Span],
        low: int,
        high: int,
        text: str,
        forced: Sequence[Span],
    ) -> list[Word]:
        """Tokens joined to words as the owners' code does; what is in no vocabulary is in none."""
        special = set(self.checkpoint.tokenizer.all_special_tokens)
        joined: list[tuple[str, list[int]]] = []
        for i in range(low, high):
            pure = tokens[i].lstrip("▁" if self._pieces else "#")
            if tokens[i] in special:
                continue
            if not joined or self._begins(tokens[i], pure):
                joined.append((tokens[i], [i]))
            else:
                before, members = joined[-1]
                joined[-1] = (before + pure, [*members, i])
        words = []
        for word, members in joined:
            start, end = offsets[members[0]][0], offsets[members[-1]][1]
            touched = any(low < end and high > start for low, high in forced)
            words.append(Word(word, start, end, tuple(members), touched))
        blank = [s for s in forced if not text[slice(*s)].strip()]  # "\n" is a word of its own
        words += [Word(text[slice(*s)], *s, (), True) for s in blank]
        return sorted(words, key=lambda word: word.start)

    def _begins(self, token: str, pure: str) -> bool:
        if self._pieces:
            alone = token in string.punctuation or token in self.force_tokens
            return alone or token.startswith("▁")
        return pure in self.force_tokens or not token.startswith("##")

    def _forced(self, text: str) -> list[Span]:
        """Where the force tokens stand that are not one token of the vocabulary."""
        return [
            found.span()
            for force in self.force_tokens
            if len(self.checkpoint.tokenizer.tokenize(force)) != 1
            for found in re.finditer(re.escape(force), text)
        ]

    def _chunk(self, words: list[Word], tokens: list[str], chances: Floats) -> list[float]:
        """For each word of a chunk the largest share to drop at which it stays."""
        means = np.array([self._probability(word, tokens, chances) for word in words])
        count = self.count_tokens
        counts = [count(w.text) if count else max(len(w.tokens), 1) for w in words]
        if self.drop_consecutive:
            kept = np.stack([self._spaced(words, means, counts, p) for p in PER_CENTS])
        else:
            kept = _above(means, counts, list(PER_CENTS))
        return [_SHARES[n] for n in np.logical_and.accumulate(kept).sum(0).tolist()]

    def _probability(self, word: Word, tokens: list[str], chances: Floats) -> float:
        if word.forced:
            return 1.0
        values = chances[list(word.tokens)].tolist()
        if tokens[word.tokens[0]].lstrip("▁" if self._pieces else "#") in self.force_tokens:
            values[0] = 1.0
        if self.force_reserve_digit:
            values = [
                1.0 if re.search(r"\d", tokens[i]) else value
                for i, value in zip(word.tokens, values, strict=True)
            ]
        return float(np.mean(values))

    def _spaced(
        self, words: list[Word], means: Floats, counts: Sequence[int], per_cent: int
    ) -> NDArray[np.bool_]:
        """`_above` at one percentile, equal force tokens kept only with something in between."""
        means = means.copy()
        enough = np.percentile(means, per_cent - 1)
        between, previous = False, None
        for i, word in enumerate(words):
            if word.text not in self.force_tokens:
                between |= bool(means[i] > enough)
                continue
            if not between and word.text == previous:
                means[i] = 0.0
            between, previous = False, word.text
        kept: NDArray[np.bool_] = _above(means, counts, [per_cent])[0]
        previous = None
        for word_number in np.flatnonzero(kept).tolist():
            text = words[word_number].text
            kept[word_number] = text not in self.force_tokens or text != previous
            previous = text
        return kept


def _above(means: Floats, counts: Sequence[int], per_cents: Sequence[int]) -> NDArray[np.bool_]:
    """(n_per_cents, n_words): which words are above each percentile, words weighed by tokens."""
    weighed = np.repeat(means, counts)
    at = np.percentile(weighed if len(weighed) else means, per_cents)[:, None]
    kept: NDArray[np.bool_] = (means > at) | ((at == 1.0) & (means == at))
    return kept


def chunks(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Token ranges of about 510, the long ones cut after their last full stop or line end."""
    most, n = WINDOW - 2, len(tokens)
    out, start = [], 0
    while start < n:
        end = start + most
        if end > n - 1:
            out.append((start, n))
            break
        ends = (i for i in range(end, start, -1) if tokens[i] in CHUNK_ENDS)
        end = next(ends, end)
        out.append((start, end + 1))
        start = end + 1
    return out


def _largest_share(per_cent: int) -> float:
    """The largest share r to drop that the owners round to this percentile: int(100 r + 1)."""
    share = per_cent / 100
    while int(100 * share + 1) > per_cent:
        share = float(np.nextafter(share, -1))
    return share


_SHARES = [0.0, *(_largest_share(per_cent) for per_cent in PER_CENTS)]


def _tile(
    words: list[Word], scores: list[float], text: str
) -> tuple[tuple[Span, ...], list[float]]:
    """Spans that tile the text: white space goes with the word after it, the rest with the one
    before. Words that begin at one character (a ligature's letters) are one span, kept if any is.
    """
    bounds, kept = [0], scores[:1]
    for before, word, score in zip(words, words[1:], scores[1:], strict=False):
        start = word.start
        while start > before.end and text[start - 1].isspace():
            start -= 1
        if start > bounds[-1]:
            bounds.append(start)
            kept.append(score)
        else:
            kept[-1] = max(kept[-1], score)
    return tuple(zip(bounds, [*bounds[1:], len(text)], strict=True)), kept
