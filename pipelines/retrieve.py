"""Find the passages of a folder that share words with a question (BM25).

Documents are cut into passages at paragraph boundaries and never inside a paragraph or a block of
code. A heading starts a new passage and becomes part of its title, so that a passage says what it
is about even when the word stands only above it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_core.errors import InputError

ENDINGS = (".jsonl", ".markdown", ".md", ".txt")

# Passages come near this many characters: paragraphs of up to 600 make passages of 600 to 1,200.
_TARGET = 900
# Text wrapped by hand has shorter lines than this, so a longer line is a paragraph of its own.
_PARAGRAPH_LINE = 240

_FENCE = re.compile(r"\s*(`{3,})")
_HASH_HEADING = re.compile(r"(#{1,6})[ \t]+(.+)")
_UNDERLINE = re.compile(r"([=\-~^*\"'#+.:_])\1{2,}")
# Chinese, Japanese and Korean text has no spaces: every character is a word of its own.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def cut_passages(text: str, *, source: str, title: str = "") -> list[dict[str, Any]]:
    """Cut a document into passages of some 600 to 1,200 characters.

    Headings (Markdown's `#`, or underlined ones as in reStructuredText) are never crossed. A
    passage is shorter where its section is short, and longer where one paragraph, list or block
    of code is: those stay whole.

    Args:
        text: The document.
        source: Its name; the passages are called `source#1`, `source#2` and so on, or `source` if
            there is only one.
        title: What to put before the headings in the passages' titles.

    Returns:
        Passages in the document's order, each with `id`, `title` (the headings above it), `text`
        and `start`, where `text` equals `document[start : start + len(text)]`. No passages for a
        document of white space and headings only.
    """
    spans: list[tuple[int, int, tuple[str, ...]]] = []
    for start, end, headings in _blocks(text):
        if spans and spans[-1][2] is headings:
            first, last, _ = spans[-1]
            if abs(end - first - _TARGET) <= abs(last - first - _TARGET):
                spans[-1] = (first, end, headings)
                continue
        spans.append((start, end, headings))
    return [
        {
            "id": source if len(spans) == 1 else f"{source}#{number}",
            "title": " > ".join(filter(None, (title, *headings))),
            "text": text[start:end],
            "start": start,
        }
        for number, (start, end, headings) in enumerate(spans, start=1)
    ]


def _blocks(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Yield what must stay whole, as (start, end, headings above).

    Blocks of one section share the same `headings` object. A block is a paragraph with the first
    one that is indented below it, or with all of them if it ends with a colon (mostly before code).
    Fenced blocks and interpreter sessions are not cut at the blank lines in them either.
    """
    lines = [(m.start(), m.group().rstrip()) for m in re.finditer(r"[^\n]*\n|[^\n]+", text)]
    headings: tuple[str, ...] = ()
    underlines: dict[str, int] = {}  # character -> level, in order of appearance
    start = end = -1  # of the block being read; start < 0 is none
    indent = 0  # of the first line of its last paragraph
    in_session = False  # that paragraph is one of an interpreter session
    held = -1  # deeper lines than this still belong to it, after a blank line too; < 0 is none
    after_blank = True
    at = 0
    while at < len(lines):
        offset, line = lines[at]
        at += 1
        if not line.strip():
            after_blank = True
            continue

        heading = _HASH_HEADING.fullmatch(line) if len(line) <= _PARAGRAPH_LINE else None
        level = len(heading[1]) if heading else 0
        words = _without_closing_hashes(heading[2]) if heading else line
        if not heading and after_blank and not line[0].isspace() and at < len(lines):
            underline = _UNDERLINE.fullmatch(lines[at][1])
            if underline and len(underline[0]) >= len(line):
                level = underlines.setdefault(underline[1], len(underlines) + 1)
                at += 1
        if level:
            if start >= 0:
                yield start, end, headings
            headings = (*headings[: level - 1], words)
            start, held, after_blank = -1, -1, True
            continue

        depth = len(line) - len(line.lstrip())
        session = line.lstrip().startswith(">>>")
        deeper = depth > indent or 0 <= held < depth
        between = after_blank or len(line) > _PARAGRAPH_LINE
        if start >= 0 and between and not deeper and not (session and in_session):
            yield start, end, headings
            start, held = -1, -1
        if start < 0:
            start = offset
        if between:
            indent, in_session = depth, session
        end = offset + len(line)

        fence = _FENCE.match(line)
        if fence:  # up to its closing line, or to the end of the document
            while at < len(lines):
                offset, line = lines[at]
                at += 1
                if line.strip():
                    end = offset + len(line)
                if line.strip().startswith(fence[1]):
                    break
        if not 0 <= held < indent:
            held = indent if line.endswith(":") else -1
        after_blank = len(line) > _PARAGRAPH_LINE
    if start >= 0:
        yield start, end, headings


def _without_closing_hashes(heading: str) -> str:
    words, _, last = heading.rpartition(" ")
    return words.rstrip() if words and not last.strip("#") else heading


class Retriever:
    """Rank passages by BM25 against a question.

    Args:
        passages: Mappings with `text` and, where there are any, `title` and more; kept as they
            are. Words of the title count like words of the text.

    Raises:
        InputError: No passages, or one without text.
    """

    def __init__(self, passages: Sequence[Mapping[str, Any]]) -> None:
        import bm25s

        if not passages:
            raise InputError("There are no passages to search: pass at least one.")
        for number, passage in enumerate(passages):
            text = passage.get("text") if isinstance(passage, Mapping) else None
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"Passage {number} has no text: every passage must be a mapping with a 'text' "
                    "that is not empty."
                )
        self.passages = [dict(passage) for passage in passages]
        self._index = bm25s.BM25()
        self._index.index(
            # bm25s cannot index a corpus without words: the empty word stands for none.
            [_words(f"{p.get('title') or ''}\n{p['text']}") or [""] for p in self.passages],
            show_progress=False,
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Retriever:
        """Read every text, Markdown and JSONL file below a folder, in the order of their paths.

        Files and folders whose names begin with a dot are skipped, and so are links to folders,
        which may form loops. A JSONL row is a document of its own: `{"text": …}`, with `title` and
        `id` where there are any. Documents are cut by `cut_passages`; where one has no title and no
        heading, the file's name stands in.

        Raises:
            InputError: The folder is missing or holds nothing to read, a file is not UTF-8, or a
                row is not JSON or has no text.
        """
        root = Path(folder)
        if not root.is_dir():
            problem = "is a file, not a folder" if root.exists() else "does not exist"
            raise InputError(f"The folder '{root}' {problem}: pass a folder of documents.")
        passages = []
        for path in _document_files(root):
            name = path.relative_to(root).as_posix()
            for source, title, text in _documents(path, name):
                for passage in cut_passages(text, source=source, title=title):
                    passages.append({**passage, "title": passage["title"] or path.stem})
        if not passages:
            raise InputError(
                f"The folder '{root}' holds no documents to read: files whose names end in "
                f"{', '.join(ENDINGS)} are read, hidden ones and empty ones are not."
            )
        return cls(passages)

    def search(self, question: str, k: int = 5) -> list[dict[str, Any]]:
        """Return the `k` best passages, best first, as copies with their `score` added.

        Passages that share no word with the question are left out, so there may be fewer than `k`,
        or none. Equal scores keep the passages' own order.

        Raises:
            InputError: The question is empty, or `k` is below 1.
        """
        import numpy as np

        if not isinstance(question, str) or not question.strip():
            raise InputError(f"The question is empty ({question!r}): ask something.")
        if k < 1:
            raise InputError(f"k is the number of passages to find: at least 1, got {k}.")
        words = [word for word in _words(question) if word in self._index.vocab_dict]
        if not words:
            return []
        scores = self._index.get_scores(words)
        best = np.argsort(-scores, kind="stable")[:k]
        return [{**self.passages[i], "score": float(scores[i])} for i in best if scores[i] > 0]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _document_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):  # does not follow links to folders
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(ENDINGS)
        ]
    return sorted(path for path in found if path.is_file())


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The file '{path}' is not UTF-8 text (byte {error.start}): convert it, or move "
            "it out of the folder."
        ) from None


def _documents(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield the documents of a file as (source, title, text)."""
    content = _read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield name, "", content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"'{path}', line {number} is not valid JSON ({error}): each line must hold one "
                "JSON object."
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"'{path}', line {number} has no text: each line must hold an object with a "
                "'text' that is not empty, and may hold a 'title' and an 'id'."
            )
        source = row.get("id")
        yield (
            f"{name}:{number}" if source is None else str(source),
            str(row.get("title") or ""),
            text,
        )
