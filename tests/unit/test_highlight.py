import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.highlight import LIMIT, write_page


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and text by element class."""

    void = frozenset({"meta", "link", "input"})

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.elements, self.open, self.text = [], [], {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append((tag, dict(attrs).get("class", tag).split()))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for name in {name for _, names in self.open for name in names}:
            self.text[name] = self.text.get(name, "") + data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")

    @property
    def shape(self):
        return [(tag, sorted(attrs)) for tag, attrs in self.elements]

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def passage(text, ends=None, index=0, kept=(), reason="score 0.2 < threshold 0.5", **more):
    """A passage as `to_dict()` gives it, its sentences ending at `ends`."""
    spans = [
        {"start": start, "end": end, "score": 0.7 if i in kept else 0.2, "reason": reason}
        for i, (start, end) in enumerate(zip([0, *(ends or [])], ends or [len(text)], strict=False))
    ]
    given = {"index": index, "title": None, "text": text, "relevance": 0.5, "rank": index, **more}
    return given | {
        "kept": [span for i, span in enumerate(spans) if i in kept],
        "dropped": [span for i, span in enumerate(spans) if i not in kept],
    }


def result(*passages, question="Who?", threshold=0.5, **more):
    given = {"question": question, "method": "bm25", "threshold": threshold, "keep_ratio": 0.5}
    return given | {"text": "", "passages": list(passages), **more}


@pytest.fixture
def page(tmp_path):
    def write(*results, **options):
        write_page(results, tmp_path / "page.html", **options)
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return write


# ------------------------------------------------------------------ what it shows
def test_a_result_writes_its_own_page(tmp_path):
    texts = ["Marie Curie found radium.  She was born in Warsaw.\n\n  Radium glows.", "Rain falls."]
    pruned = ContextPruner.from_pretrained(method="bm25").prune(
        "Who found radium?", [*texts, texts[1]], threshold=0.5
    )
    pruned.to_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text["text"] == texts[0] + texts[1] + texts[1]
    assert page.text["kept"] == "Kept sentences are underlined" + pruned.passages[0].text
    assert page.text["h2"] == "Who found radium?"
    assert "duplicate of passage 1" in page.text["meta"]


def test_the_best_passage_comes_first(page):
    shown = page(result(passage("b", rank=1), passage("a", rank=0, title="Top", relevance=0.93)))
    assert shown.text["text"] == "ab"
    assert shown.text["h3"] == "TopPassage 0"
    assert "relevance 0.930 · passage 0 · 0 of 1 sentences kept" in shown.text["meta"]


def test_kept_and_dropped_are_counted(page):
    shown = page(result(passage("Yes. No. ", [5, 9], kept=[0])), result(passage("Not.")))
    sizes = [attrs["data-size"] for _, attrs in shown.elements if attrs.get("class") == "tally"]
    assert sizes == ["13", "9", "4"]
    assert "38.5 % kept · 5 of 13 characters" in shown.text["all"]
    assert "55.6 % kept · 5 of 9 characters" in shown.text["question"]
    assert "1 of 2 sentences kept" in shown.text["passage"]


def test_each_sentence_says_why(page):
    over = passage("a", reason="over the budget of 3 characters")
    shown = page(result(over, passage("b", index=1), passage("c", [1], index=2, kept=[0])))
    assert shown.attributes("title") == [
        "score 0.2, over the budget of 3 characters",
        "score 0.2 < threshold 0.5",
        "score 0.2 < threshold 0.5",
    ]
    assert shown.attributes("data-score") == ["0.2", "0.2", "0.7"]


@pytest.mark.parametrize("reason", ["duplicate of passage 0", "relevance rank 3 is beyond top_k 2"])
def test_what_no_threshold_brings_back_has_no_score_for_the_slider(page, reason):
    shown = page(result(passage("a" * (LIMIT + 1) + "b", [LIMIT + 1, LIMIT + 2], reason=reason)))
    assert reason in shown.text["meta"]
    assert not shown.attributes("data-score")
    assert shown.attributes("data-unshown") == ["[]"]


@pytest.mark.parametrize(
    ("thresholds", "output", "position"),
    [([0.25], "0.25", 0.5), ([None], "as cut", math.sqrt(0.1)), ([0.25, 0.5], "as cut", None)],
)
def test_the_slider_starts_at_the_threshold_of_the_cut(page, thresholds, output, position):
    shown = page(*(result(passage("a"), threshold=threshold) for threshold in thresholds))
    [slider] = [attrs for _, attrs in shown.elements if attrs.get("type") == "range"]
    assert shown.text["output"] == output
    assert float(slider["value"]) == (position or math.sqrt(0.1))


def test_answers_and_a_summary(page):
    answers = [
        {"context": "full", "answer": "An elf.", "prompt_tokens": 1631, "seconds": 4.21},
        {"context": "pruned", "answer": "Link.", "prompt_tokens": 276, "seconds": 0.8},
        {"context": "none", "answer": "?", "prompt_tokens": 9, "seconds": 0.1},
    ]
    correct = [False, True, None]
    shown = page(
        result(answers=[a | {"correct": c} for a, c in zip(answers, correct, strict=True)]),
        title="Hyrule",
        summary=[{"context": "full", "token F1": "0.12"}, {"context": "pruned"}],
    )
    assert "wrong · 1,631 prompt tokens · 4.2 s" in shown.text["answer"]
    assert "right · 276 prompt tokens · 0.8 s" in shown.text["answer"]
    assert shown.text["said"] == "An elf.Link.?"
    assert (shown.text["right"], shown.text["wrong"]) == ("right", "wrong")
    assert (shown.text["th"], shown.text["td"]) == ("contexttoken F1", "full0.12pruned")
    assert shown.text["title"] == shown.text["h1"] == "Hyrule"


def test_line_ends_of_prose_wrapped_by_hand_may_flow(page):
    prose = "A line that is long enough to have been wrapped\nby hand goes on.  \n"
    code = "    for a_variable in range(1_000_000_000_000):\n        print(a_variable)\n"
    text = prose + "\n" + code + "A line that is long enough, and then a list\n- of things\n"
    shown = page(result(passage(text, [len(prose), len(text)])))
    assert shown.text["text"] == text
    assert shown.text["wrapped"] == "\n"


def test_no_passages_is_a_page_and_no_results_is_an_error(page, tmp_path):
    assert "There were no passages." in page(result()).text["question"]
    with pytest.raises(InputError, match=r"^A page needs at least one result, got none: .*\.$"):
        write_page([], tmp_path / "none.html")
    assert os.listdir(tmp_path) == ["page.html"]


# ------------------------------------------------------------------ hostile text
def everywhere(text):
    """A page with `text` in every place that a caller's text reaches."""
    answer = {"context": text, "answer": text, "prompt_tokens": 1, "seconds": 1.0, "correct": None}
    passages = [
        passage(text, title=text, reason=text),
        passage(text, title=text, index=1, reason="duplicate of " + text),
    ]
    return {
        "results": [result(*passages, question=text, method=text, answers=[answer])],
        "title": text,
        "summary": [{text: text}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.__pwned = 1</script>",
        "</script><script>window.__pwned = 1</script>",
        "</style></title></textarea>--><b>",
        "<!--",
        "<!-- <script>",
        "]]>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "&lt;b&gt; &amp;#60; &copy",
        "{{ 7 * 7 }} {% raw %} {# no #}",
        "javascript:alert(1)",
        "\u2028\u2029\ufeff\u200b\xa0",
        "مرحبا hello \U0001f469\u200d\U0001f52c",
    ],
)
def test_hostile_text_is_only_text(tmp_path, text):
    def written(text):
        write_page(**{**everywhere(text), "path": tmp_path / "page.html"})
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    page = written(text)
    assert page.shape == written("harmless").shape
    assert page.text["text"] == text * 2
    assert page.text["h2"] == page.text["title"] == page.text["said"] == page.text["td"] == text
    assert page.attributes("title") == ["score 0.2, " + text, "score 0.2, duplicate of " + text]


