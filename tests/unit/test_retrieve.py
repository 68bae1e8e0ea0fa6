"""Cutting documents into passages, reading folders, and ranking with BM25."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.retrieve import Retriever, cut_passages
from prune_core.errors import InputError

PARAGRAPH = "Radium was found in 1898 by Marie and Pierre Curie, in ore from Bohemia. " * 4


def texts(document: str, **kwargs: str) -> list[str]:
    return [passage["text"] for passage in cut_passages(document, source="doc", **kwargs)]


# ------------------------------------------------------------------------------------ passages


@given(
    st.text(
        alphabet=st.sampled_from(["a", "é", "語", "🙂", " ", "\n", "\r", "#", "=", ":", ">", "`"])
    )
    | st.text()
)
def test_passages_are_exact_slices_in_order_and_leave_out_only_headings(document: str) -> None:
    end = 0
    left_out = ""
    for passage in cut_passages(document, source="doc"):
        assert passage["start"] >= end
        left_out += document[end : passage["start"]]
        end = passage["start"] + len(passage["text"])
        assert document[passage["start"] : end] == passage["text"]
        assert passage["text"].strip()
    lines = [line.rstrip() for line in (left_out + document[end:]).split("\n") if line.strip()]
    for line, below in pairwise([*lines, ""]):
        assert line.startswith("#") or is_underline(line) or is_underline(below)


def is_underline(line: str) -> bool:
    return len(line) >= 3 and len(set(line)) == 1


def test_paragraphs_are_packed_to_600_to_1200_characters_and_never_cut() -> None:
    paragraphs = [PARAGRAPH.strip() + f" No. {number}." for number in range(12)]
    document = "\n\n".join(paragraphs)
    passages = cut_passages(document, source="doc")
    assert [passage["id"] for passage in passages] == ["doc#1", "doc#2", "doc#3", "doc#4"]
    assert all(600 <= len(passage["text"]) <= 1200 for passage in passages)
    assert "\n\n".join(passage["text"] for passage in passages) == document


def test_a_document_of_one_passage_keeps_its_name() -> None:
    assert cut_passages("  Short.\n", source="doc") == [
        {"id": "doc", "title": "", "text": "  Short.", "start": 0}
    ]


@pytest.mark.parametrize("document", ["", " \n\t\n", "# Only a heading\n"])
def test_a_document_without_text_has_no_passages(document: str) -> None:
    assert cut_passages(document, source="doc") == []


@pytest.mark.parametrize(
    "block",
    [
        "For example:\n\n    a = 1\n\n    b = 2",
        "```python\na = 1\n\n\n# not a heading\n\nb = 2\n```",
        ">>> a = 1\n\n>>> a\n1",
        "The steps are:\n\n  * one\n\n  * two",
        "str.upper()\n\n   Return a copy in upper case.",
    ],
    ids=["code", "fence", "session", "list", "term"],
)
def test_what_belongs_together_stays_together(block: str) -> None:
    # Long neighbours, so that a cut falls at every place that allows one.
    document = f"{PARAGRAPH * 3}\n\n{block}\n\n{PARAGRAPH * 3}\n"
    found = texts(document)
    assert len(found) >= 2
    assert sum(block in text for text in found) == 1


def test_an_unclosed_fence_reaches_to_the_end() -> None:
    document = "```\ncode\n\n# comment\n\nmore\n"
    assert texts(document) == [document.rstrip()]


def test_long_lines_are_paragraphs_without_blank_lines_between_them() -> None:
    document = "\n".join(PARAGRAPH for _ in range(9))
    assert len(texts(document)) == 3


def test_markdown_headings_become_titles() -> None:
    document = (
        "Before.\r\n# Guide\r\n\r\nIntro.\r\n\r\n## Set-up ##\r\nDo it.\r\n\r\n# Notes\r\nN.\r\n"
    )
    passages = cut_passages(document, source="doc", title="Manual")
    assert [(passage["title"], passage["text"]) for passage in passages] == [
        ("Manual", "Before."),
        ("Manual > Guide", "Intro."),
        ("Manual > Guide > Set-up", "Do it."),
        ("Manual > Notes", "N."),
    ]


def test_underlined_headings_become_titles() -> None:
    document = "Guide\n*****\n\nIntro.\n\nSet-up\n======\n\nDo it.\n\nNotes\n*****\n\nN.\n"
    passages = cut_passages(document, source="doc")
    assert [(passage["title"], passage["text"]) for passage in passages] == [
        ("Guide", "Intro."),
        ("Guide > Set-up", "Do it."),
        ("Notes", "N."),
    ]


def test_a_rule_under_a_longer_line_is_no_heading() -> None:
    document = "---\ntitle: Something\n---\n\nText."
    assert texts(document) == [document]


# -------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Radium\n\nFound in 1898.", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "polonium.TXT").write_bytes(b"\xef\xbb\xbfFound in July.\r\n")
    rows = [
        {"text": "Found in Paris.", "title": "Place", "id": 7},
        {"text": "## When\nIn winter.", "title": None},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "d.csv").write_text("not,read", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    passages = Retriever.from_folder(tmp_path).passages
    assert [(p["id"], p["title"], p["text"]) for p in passages] == [
        ("a/polonium.TXT", "polonium", "Found in July."),
        ("b.md", "Radium", "Found in 1898."),
        ("7", "Place", "Found in Paris."),
        ("c.jsonl:3", "When", "In winter."),
    ]


def test_hidden_files_and_linked_folders_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "seen.txt").write_text("Seen.", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "log.txt").write_bytes(b"\xff")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "missing.txt", tmp_path / "broken.txt")
    os.symlink(tmp_path / "itself.txt", tmp_path / "itself.txt")
    assert [p["id"] for p in Retriever.from_folder(tmp_path).passages] == ["seen.txt"]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none' does not exist: pass a folder"):
        Retriever.from_folder(tmp_path / "none")
    (tmp_path / "file.txt").write_text("Text.", encoding="utf-8")
    with pytest.raises(InputError, match="is a file, not a folder"):
        Retriever.from_folder(tmp_path / "file.txt")


def test_a_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(InputError, match=r"no documents .* \.jsonl, \.markdown, \.md, \.txt"):
        Retriever.from_folder(tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Caf\u00e9".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt' is not UTF-8 text \(byte 3\)"):
        Retriever.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "A"}', "has no text"),
        ('{"text": " "}', "has no text"),
        ('{"text": 3}', "has no text"),
        ('"text"', "has no text"),
        ('{"text": ', "is not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "Fine."}\n\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=rf"rows\.jsonl', line 3 {message}"):
        Retriever.from_folder(tmp_path)


# --------------------------------------------------------------------------------------- search

PASSAGES: list[dict[str, Any]] = [
    {"title": "Ore", "text": "Pitchblende comes from Bohemia."},
    {"title": "Radium", "text": "Marie Curie found it in 1898.", "page": 12},
    {"title": "Polonium", "text": "Marie Curie found it in July."},
    {"title": "東京", "text": "日本の首都は東京です。"},
]


def test_the_best_passage_comes_first_with_its_score() -> None:
    found = Retriever(PASSAGES).search("When was RADIUM found?", k=2)
    assert [passage["title"] for passage in found] == ["Radium", "Polonium"]
    assert found[0]["page"] == 12
    assert isinstance(found[0]["score"], float)
    assert found[0]["score"] > found[1]["score"] > 0
    assert all("score" not in passage for passage in PASSAGES)


def test_equal_scores_keep_the_order_of_the_passages() -> None:
    passages = [{"text": "the same words", "number": number} for number in range(50)]
    found = Retriever(passages).search("same", k=50)
    assert [passage["number"] for passage in found] == list(range(50))


def test_passages_without_a_word_of_the_question_are_left_out() -> None:
    retriever = Retriever(PASSAGES)
    assert len(retriever.search("Where is Bohemia?", k=5)) == 1
    assert retriever.search("zebra", k=5) == []
    assert retriever.search("?!", k=5) == []


def test_text_without_spaces_is_found() -> None:
    assert Retriever(PASSAGES).search("首都はどこ", k=1)[0]["title"] == "東京"


def test_passages_of_signs_only_can_be_indexed() -> None:
    assert Retriever([{"text": "!!!"}]).search("anything") == []


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    Retriever(PASSAGES).search("radium")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("question", ["", " \n", None])
def test_an_empty_question(question: str) -> None:
    with pytest.raises(InputError, match="question is empty"):
        Retriever(PASSAGES).search(question)


def test_k_below_one() -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        Retriever(PASSAGES).search("radium", k=0)


@pytest.mark.parametrize("passage", [{"title": "A"}, {"text": ""}, {"text": None}, "text"])
def test_a_passage_without_text(passage: Any) -> None:
    with pytest.raises(InputError, match="Passage 1 has no text"):
        Retriever([PASSAGES[0], passage])


def test_no_passages() -> None:
    with pytest.raises(InputError, match="no passages to search"):
        Retriever([])


def test_importing_the_pipelines_stays_light() -> None:
    code = (
        "import sys, pipelines.retrieve, pipelines.language_model, pipelines.small_model, "
        "pipelines.demo.corpus\nprint(*{name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "bm25s", "numba", "httpx", "tqdm", "gguf"}
    assert not heavy & set(run.stdout.split())
