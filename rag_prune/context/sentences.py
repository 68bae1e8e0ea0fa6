"""Cut a passage into sentences that tile it: joined they are the passage, to the last character.

Prose is cut by `sentencex`; everything that only looks like prose is kept whole, because half a
table row or half a function helps nobody: a heading, a table row, a fenced or indented code block
is one unit, and a list item never runs into its neighbour. White space belongs to the unit before
it, so dropping a unit never leaves a gap.

Thresholds of a trained pruner hold for the units it was trained on: `SPLITTER` names this version
and is stored in checkpoints and in vector caches.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import sentencex

SPLITTER = "sentencex-blocks-1"

Span = tuple[int, int]

_FENCE = re.compile(r"[ \t]*(`{3,}+(?!.*`)|~{3,})")  # not ```code``` within a line
_ITEM = re.compile(r"[ \t]*(?:[-*+•‣◦]\s|\(?(?:\d{1,3}|[a-zA-Z])[.)]\s)")
_ROW = re.compile(r"[ \t]*(?:\||#{1,6}\s)")  # of a table, or a heading
_INDENTED = re.compile(r"(?: {4}|\t)[ \t]*\S")
# sentencex follows the rules of one language; these end a sentence in any, and need no space after.
_FULL_STOPS = re.compile(r"[。！？｡।॥؟۔።။]+[」』”’）〉》\])]*\s*")
_CLOSERS = re.compile(r"[)\]}”’»」』]+\s*")
# sentencex takes quadratic time where no space follows; no paragraph of prose is as long as this.
_PIECE = 10_000
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def readable(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD, which tokenizers accept; offsets stay."""
    return _SURROGATES.sub("\ufffd", text)


def split(text: str) -> list[Span]:
    """Character spans (start, end) of the sentences of `text`, in order, tiling it exactly.

    The empty text has no spans; a text of white space only has one.
    """
    if not text:
        return []
    starts = sorted({start for block in _blocks(text) for start in _sentence_starts(text, *block)})
    filled = [s for s, end in pairwise([*starts, len(text)]) if text[s:end].strip()]
    bounds = [0, *filled[1:], len(text)]
    return list(pairwise(bounds))


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is_prose) of paragraphs, list items, code blocks and lines that stand alone."""
    start = position = 0
    kind, fence, previous_blank = "blank", "", True
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if fence:
            now, joins = "code", True
            if line.lstrip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif opened := _FENCE.match(line):
            now, joins, fence = "code", False, opened[1]
        elif not line.strip():
            now, joins = kind, True  # white space belongs to the block before it
        elif kind == "item" and _ITEM.match(line):
            now, joins = "item", False  # a nested one may be indented like code
        elif _INDENTED.match(line) and (previous_blank or kind == "code"):
            now, joins = "code", kind == "code"
        elif _ROW.match(line):
            now, joins = "row", False
        elif _ITEM.match(line):
            now, joins = "item", False
        elif kind in ("prose", "item") and not previous_blank:
            now, joins = kind, True
        else:
            now, joins = "prose", False
        if not joins and position > start:
            yield start, position, kind in ("prose", "item")
            start = position
        kind, previous_blank = now, not line.strip()
        position += len(line)
    if position > start:
        yield start, position, kind in ("prose", "item")


def _sentence_starts(text: str, start: int, end: int, is_prose: bool) -> Iterator[int]:
    if not is_prose:
        yield start
        return
    block = readable(text[start:end])
    marker = _ITEM.match(block)
    first = marker.end() if marker else 0  # "1. " belongs to its item
    stops = [stop.end() for stop in _FULL_STOPS.finditer(block)]
    for low, high in pairwise([0, *stops, len(block)]):
        yield start + low
        for cut in _boundaries(block[low:high]):
            closers = _CLOSERS.match(block, low + cut)  # `.)` ends after the bracket, not before
            if low + cut > first:
                yield start + (closers.end() if closers else low + cut)


def _boundaries(block: str) -> Iterator[int]:
    """Where sentencex begins a sentence; it reads pieces, each from the last sentence seen."""
    position = 0
    while position < len(block):
        piece = block[position : position + _PIECE]
        starts = [s["start_index"] for s in sentencex.get_sentence_boundaries("en", piece)]
        yield from (position + s for s in starts[1:])
        is_last = position + len(piece) == len(block)
        position += len(piece) if is_last or len(starts) < 2 else starts[-1]


def touched(sentences: Sequence[Span], marked: Sequence[Sequence[int]]) -> list[bool]:
    """For each sentence, whether it holds half of a marked span, or one covers half of it."""
    out = []
    for start, end in sentences:
        shares = ((min(end, high) - max(start, low), high - low) for low, high in marked)
        out.append(any(s > 0 and (2 * s >= end - start or 2 * s >= length) for s, length in shares))
    return out
