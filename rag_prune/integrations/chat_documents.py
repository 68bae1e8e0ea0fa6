"""Where the documents of an OpenAI-style chat request are, and how to put back what is kept.

    documents, chat_template_kwargs["documents"]   a list of texts, {"text": …} or {"data": {…}}
    messages with the role "tool"                  such a list as JSON, maybe under a key like
                                                   "results"; text with <documents> … </documents>

Pure functions over plain JSON values. What is not recognised is not found, so it stays as it is: a
tool may answer anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rag_prune.context.result import PassageLike

TEXT_KEYS = ("text", "snippet", "content", "page_content")  # in the order in which they are tried
LIST_KEYS = ("documents", "results", "passages", "chunks", "sources")

_BLOCK = re.compile(r"<(documents)>")
_ELEMENT = re.compile(r"<(document|doc)(?:\s[^<>]{0,500})?>")
_CONTENT = re.compile(r"<(document_content|document_contents|content|text)>")
_TITLE = re.compile(r"<(title)>")

Texts = list[str | None]  # what is kept of each document; None for nothing


@dataclass(frozen=True)
class Found:
    """Documents that stand together; `put` takes what is kept of each and changes the request."""

    question: str
    passages: list[PassageLike]
    put: Callable[[Texts], None]


@dataclass(frozen=True)
class _Documents:
    """Documents read from a value; `cut` gives the value with what is kept of each."""

    passages: list[PassageLike]
    cut: Callable[[Texts], Any]


def find(request: dict[str, Any], question: str | None = None) -> list[Found]:
    """The documents of a chat request, each with the question it is to answer.

    That is `question`, or else the last user message before it: a tool message of an earlier turn
    is cut for the question of that turn, so it reads the same in every later request and a prefix
    cache still finds it.
    """
    messages = request.get("messages")
    messages = messages if isinstance(messages, list) else []
    found: list[Found] = []
    asked = ""
    last_user = max((i for i, m in enumerate(messages) if _role(m) == "user"), default=-1)
    for i, message in enumerate(messages):
        if _role(message) == "user":
            asked = text_of(message.get("content"))
        elif _role(message) == "tool":
            this = question if question is not None and i > last_user else asked
            found += _in_tool_message(message, this)
    holders = (request, request.get("chat_template_kwargs"))
    for holder in (h for h in holders if isinstance(h, dict)):
        if read := _from_list(holder.get("documents")):
            found.append(_found(question or asked, read, holder, "documents"))
    return [f for f in found if f.question.strip()]


def text_of(content: Any) -> str:
    """The text of a message: its content, or the text parts of it."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(p["text"] for p in parts if _is_text_part(p))


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _found(question: str, read: _Documents, holder: dict[str, Any], key: str) -> Found:
    return Found(question, read.passages, lambda kept: holder.update({key: read.cut(kept)}))


def _in_tool_message(message: dict[str, Any], question: str) -> Iterator[Found]:
    content = message.get("content")
    if isinstance(content, str):
        places = [(message, "content")]
    else:
        parts = content if isinstance(content, list) else []
        places = [(part, "text") for part in parts if _is_text_part(part)]
    for holder, key in places:
        text = holder[key]
        if read := _from_json(text) or _from_marked(text):
            yield _found(question, read, holder, key)


def _from_list(documents: Any, texts: bool = True) -> _Documents | None:
    """A list of documents; without `texts` bare strings are no documents."""
    if not isinstance(documents, list) or not documents:
        return None
    passages = [_passage(d) for d in documents if texts or isinstance(d, dict)]
    read = [p for p in passages if p is not None]
    if len(read) < len(documents):
        return None
    return _Documents(
        read, lambda kept: [_cut(d, t) for d, t in zip(documents, kept, strict=True) if t]
    )


def _passage(document: Any) -> PassageLike | None:
    if isinstance(document, str):
        return document
    if not isinstance(document, dict):
        return None
    if "data" in document:
        return _passage(document["data"])
    key = _text_key(document)
    title = document.get("title")
    if key is None:
        return None
    return {"text": document[key], "title": title if isinstance(title, str) else None}


