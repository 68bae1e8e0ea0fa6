"""Finding documents in chat requests, and putting back what is kept."""

import copy
import json
import time

import pytest

from rag_prune.integrations.chat_documents import find, text_of

USER = {"role": "user", "content": "Who found radium?"}
CURIE = "Curie found radium. She rode a bike."


def tool(content):
    return {"role": "tool", "tool_call_id": "1", "content": content}


def cut(request, keep):
    """The request with `keep(text)` left of each document, and the texts found."""
    request = copy.deepcopy(request)
    texts = []
    for found in find(request):
        own = [p if isinstance(p, str) else p["text"] for p in found.passages]
        texts += own
        found.put([keep(text) for text in own])
    return request, texts


def first_sentence(text):
    return f"{text.partition('.')[0]}." if "radium" in text else None


CUT = "Curie found radium."


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([{"title": "C", "text": CURIE, "id": 3}], [{"title": "C", "text": CUT, "id": 3}]),
        ([CURIE, "Cats sleep."], [CUT]),
        (
            [{"id": "a", "data": {"snippet": CURIE, "url": "u"}}],
            [{"id": "a", "data": {"snippet": CUT, "url": "u"}}],
        ),
        ([{"data": CURIE}, {"data": {"text": "Cats."}}], [{"data": CUT}]),
        (
            [{"page_content": CURIE, "metadata": {"k": 1}}],
            [{"page_content": CUT, "metadata": {"k": 1}}],
        ),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_every_form_of_documents_keeps_its_other_fields_and_order(documents, expected, inside):
    def request(value):
        body = {"chat_template_kwargs": {"documents": value, "x": 1}} if inside else {}
        return {"messages": [USER], **(body or {"documents": value})}

    assert cut(request(documents), first_sentence)[0] == request(expected)


@pytest.mark.parametrize(
    "documents",
    [[], None, "text", {"text": CURIE}, [{"text": 3}], [CURIE, {"url": "u"}], [[CURIE]]],
)
def test_what_is_no_list_of_documents_is_not_found(documents):
    request = {"messages": [USER], "documents": documents}
    assert find(request) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"text": CURIE}, {"text": "Cats."}], [{"text": CUT}]),
        (
            {"query": "q", "results": [{"content": CURIE, "score": 1}]},
            {"query": "q", "results": [{"content": CUT, "score": 1}]},
        ),
        ({"0": {"text": CURIE}, "1": {"text": "Cats."}}, {"0": {"text": CUT}}),
        ([{"text": "Cats."}], []),
    ],
)
@pytest.mark.parametrize("in_parts", [False, True])
def test_json_in_tool_messages(content, expected, in_parts):
    def wrap(value):
        text = json.dumps(value, ensure_ascii=False)
        return tool([{"type": "text", "text": text}] if in_parts else text)

    before = {"messages": [USER, wrap(content)]}
    assert cut(before, first_sentence)[0] == {"messages": [USER, wrap(expected)]}


@pytest.mark.parametrize(
    "content",
    [
        "It rains. " + CURIE,
        '{"temperature": 20, "text": "It rains."}',
        '["a.txt", "b.txt"]',
        "[1, 2]",
        "[" * 100_000,
        '{"results": ["a.txt"]}',
        "<documents></documents>",
        "<documents>" + CURIE + "</documents>",
        "<document>" + CURIE + "</document>",
        "<documents><document>" + CURIE,
        None,
        3,
        [{"type": "image_url", "image_url": {"url": "u"}}],
    ],
)
def test_other_answers_of_tools_are_not_touched(content):
    assert find({"messages": [USER, tool(content)]}) == []


def test_marked_text_keeps_its_marks():
    text = (
        "Found:\n<documents>\n"
        '<document index="1">\n<source>a.txt</source>\n<document_content>\n'
        f"{CURIE}\n</document_content>\n</document>\n"
        '<document index="2">\n<title>Cats</title>\n<text>Cats sleep.</text>\n</document>\n'
        f"</documents>\nAnd <documents><doc id=3> {CURIE} </doc></documents>."
    )
    request, texts = cut({"messages": [USER, tool(text)]}, first_sentence)
    assert texts == [CURIE, "Cats sleep.", CURIE]
    assert request["messages"][1]["content"] == (
        "Found:\n<documents>\n"
        '<document index="1">\n<source>a.txt</source>\n<document_content>\n'
        "Curie found radium.\n</document_content>\n</document>\n"
        "</documents>\nAnd <documents><doc id=3> Curie found radium. </doc></documents>."
    )
    [found] = find({"messages": [USER, tool(text)]})
    assert [p["title"] for p in found.passages] == [None, "Cats", None]
    assert cut({"messages": [USER, tool(text)]}, str)[0]["messages"][1]["content"] == text


def test_json_lines_between_marks():
    rows = [{"doc_id": 1, "text": CURIE, "title": "C"}, {"doc_id": 2, "text": "Cats."}]
    text = "<documents>\n" + "".join(json.dumps(row) + "\n" for row in rows) + "</documents>"
    request, texts = cut({"messages": [USER, tool(text)]}, first_sentence)
    assert texts == [CURIE, "Cats."]
    kept = json.dumps(rows[0] | {"text": "Curie found radium."})
    assert request["messages"][1]["content"] == f"<documents>\n{kept}\n</documents>"


def test_a_tool_message_answers_the_question_before_it():
    answer = tool(json.dumps([{"text": CURIE}]))
    later = {"role": "user", "content": [{"type": "text", "text": "And polonium?"}]}
    messages = [answer, USER, answer, later, answer]
    request = {"messages": messages, "documents": [CURIE]}
    questions = [f.question for f in find(request)]
    # The first has none. Those of an earlier turn stay as they were cut in that turn.
    assert questions == ["Who found radium?", "And polonium?", "And polonium?"]
    assert [f.question for f in find(request, "Mine?")] == ["Who found radium?", "Mine?", "Mine?"]


@pytest.mark.parametrize(
    "messages", [None, {}, [], [3], [{"role": "user"}], [{"role": "user", "content": " "}]]
)
def test_documents_without_a_question_are_not_found(messages):
    assert find({"messages": messages, "documents": [CURIE]}) == []
    assert len(find({"messages": messages, "documents": [CURIE]}, "Mine?")) == 1


def test_text_of_a_message():
    image = {"type": "image_url", "image_url": {"url": "u"}}
    assert text_of([{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]) == "a\nb"
    assert text_of(3) == text_of(None) == ""


@pytest.mark.parametrize(
    "text", ["<documents>", "<documents><document>", "<documents><doc a='", "<document ", "{", "["]
)
def test_marks_without_an_end_take_linear_time(text):
    started = time.process_time()
    assert find({"messages": [USER, tool(text * (400_000 // len(text)))]}) == []
    assert time.process_time() - started < 2