@pytest.mark.parametrize("code", [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x07, 0x1B, 0x9F])
def test_characters_that_work_unseen_are_shown(tmp_path, code):
    write_page(**everywhere(f"a{chr(code)}b"), path=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert chr(code) not in page.source
    assert page.text["text"] == f"a⟨U+{code:04X}⟩b" * 2
    assert page.text["h2"] == f"a⟨U+{code:04X}⟩b"


@pytest.mark.parametrize("broken", ["\0", "\ud800", "\ude00\ud83d"])
def test_what_a_file_cannot_hold_is_replaced(tmp_path, broken):
    write_page(**everywhere(f"a{broken}b"), path=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text["text"] == ("a" + "\ufffd" * len(broken) + "b") * 2


def test_passages_are_isolated_from_the_direction_of_their_surroundings(page):
    shown = page(result(passage("שלום", title="שלום")))
    assert [attrs["dir"] for _, attrs in shown.elements if "text" in attrs.get("class", "")] == [
        "auto"
    ]
    assert shown.text["bdi"] == "prunekitWho?שלום"
    assert "unicode-bidi: isolate" in shown.text["style"]


@pytest.mark.parametrize("line", ["x" * 10_000_000, " " * 10_000_000])
def test_a_line_of_ten_million_characters_is_clipped(page, line):
    shown = page(result(passage(line), question=line))
    assert len(shown.source) < 100_000
    assert shown.text["text"] == line[:LIMIT] + " … 9,980,000 characters not shown "
    assert shown.text["h2"] == line[:LIMIT] + " … 9,980,000 characters not shown"
    assert "of 10,000,000 characters" in shown.text["all"]


def test_of_a_long_passage_the_best_sentences_are_shown_and_all_are_counted(page):
    sentence = "Nothing of interest happens in this one. "
    n, size = 1_000, len(sentence)
    shown = page(result(passage(sentence * n, [size * (i + 1) for i in range(n)], kept=[900])))
    assert shown.text["kept"] == "Kept sentences are underlined" + sentence
    assert f"{size} of {n * size:,} characters" in shown.text["all"]
    assert shown.text["sentence"].count(sentence) == LIMIT // size + 1  # the last one whole
    unshown = [pair for run in shown.attributes("data-unshown") for pair in json.loads(run)]
    whole = [attrs for _, attrs in shown.elements if "data-score" in attrs]
    assert len(unshown) + len(whole) == n
    assert set(map(tuple, unshown)) == {(0.2, size)}


# ------------------------------------------------------------------ one safe file
def test_the_page_needs_nothing_from_anywhere(page):
    shown = page(result(passage("a")))
    assert not re.search(r"https?:|//[\w.]+\.\w|@import|url\(", shown.source.replace("// ", ""))
    assert not shown.attributes("src")
    assert not shown.attributes("style")
    assert shown.attributes("href") == ["data:,"]
    assert not [name for _, attrs in shown.elements for name in attrs if name.startswith("on")]


def test_the_policy_allows_our_script_and_style_and_no_other(page):
    shown = page(result(passage("a")))
    [policy] = [
        attrs["content"]
        for _, attrs in shown.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name in ("script", "style"):
        [body] = re.findall(rf"<{name}>(.*?)</{name}>", shown.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"


def test_an_error_leaves_the_old_page(page, tmp_path):
    page(result(passage("old")))
    before = (tmp_path / "page.html").read_bytes()
    answer = {
        "context": "full",
        "answer": "a",
        "prompt_tokens": "many",
        "seconds": 1,
        "correct": None,
    }
    with pytest.raises(ValueError, match="Cannot specify"):
        page(result(passage("new")), result(answers=[answer]))
    assert (tmp_path / "page.html").read_bytes() == before
    assert os.listdir(tmp_path) == ["page.html"]
