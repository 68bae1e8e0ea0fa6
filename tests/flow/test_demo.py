"""The demo, with a stand-in for the language model; and once for real (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo import run as demo
from pipelines.demo.corpus import demo_questions
from pipelines.language_model import Completion, Message
from pipelines.small_model import ModelUnavailable
from rag_prune import ContextPruner

ROOT = Path(__file__).parents[2]

# The tiny pruner spells words out, and so reads but half of a question.
pytestmark = pytest.mark.filterwarnings("ignore:The question has")


class Parrot:
    """Answers with its whole prompt, so that it is right where the context is."""

    def complete(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Completion:
        text = messages[-1]["content"]
        return Completion(text, len(text.split()), max_new_tokens, 0.25)


class NoModel:
    """In place of `LocalModel`."""

    @staticmethod
    def from_pretrained(folder: Path) -> Parrot:
        assert folder == Path("model")
        return Parrot()


@pytest.fixture(params=["random", "both"])
def pruner(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> ContextPruner:
    folder = tiny_checkpoint if request.param == "both" else None
    pruner = ContextPruner.from_pretrained(folder, method=request.param)
    monkeypatch.setattr(ContextPruner, "from_pretrained", lambda: pruner)
    return pruner


def test_two_questions(
    pruner: ContextPruner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "small_model", lambda: Path("model"))
    monkeypatch.setattr(demo, "LocalModel", NoModel)
    page, results = tmp_path / "new" / "page.html", tmp_path / "figures.json"
    said: list[str] = []
    figures = demo.run(page, questions=2, results=results, say=said.append)

    asked = demo_questions()[:2]
    html = page.read_text(encoding="utf-8")
    assert all(question["question"] in html for question in asked)
    written = json.loads(results.read_text(encoding="utf-8"))
    assert written["figures"] == figures
    assert written["provenance"]["versions"]["torch"]

    assert figures["questions"] == 2
    assert figures["evidence_kept"] <= figures["evidence_found"]
    assert 0 < figures["keep_ratio"] <= 1
    assert figures["full"]["answerable"] == figures["pruned"]["answerable"] == 2
    words = figures["pruned"]["prompt_tokens"], figures["full"]["prompt_tokens"]
    assert words[0] < words[1] if pruner.scorer.name == "random" else words[0] <= words[1]
    assert figures["full"]["seconds"] == 0.25

    head, *table, last = said[1:]
    assert said[0].endswith("passages of Python's language reference, 2 questions")
    assert head.split() == ["full", "pruned"]
    assert len({len(line) for line in [head, *table]}) == 1  # columns stand below each other
    shown = {line[: -len("  123456789  123456789") - 2].strip() for line in table}
    assert {"characters kept", "evidence sentences", "prompt tokens", "right answers"} <= shown
    assert last == f"Look at it: {page.as_uri()}"


def test_what_is_kept_of_the_evidence_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep_all = ContextPruner.from_pretrained(method="keep_all")
    monkeypatch.setattr(ContextPruner, "from_pretrained", lambda: keep_all)
    monkeypatch.setattr(demo, "small_model", lambda: Path("model"))
    monkeypatch.setattr(demo, "LocalModel", NoModel)
    figures = demo.run(tmp_path / "page.html", questions=3, say=lambda _: None)
    assert figures["evidence_kept"] == figures["evidence_found"] > 0
    assert figures["mrr_before"] == figures["mrr_after"]  # no passage is moved
    assert figures["keep_ratio"] == 1
    assert figures["full"] == figures["pruned"]


def test_without_the_language_model_it_still_prunes_and_says_what_is_missing(
    pruner: ContextPruner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unavailable() -> Path:
        raise ModelUnavailable("There is no network.")

    monkeypatch.setattr(demo, "small_model", unavailable)
    said: list[str] = []
    figures = demo.run(tmp_path / "page.html", questions=2, say=said.append)
    assert "No language model, so nothing is answered: There is no network." in said
    assert {"full", "pruned"}.isdisjoint(figures)
    assert any(line.startswith("characters kept") for line in said)
    assert not any(line.startswith("right answers") for line in said)
    assert demo_questions()[0]["question"] in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_is_asked_without_a_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Nothing:
        name = "nothing"

        def score(self, requests: Any) -> Any:
            return [
                [type(s)(s.relevance, 0 * s.sentences) for s in scores]
                for scores in keep_all.scorer.score(requests)
            ]

    keep_all = ContextPruner.from_pretrained(method="keep_all")
    drop_all = ContextPruner(Nothing())
    monkeypatch.setattr(ContextPruner, "from_pretrained", lambda: drop_all)
    monkeypatch.setattr(demo, "small_model", lambda: Path("model"))
    monkeypatch.setattr(demo, "LocalModel", NoModel)
    figures = demo.run(tmp_path / "page.html", questions=1, say=lambda _: None)
    assert figures["pruned"]["prompt_tokens"] == figures["pruned"]["right"] == 0
    assert demo.NOT_ASKED in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_real_demo_in_its_short_form(tmp_path: Path) -> None:
    page, results = tmp_path / "page.html", tmp_path / "figures.json"
    files = ("--html", str(page), "--results", str(results))
    ran = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "demo", "--questions", "2", *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "right answers" in ran.stdout, ran.stdout
    assert f"Look at it: {page.as_uri()}" in ran.stdout
    assert "Traceback" not in ran.stderr
    figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    assert figures["pruned"]["prompt_tokens"] < figures["full"]["prompt_tokens"]
    assert figures["evidence_found"] > 0
    assert page.stat().st_size > 10_000