def _text_key(document: dict[str, Any]) -> str | None:
    return next((k for k in TEXT_KEYS if isinstance(document.get(k), str)), None)


def _cut(document: Any, text: str) -> Any:
    if isinstance(document, str):
        return text
    if "data" in document:
        return {**document, "data": _cut(document["data"], text)}
    return {**document, _text_key(document): text}


def _from_json(text: str) -> _Documents | None:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if read := _from_list(value, texts=False):
        return _Documents(read.passages, lambda kept: _dumps(read.cut(kept)))
    if not isinstance(value, dict):
        return None
    key = next((k for k in LIST_KEYS if isinstance(value.get(k), list)), None)
    if key is not None:
        if (nested := _from_list(value[key], texts=False)) is None:
            return None
        return _Documents(nested.passages, lambda kept: _dumps({**value, key: nested.cut(kept)}))
    named = _from_list(list(value.values()), texts=False)  # {"0": {…}, "1": {…}}
    if named is None:
        return None
    return _Documents(
        named.passages,
        lambda kept: _dumps(
            {k: _cut(d, t) for (k, d), t in zip(value.items(), kept, strict=True) if t}
        ),
    )


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Marked:
    """A document in marked text: it stands at start:end, and `render` writes what is kept of it."""

    start: int
    end: int
    passage: PassageLike
    render: Callable[[str], str]


def _from_marked(text: str) -> _Documents | None:
    """`<document>` or `<doc>` elements, or a JSON object a line, between <documents> tags."""
    marked: list[_Marked] = []
    for _, start, end, _ in _elements(_BLOCK, text, 0, len(text)):
        marked += list(_marked_elements(text, start, end)) or list(_json_lines(text, start, end))
    if not marked:
        return None

    def cut(kept: Texts) -> str:
        out, position = [], 0
        for document, left in zip(marked, kept, strict=True):
            out += [text[position : document.start], document.render(left) if left else ""]
            position = document.end
        return "".join([*out, text[position:]])

    return _Documents([m.passage for m in marked], cut)


def _marked_elements(text: str, start: int, end: int) -> Iterator[_Marked]:
    for first, inner, inner_end, last in _elements(_ELEMENT, text, start, end):
        title = next(_elements(_TITLE, text, inner, inner_end), None)
        content = next(_elements(_CONTENT, text, inner, inner_end), None)
        low, high = content[1:3] if content else (inner, inner_end)
        body = text[low:high].strip()
        at = low + text[low:high].find(body)
        while last < end and text[last].isspace():  # an element that goes takes its line along
            last += 1
        before, after = text[first:at], text[at + len(body) : last]
        yield _Marked(
            first,
            last,
            {"text": body, "title": text[title[1] : title[2]] if title else None},
            lambda left, before=before, after=after: before + left + after,  # type: ignore[misc]
        )


def _json_lines(text: str, start: int, end: int) -> Iterator[_Marked]:
    for line in re.finditer(r"[^\n]*\S[^\n]*(\n?)", text[start:end]):
        try:
            value = json.loads(line[0])
        except (ValueError, RecursionError):
            return
        passage = _passage(value) if isinstance(value, dict) else None
        if passage is None:
            return
        yield _Marked(
            start + line.start(),
            start + line.end(),
            passage,
            lambda left, value=value, tail=line[1]: _dumps(_cut(value, left)) + tail,  # type: ignore[misc]
        )


def _elements(
    opening: re.Pattern[str], text: str, start: int, end: int
) -> Iterator[tuple[int, int, int, int]]:
    """(start, inner start, inner end, end) of elements; linear in `text`, whatever is in it."""
    while tag := opening.search(text, start, end):
        close = f"</{tag[1]}>"
        inner_end = text.find(close, tag.end(), end)
        if inner_end < 0:
            return
        start = inner_end + len(close)
        yield tag.start(), tag.end(), inner_end, start
