"""Tokenise passages with their sentences, cut long ones into windows, and batch by length.

Nothing here depends on what else is in a batch, and no token of a passage is left unread: every
token lies in a window, and takes its score from the one where it stands farthest from a cut edge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_prune.context.sentences import Span, readable

OVERLAP = 0.2  # share of a window that the next one reads again


@dataclass(frozen=True)
class Tokens:
    """A passage's token ids without special tokens, and for each the index of its sentence."""

    ids: NDArray[np.int64]  # (n_tokens,) int64
    sentence: NDArray[np.int64]  # (n_tokens,) int64, ascending


@dataclass(frozen=True)
class Window:
    """Tokens start:end of a passage; `own` is the part whose scores are taken from this window."""

    start: int
    end: int
    own: tuple[int, int]


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids and offsets of texts taken literally: "[SEP]" is five characters of text."""
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    encoded = tokenizer(
        [readable(text) for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    # A sentencepiece vocabulary holds "</s>" among its pieces, so that text which spells it would
    # still become the separator; there it is read as unknown.
    tokens, special = tokenizer.all_special_tokens, set(tokenizer.all_special_ids)
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if any(token in text for token in tokens):
            ids[:] = [tokenizer.unk_token_id if i in special else i for i in ids]
    return encoded


def tokenise(tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Tokens]:
    """Tokens of each text, assigned to the sentence that holds their last character."""
    encoded = encode_plain(tokenizer, texts)
    out = []
    for ids, offsets, sentences in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))[1::2]
        starts = np.array([start for start, _ in sentences], dtype=np.int64)
        sentence = np.searchsorted(starts, np.maximum(ends - 1, 0), side="right") - 1
        out.append(Tokens(np.array(ids, dtype=np.int64), sentence))
    return out


def windows(tokens: Tokens, room: int) -> list[Window]:
    """Cut a passage into windows of at most `room` >= 1 tokens, at near sentence starts.

    A window of a longer passage reads the last fifth of the one before again; the overlap is owned
    half by each, so each token is scored where it has the most context.
    """
    n = len(tokens.ids)
    if n <= room:
        return [Window(0, n, (0, n))]
    is_start = np.ones(n, dtype=bool)
    is_start[1:] = tokens.sentence[1:] != tokens.sentence[:-1]
    sentence_starts = np.flatnonzero(is_start)
    overlap = int(room * OVERLAP)

    def aligned(low: int, high: int) -> int:
        """The last sentence start in [low, high], or `high` where there is none."""
        i = np.searchsorted(sentence_starts, high, side="right") - 1
        return int(sentence_starts[i]) if i >= 0 and sentence_starts[i] >= low else high

    bounds = [(0, aligned(max(room // 2, 1), room))]
    while (end := bounds[-1][1]) < n:
        start = aligned(max(end - 2 * overlap, bounds[-1][0] + 1), end - overlap)
        stop = n if n - start <= room else aligned(max(start + room // 2, end + 1), start + room)
        bounds.append((start, stop))
    middles = [(left[1] + right[0]) // 2 for left, right in pairwise(bounds)]
    owned = pairwise([0, *middles, n])
    return [Window(start, end, own) for (start, end), own in zip(bounds, owned, strict=True)]


def batches(
    lengths: Sequence[int], tokens_per_batch: int, padding_per_batch: int
) -> Iterator[list[int]]:
    """Indices grouped by length, longest first.

    A batch has at most `tokens_per_batch` tokens after padding, `padding_per_batch` of them added
    by it; a single row may be longer.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    padding = 0
    for i in order:
        width = lengths[batch[0]] if batch else lengths[i]
        padding += width - lengths[i]
        full = width * (len(batch) + 1) > tokens_per_batch
        if batch and (full or padding > padding_per_batch):
            yield batch
            batch, padding = [], 0
        batch.append(i)
    if batch:
        yield batch


def sentence_means(
    values: NDArray[np.float64], sentence: NDArray[np.int64], n_sentences: int
) -> NDArray[np.float64]:
    """Mean of token values (n_tokens,) over each sentence; −inf for a sentence without a token."""
    count = np.bincount(sentence, minlength=n_sentences).astype(np.float64)
    total = np.bincount(sentence, weights=values.astype(np.float64), minlength=n_sentences)
    means = np.full(n_sentences, -np.inf)
    np.divide(total, count, out=means, where=count > 0)
    return means
