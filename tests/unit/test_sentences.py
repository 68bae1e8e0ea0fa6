import time

import pytest

from rag_prune.context import sentences
from rag_prune.context.sentences import readable, split


def cut(text):
    """The sentences of a text; every use checks that they tile it."""
    spans = split(text)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert all(start < end for start, end in spans)
    assert not text or spans[-1][1] == len(text)
    return [text[start:end] for start, end in spans]


PROSE = {
    "plain": ["Radium glows. ", "Who found it? ", "Curie did!"],
    "abbreviations": [
        "Dr. Smith met Mr. Jones in Washington D.C. on Jan. 5. ",
        "They spoke, e.g. about U.S. law. ",
        "J. R. R. Tolkien wrote it. ",
        "It ended at 5 p.m. yesterday.",
    ],
    "decimals and versions": ["Pi is 3.14159. ", "Version 1.2.3 costs $4.50. ", "See sec. 3.2. "],
    "ellipses": ["Well... maybe. ", "He said … nothing. ", "Wait.... ", "Then it came..."],
    "quotes": [
        'He said "Stop." ',
        "Then he left. ",
        '"Go!" she cried. ',
        "“Why?” he asked. ",
        "‘No.’ ",
        "She left.",
    ],
    "a bracket after the stop": ["He left (at 5 p.m.). ", "She stayed."],
    "repeated marks": ["What?! ", "Really?? ", "Yes!!! ", "No."],
    "addresses": ["See https://example.com/a.b?c=d. ", "Write to me@x.org. ", "Done."],
    "Chinese": ["你好。", "今天天气很好！", "你呢？", "「是的。」", "他说。", "谢谢"],
    "Japanese": ["日本の首都は東京です。", "人口は約1400万人。", "「本当？」", "と聞いた。"],
    "Hindi": ["यह एक वाक्य है। ", "यह दूसरा है। ", "तीसरा"],
    "Arabic": ["هل أنت بخير؟ ", "نعم. ", "شكرا."],
    "emoji of several code points": ["A 👨‍👩‍👧‍👦! ", "Great 👍🏽. ", "And 🏳️‍🌈? ", "🇫🇷. ", "Yes."],
    "outside the basic plane": ["𝔸 first. ", "😀😀😀 second! ", "Third."],
    "combining marks": ["E\u0301a. ", "N\u0303o! ", "End."],
    "CRLF": ["One line.\r\n", "Two. ", "Three.\r\n\r\n", "New paragraph.\r\n"],
    "no full stop": ["no end here"],
    "white space around": ["\n\n  Hello. ", "World. \n\n"],
}

LAYOUT = {
    "headings": ["# A title. With dots.\n", "Text. ", "More.\n", "## Sub\n", "Text."],
    "table": [
        "Intro.\n",
        "| a | b |\n",
        "|---|---|\n",
        "| 1. One. Two. | 2 |\n",
        "After. ",
        "End.",
    ],
    "fence": ["Do this. ", "So:\n", "```python\nx = 1.\n\ny. Z\n```\n", "After. ", "End."],
    "unclosed fence": ["Text.\n", "```python\nx = 1. Foo\n\n# Not a heading. No.\n"],
    "fence in a longer fence": ["````md\n```\nCode. Here.\n```\n````\n", "Outside. ", "End."],
    "a language after it opens a fence, never closes it": ["~~~\na\n~~~sh\nb. B\n~~~\n", "Out."],
    "backticks within a line": ["```x``` is code. ", "This is not.\n"],
    "indented code": ["So:\n\n", "    x = 1. \n\n\ty. Z\n\n", "Then. ", "That."],
    "list": ["Items:\n", "- one. ", "two.\n", "* three\n  goes on. ", "Yes.\n", "• four"],
    "numbered list": ["1. First.\n", "2) Second. ", "More.\n", "(a) third\n", "10. Tenth"],
    "nested list with blank lines": ["- a\n\n", "    - b. Bee.\n\n", "    1. c\n\n", "End."],
}


@pytest.mark.parametrize("expected", [*PROSE.values(), *LAYOUT.values()], ids=[*PROSE, *LAYOUT])
def test_sentences(expected):
    assert cut("".join(expected)) == expected


@pytest.mark.parametrize("expected", LAYOUT.values(), ids=LAYOUT)
def test_crlf_changes_nothing(expected):
    expected = [sentence.replace("\n", "\r\n") for sentence in expected]
    assert cut("".join(expected)) == expected


def test_nothing_and_white_space():
    assert cut("") == []
    assert cut(" ") == [" "]
    assert cut("\r\n\t \n") == ["\r\n\t \n"]


def test_lone_surrogates_and_nul_bytes_keep_their_offsets():
    text = "One \ud800 two. Three \udfff\x00 four. End."
    assert cut(text) == ["One \ud800 two. ", "Three \udfff\x00 four. ", "End."]
    assert readable(text) == "One \ufffd two. Three \ufffd\x00 four. End."


def test_a_long_paragraph_is_cut_as_its_sentences_are(monkeypatch):
    paragraph = "".join(PROSE["abbreviations"] + [" "] + PROSE["decimals and versions"]) * 20
    whole = cut(paragraph)
    monkeypatch.setattr(sentences, "_PIECE", 150)
    assert cut(paragraph) == whole


MB = 1_000_000

NASTY = {
    "no newline": "word " * (MB // 5),
    "one word": "a" * MB,
    "only newlines": "\n" * MB,
    "only brackets": "(" * MB,
    "initials": "a. " * (MB // 3),
    "stops": "." * MB,
    "fences": "```\n" * (MB // 4),
    "backticks that do not open a fence": "`" * (MB // 4) + " `",
    "nested list": "".join(f"{'  ' * (i % 40)}- item {i}\n" for i in range(MB // 50)),
    "ever deeper list": "\n".join(f"{' ' * depth}- x" for depth in range(1_400)),
    "rows": "| a | b |\n" * (MB // 10),
    "paragraphs": "A. B c.\n\n" * (MB // 9),
    "Chinese without spaces": "今天天气很好！你呢？" * (MB // 10),
    "closing brackets": "a.)" * (MB // 3),
    "prose": "The cat sat on the mat. It was 3.14 m long, e.g. big. " * (MB // 55),
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_hostile_megabytes_take_less_than_two_seconds(text):
    started = time.process_time()  # other programs on the machine do not count
    spans = split(text)
    assert time.process_time() - started < 2
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
