"""The page in a real browser: Debian's `chromium`, driven by the package `playwright`."""

import os
import re
import shutil
import time

import pytest

from rag_prune import ContextPruner
from rag_prune.context.highlight import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)

QUESTION = "Who discovered radium in Paris?"
PASSAGES = [
    {"title": "Weather", "text": "Rain falls in Paris. It is often grey."},
    {
        "title": "Radium",
        "text": "Marie Curie discovered radium in Paris. \U0001f469\u200d\U0001f52c She was born "
        "in Warsaw. She studied in Paris.\n\nRadium glows. It is rare. Nobody needs it today.",
    },
    {
        "title": "Radium",
        "text": "Pierre Curie discovered it with her. Paris has a museum for them.",
    },
    {"title": "Weather", "text": "Rain falls in Paris. It is often grey."},
    {
        "title": "Cheese",
        "text": "There are many kinds of cheese. Who discovered them is not known.",
    },
]
HOSTILE = [
    "<script>window.__pwned = 1</script>",
    "</script><script>window.__pwned = 1</script>",
    "<!-- <script>window.__pwned = 1//",
    '"><img src=x onerror="window.__pwned = 1">',
    "<svg onload='window.__pwned = 1'>",
    "</p></main></body></html><iframe srcdoc='<script>parent.__pwned = 1</script>'></iframe>",
    "<base href=x:><meta http-equiv=refresh content='0;url=data:text/html,'>",
    "\u202edesrever\u202c \u2067a\u2069 \0 \ud800 \x07",
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*sandbox, "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Write a page and open it; in the end, nothing has complained or loaded anything."""
    complaints, loaded, contexts = [], [], []
    address = (tmp_path / "page.html").as_uri()

    def show(*results, **options):
        write_page(results, tmp_path / "page.html")
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        page.goto(address)
        return page

    yield show
    for context in contexts:
        context.close()
    assert not complaints
    assert set(loaded) - {"data:,"} == {address}


def prune(passages=PASSAGES, method="bm25", **options):
    return ContextPruner.from_pretrained(method=method).prune(QUESTION, passages, **options)


def slide(page, threshold):
    page.locator("#threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        threshold**0.5,
    )


def kept(page):
    return page.locator("main .sentence.kept").all_text_contents()


def ranked(pruned):
    return sorted(pruned.passages, key=lambda passage: passage.rank)


def expected(pruned):
    return [sentence.text for passage in ranked(pruned) for sentence in passage.kept]


def is_out(passage):
    """Whether no threshold brings any of it back."""
    return passage.dropped[:1] and re.match("duplicate|relevance", passage.dropped[0].reason)


# ------------------------------------------------------------------ the slider
@pytest.mark.parametrize("budget", [{"threshold": 0.5}, {"keep_ratio": 0.4}])
def test_the_slider_cuts_as_python_does(show, budget):
    pruned = prune(top_k=3, **budget)
    page = show(pruned.to_dict())
    assert page.locator("output").text_content() == str(budget.get("threshold", "as cut"))
    assert kept(page) == expected(pruned)
    for threshold in (0, 0.01, 0.25, 0.5, 0.75, 1):
        slide(page, threshold)
        assert page.locator("output").text_content() == str(threshold)
        recut = pruned.recut(threshold=threshold)
        assert kept(page) == expected(recut)
        size = sum(len(text) for text in expected(recut))
        share = f"{100 * recut.keep_ratio:.1f} % kept · {size} of "
        assert page.locator(".all").text_content().startswith(share)
        assert page.locator(".question > .meta").text_content().startswith(share)
        counts = [str(len(p.kept)) for p in ranked(recut) if not is_out(p)]
        assert page.locator(".count").all_text_contents() == counts


def test_the_keys_move_the_slider_and_its_ends_keep_little_and_all(show):
    pruned = prune(threshold=0.5, top_k=3)
    page = show(pruned.to_dict(), pruned.to_dict())
    slider = page.locator("#threshold")
    slider.press("End")
    assert set(kept(page)) == set(expected(pruned.recut(threshold=1)))
    slider.press("Home")
    out = page.locator(".passage", has_text=re.compile("duplicate of|beyond top_k"))
    assert out.count() == 2 * 2
    assert out.locator(".kept").count() == 0
    assert kept(page) == 2 * expected(pruned.recut(threshold=0))
    assert page.locator(".passage", has_not=page.locator(".kept")).count() == 2 * 2
    assert slider.get_attribute("aria-valuetext") == "0"


def test_sentences_that_are_not_shown_are_cut_and_counted(show):
    text = "Radium glows in Paris. " + "Nobody has ever said a word about it. " * 2_000
    pruned = prune([text], threshold=0.5)
    page = show(pruned.to_dict())
    assert page.locator(".unshown").count() == 1
    slide(page, 0)
    assert f"100.0 % kept · {len(text):,} of {len(text):,}" in page.locator(".all").text_content()
    n = len(pruned.passages[0].kept) + len(pruned.passages[0].dropped)
    assert page.locator(".count").text_content() == f"{n:,}"


def test_dropped_sentences_can_be_hidden(show):
    page = show(prune(threshold=0.5).to_dict())
    dropped = page.locator("main .sentence:not(.kept)")
    assert dropped.first.is_visible()
    page.get_by_label("Hide dropped").check()
    assert not any(sentence.is_visible() for sentence in dropped.all())
    assert all(sentence.is_visible() for sentence in page.locator("main .kept").all())


# ------------------------------------------------------------------ score and reason
def test_score_and_reason_are_told_to_pointer_and_keyboard(show):
    pruned = prune(threshold=0.5)
    page = show(pruned.to_dict())
    tip = page.get_by_role("tooltip")
    assert not tip.is_visible()
    page.locator("main .sentence").first.hover()
    best = ranked(pruned)[0]
    assert tip.text_content() == best.kept[0].reason
    page.locator("h1").hover()
    assert not tip.is_visible()
    page.locator("#hide").focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    spans = sorted(best.kept + best.dropped, key=lambda sentence: sentence.start)
    assert tip.is_visible()
    assert tip.text_content() == spans[2].reason
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_the_reason_follows_the_slider(show):
    pruned = prune(keep_ratio=0.3, top_k=3)
    page = show(pruned.to_dict())
    tip, first = page.get_by_role("tooltip"), page.locator("main .sentence").first
    first.hover()
    assert tip.text_content() == f"score 1, {ranked(pruned)[0].kept[0].reason}"
    slide(page, 0.25)
    page.locator("h1").hover()
    first.hover()
    assert tip.text_content() == "score 1 ≥ threshold 0.25"
    page.locator(".passage", has_text="duplicate").locator(".sentence").first.hover()
    assert tip.text_content().endswith("duplicate of passage 0")


# ------------------------------------------------------------------ hostile text
def test_nothing_in_a_passage_runs(show):
    hostile = prune([{"title": text, "text": text} for text in HOSTILE], threshold=0).to_dict()
    answers = [
        {"context": t, "answer": t, "prompt_tokens": 1, "seconds": 1.0, "correct": None}
        for t in HOSTILE
    ]
    page = show(hostile | {"question": "".join(HOSTILE), "answers": answers})
    slide(page, 0.5)
    page.locator("main .sentence").first.hover()
    assert page.evaluate("window.__pwned") is None
    assert page.locator("img, svg, iframe, base").count() == 0
    assert page.locator("script").count() == 1
    unseen = "⟨U+202E⟩desrever⟨U+202C⟩ ⟨U+2067⟩a⟨U+2069⟩ \ufffd \ufffd ⟨U+0007⟩"
    assert set(page.locator(".text").all_text_contents()) == {*HOSTILE[:-1], unseen}


def test_the_policy_stops_a_script_that_got_into_the_page(browser, tmp_path):
    path = tmp_path / "page.html"
    write_page([prune(threshold=0.5).to_dict()], path)
    injected = "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 1'>"
    path.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{injected}"))
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    assert page.evaluate("window.__pwned") is None
    assert any("Content Security Policy" in text for text in refused)
    page.close()


@pytest.mark.parametrize("line", ["x" * 10_000_000, "<b>\u202e" * 2_500_000])
def test_a_line_of_ten_million_characters_opens_at_once(show, line):
    page = show(prune([line], method="lead", threshold=0.5).to_dict())
    begin = time.monotonic()
    page.reload()
    slide(page, 0)
    assert "100.0 % kept · 10,000,000" in page.locator(".all").text_content()
    assert time.monotonic() - begin < 10
    assert "… 9,980,000 characters not shown" in page.locator(".text").text_content()


# ------------------------------------------------------------------ every screen
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_faint_text_can_be_read(show, scheme):
    page = show(prune(threshold=0.5).to_dict(), color_scheme=scheme)

    def luminance(selector, name):
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance("html", "backgroundColor")
    contrast = {}
    for selector in ("main .sentence:not(.kept)", "main .kept", ".meta"):
        ink = luminance(selector, "color")
        contrast[selector] = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
    assert min(contrast.values()) >= 4
    assert contrast["main .kept"] >= 2 * contrast["main .sentence:not(.kept)"]
    decoration = "e => getComputedStyle(e).textDecorationLine"
    assert page.locator("main .kept u").first.evaluate(decoration) == "underline"
    assert page.locator("main .sentence:not(.kept) u").first.evaluate(decoration) == "none"


def test_a_phone_scrolls_only_down(show):
    wide = {"title": "w" * 300, "text": "x" * 3_000}
    page = show(
        prune([*PASSAGES, wide], threshold=0.5).to_dict(), viewport={"width": 360, "height": 640}
    )
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
