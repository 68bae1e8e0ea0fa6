"""The command line: what goes in and comes out, and one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import AutoConfig

import data_prune
import model_prune
from pipelines import cli
from rag_prune import METHODS, ContextPruner
from rag_prune.kv.masks import load_masks, model_fingerprint
from tiny import toy_encoder, toy_language_model, toy_rows, write_rows

ROOT = Path(__file__).parents[2]
CURIE = "Marie Curie found radium. She liked cycling."
PARIS = {"title": "Paris", "text": "Paris is big. Nobody found it.", "source": 7, "tags": ["é"]}
BM25 = ("--method", "bm25")
QUESTION = ("--question", "Who found radium?")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`prunekit` in this process, as the installed command calls it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*arguments: str | Path, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "argv", ["prunekit", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        sys.stdout.flush()
        code = exit.value.code or 0
        assert isinstance(code, int)
        return Ran(code, *capfd.readouterr())

    return call


def jsonl(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def failed(ran: Ran) -> str:
    """The one line that a run says when the user got something wrong."""
    assert ran.code == 2
    assert ran.err.startswith("prunekit: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    return ran.err


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# --------------------------------------------------------------------------------------- help

COUNTED = """
import resource, sys
from pipelines.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = {"torch", "transformers", "numpy", "bm25s", "langchain_core"} & set(sys.modules)
print(used.ru_utime + used.ru_stime, *heavy, file=sys.stderr)
"""


def test_help_answers_at_once_and_loads_no_model_library() -> None:
    process = python(COUNTED, "--help")
    out, err = process.communicate()
    assert b"context" in out
    seconds, *heavy = err.decode().split()
    assert heavy == []
    assert float(seconds) < 1  # of the processor, as other work may keep a clock waiting


@pytest.mark.parametrize("arguments", [(), ("rag",), ("kv",)])
def test_a_command_alone_shows_its_help(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert "Usage: prunekit" in ran.out
    assert (ran.code, ran.err) == (2, "")


# ------------------------------------------------------------------------------------ context


def test_passages_come_out_shorter_best_first_with_their_other_keys(run: Run) -> None:
    ran = run(
        "context", *QUESTION, *BM25, "--threshold", "0.9", stdin=jsonl(PARIS, CURIE) + b"\n\n"
    )
    assert (ran.code, ran.err) == (0, "")
    (row,) = ran.rows
    assert row["text"] == "Marie Curie found radium. "
    assert row["kept_spans"] == [[0, 26]]
    assert 0 <= row["relevance_score"] <= 1

    everything = run(
        "context", *QUESTION, *BM25, "--keep-ratio", "1", stdin=jsonl(PARIS, CURIE)
    ).rows
    assert [row["text"] for row in everything] == [CURIE, PARIS["text"]]
    assert everything[0]["relevance_score"] > everything[1]["relevance_score"]
    assert {key: everything[1][key] for key in PARIS} == PARIS
    assert everything[1]["kept_spans"] == [[0, 14], [14, 30]]

    (best,) = run(
        "context", *QUESTION, *BM25, "--top-k", "1", "--threshold", "0", stdin=jsonl(PARIS, CURIE)
    ).rows
    assert best["text"] == CURIE


def test_text_is_utf8_and_a_lone_surrogate_stays_spelled(run: Run) -> None:
    given = rb'"Radium \ud800 \u00e9\ud83d\ude42 was found."'
    ran = run("context", *QUESTION, *BM25, stdin=given)
    assert ran.rows[0]["text"] == json.loads(given)
    assert r"Radium \ud800 é🙂 was" in ran.out


def test_requests_come_from_a_file_and_results_go_to_one(run: Run, tmp_path: Path) -> None:
    requests = [("Who found radium?", [CURIE, PARIS]), ("What is big?", [PARIS]), ("Why?", [])]
    source, out = tmp_path / "requests.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_bytes(jsonl(*({"question": q, "passages": p} for q, p in requests)))
    ran = run("context", source, "--out", out, *BM25)
    assert ran == Ran(0, "", "")
    results = ContextPruner.from_pretrained(method="bm25").prune_many(requests)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == [result.to_dict() for result in results]
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("method", ["bm25", "lead", "random", "keep_all"])
def test_every_method_without_a_model(run: Run, method: str) -> None:
    ran = run("context", *QUESTION, "--method", method, stdin=jsonl(CURIE))
    assert (ran.code, ran.err) == (0, "")


def test_a_model_folder(run: Run, tiny_checkpoint: Path) -> None:
    model = ("--model", tiny_checkpoint, "--method", "late")
    ran = run("context", *QUESTION, *model, "--threshold", "0", stdin=jsonl(CURIE))
    assert (ran.code, ran.err) == (0, "")
    assert [row["text"] for row in ran.rows] == [CURIE]

    fast = run("context", *QUESTION, *model, "--precision", "fast", stdin=jsonl(CURIE))
    assert (fast.code, fast.err) == (0, "")


def test_pages(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("context", *QUESTION, *BM25, "--html", page, stdin=jsonl(CURIE)).code == 0
    assert "Who found radium?" in page.read_text(encoding="utf-8")

    request = {"question": "Who cycles?", "passages": [CURIE]}
    assert run("context", *BM25, "--html", page, stdin=jsonl(request, request)).code == 0
    assert page.read_text(encoding="utf-8").count("Who cycles?") >= 2


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (QUESTION, b'"fine."\n\n{"text": "cut off', "Line 3 is not JSON"),
        (QUESTION, b'"fine."\n"\xff\xfe"', "Line 2 is not JSON ('utf-8' codec"),
        (QUESTION, b"[" * 100_000, "Line 1 is not JSON"),
        (QUESTION, b"\n \n", "There are no passages: give"),
        (QUESTION, b"7", "Passage 0 must be a string"),
        (QUESTION, b'{"title": "no text"}', "Passage 0 must be a string"),
        (("--question", " "), b'"fine."', "The question must be a string with some text"),
        ((), b"", "There are no requests: give"),
        ((), b'{"question": "Q"}', "Line 1 must be an object with 'question', a string, and"),
        ((), b'\n"bare passage"', "Line 2 must be an object with 'question', a string, and"),
        ((), b'{"question": "Q", "passages": "p"}', "Line 1 must be an object"),
        ((*QUESTION, "--threshold", "2"), b'"fine."', "got 2"),
        ((*QUESTION, "--threshold", "nan"), b'"fine."', "threshold"),
        ((*QUESTION, "--keep-ratio", "-1"), b'"fine."', "keep_ratio"),
        ((*QUESTION, "--threshold", "0.1", "--keep-ratio", "0.5"), b'"fine."', "exactly one"),
        ((*QUESTION, "--top-k", "0"), b'"fine."', "top_k must be a whole number"),
        ((*QUESTION, "--method", "bn25"), b'"fine."', "Did you mean 'bm25'?"),
        ((*QUESTION, "--model", "no/such/folder"), b'"fine."', "no folder no/such/folder"),
        (("no-such-file.jsonl",), b"", "Cannot read 'no-such-file.jsonl' (No such file"),
        (("..",), b"", "Cannot read '..' (Is a directory)"),
        ((*QUESTION, "--precision", "int4"), b'"fine."', "'int4' is not one of 'float32', 'fast'"),
        ((*QUESTION, "--threshold", "high"), b'"fine."', "Invalid value for '--threshold'"),
        (("--quetsion", "Q"), b'"fine."', "No such option: --quetsion"),
        (("--question",), b'"fine."', "--question"),
    ],
)
def test_what_is_wrong_with_context_is_one_line(
    run: Run, arguments: tuple[str, ...], stdin: bytes, said: str
) -> None:
    method = () if {"--model", "--method"} & set(arguments) else BM25
    ran = run("context", *method, *arguments, stdin=stdin)
    assert said in failed(ran)
    assert ran.out == ""


def test_a_failing_run_leaves_no_file_and_an_old_one_as_it_was(run: Run, tmp_path: Path) -> None:
    good = {"question": "Q", "passages": [CURIE]}
    broken = jsonl(*[good] * 40, {"question": "Q"})  # more than are pruned at a time
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    said = failed(run("context", "--out", out, "--html", page, *BM25, stdin=broken))
    assert "Line 41" in said
    assert list(tmp_path.iterdir()) == []

    out.write_text("old")
    failed(run("context", "--out", out, *BM25, stdin=broken))
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    blocked, out = tmp_path / "file", tmp_path / "out.jsonl"
    blocked.write_text("not a folder")
    ran = run("context", *QUESTION, *BM25, "--out", blocked / "out.jsonl", stdin=jsonl(CURIE))
    assert f"Cannot write '{blocked / 'out.jsonl'}'" in failed(ran)
    page = ("--html", blocked / "page.html")
    assert str(blocked) in failed(
        run("context", *QUESTION, *BM25, "--out", out, *page, stdin=jsonl(CURIE))
    )
    assert list(tmp_path.iterdir()) == [blocked]


# ------------------------------------------------------------------------- pipes and interrupts

MAIN = "from pipelines.cli import main; main()"
LONG = jsonl(*[{"question": "Q", "passages": ["It was found. " * 400]}] * 64)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_bytes(LONG)
    process = python(MAIN, "context", "requests.jsonl", "--method", "lead", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b'{"question"')
    process.stdout.close()  # as `head -1` does
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_control_c_stops_quietly_and_leaves_nothing(tmp_path: Path) -> None:
    # Started from a shell's background a process would ignore the signal.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    out = ("--out", str(tmp_path / "out.jsonl"))
    process = python(
        listen + MAIN, "context", "--method", "lead", *out, stdin=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdin is not None
    process.stdin.write(LONG + b"\n")
    process.stdin.flush()  # and more may come
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, b"")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ rag ask


class Reader(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that always gives the same answer."""

    asked: ClassVar[list[dict[str, Any]]]
    url: ClassVar[str]
    status = 200
    said = "Marie Curie"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append({**json.loads(body), "key": self.headers["Authorization"]})
        reply = {
            "choices": [{"message": {"content": self.said}}],
            "usage": {"prompt_tokens": 21, "completion_tokens": 2},
        }
        content = json.dumps(reply if self.status == 200 else {"error": "out of order"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def reader() -> Iterator[type[Reader]]:
    class Fresh(Reader):
        pass

    Fresh.asked = []
    with HTTPServer(("127.0.0.1", 0), Fresh) as server:
        Fresh.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Fresh
        server.shutdown()
        thread.join()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "radium.md").write_text(f"# Radium\n\n{CURIE}\n", encoding="utf-8")
    (folder / "paris.txt").write_text(PARIS["text"], encoding="utf-8")
    return folder


def test_asking_a_server_with_a_baseline_needs_no_torch(reader: Any, docs: Path) -> None:
    arguments = ("--docs", str(docs), "--endpoint", reader.url, "--llm", "tiny", *BM25)
    process = python(COUNTED, "rag", "ask", "Who found radium?", *arguments, "--threshold", "0.9")
    out, err = process.communicate()
    assert out.decode().splitlines() == [
        "Marie Curie",
        "  [radium.md] Marie Curie found radium.",
    ]
    *said, counted = err.decode().splitlines()
    assert len(said) == 1
    assert "of 2 passages kept; 21 prompt tokens" in said[0]
    assert {"torch", "transformers"}.isdisjoint(counted.split())
    (asked,) = reader.asked
    assert asked["model"] == "tiny"
    context = asked["messages"][0]["content"]
    assert "\n\nRadium\nMarie Curie found radium.\n\nQuestion: Who found radium?" in context


def test_a_key_and_a_page(run: Run, reader: Any, docs: Path, tmp_path: Path) -> None:
    server = ("--endpoint", reader.url, "--llm", "tiny", "--api-key", "secret")
    page = tmp_path / "page.html"
    ran = run("rag", "ask", "Who found radium?", "--docs", docs, *server, *BM25, "--html", page)
    assert (ran.code, ran.out.splitlines()[0]) == (0, "Marie Curie")
    assert "secret" not in ran.out + ran.err
    assert reader.asked[0]["key"] == "Bearer secret"
    assert "Who found radium?" in page.read_text(encoding="utf-8")


def test_documents_that_do_not_answer(run: Run, reader: Any, docs: Path) -> None:
    server = ("--endpoint", reader.url, "--llm", "tiny")
    ran = run("rag", "ask", "Why do penguins swim?", "--docs", docs, *server, *BM25)
    assert (ran.code, ran.err) == (0, "")
    assert "The documents do not answer this" in ran.out
    assert reader.asked == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--docs", "no-such-folder", "--llm", "tiny"), "folder 'no-such-folder' does not exist"),
        (("--docs", "docs"), "--endpoint needs --llm"),
        (("--docs", "docs", "--llm", "tiny", "-k", "0"), "at least 1, got 0"),
        (("--docs", "docs", "--llm", "tiny", "--threshold", "2"), "got 2"),
        (("--docs", "docs", "--llm", "tiny", "--method", "bm52"), "Did you mean 'bm25'?"),
        (("--docs", "bad", "--llm", "tiny"), "'bad/latin.txt' is not UTF-8"),
        (("--llm", "tiny"), "Missing option '--docs'"),
    ],
)
def test_what_is_wrong_with_a_question_is_one_line(
    run: Run,
    reader: Any,
    docs: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(docs.parent)
    bad = docs.parent / "bad"
    bad.mkdir()
    (bad / "latin.txt").write_bytes("Café".encode("latin-1"))
    method = () if "--method" in arguments else BM25
    server = ("--endpoint", reader.url)
    assert said in failed(run("rag", "ask", "Who found radium?", *server, *method, *arguments))
    assert reader.asked == []


def test_a_server_that_refuses(run: Run, reader: Any, docs: Path) -> None:
    reader.status = 500
    server = ("--endpoint", reader.url, "--llm", "tiny")
    said = failed(run("rag", "ask", "Who found radium?", "--docs", docs, *server, *BM25))
    assert "status 500: out of order" in said


# --------------------------------------------------------------------------- methods and demo


def test_methods(run: Run) -> None:
    ran = run("methods")
    assert (ran.code, ran.err) == (0, "")
    for method in (*METHODS, *model_prune.METHODS):
        assert method.paper in ran.out
    assert "(arXiv 2501.16214)" in ran.out


def test_methods_as_json(run: Run) -> None:
    rows = json.loads(run("methods", "--json").out)
    all_of = (*METHODS, *data_prune.METHODS, *model_prune.METHODS)
    assert [(row["package"], row["name"]) for row in rows] == [(m.package, m.name) for m in all_of]
    for row in rows:
        assert {"name", "package", "family", "paper", "arxiv", "year"} <= set(row)
    (provence,) = (row for row in rows if row["name"] == "provence")
    assert (provence["package"], provence["arxiv"], provence["year"]) == (
        "rag_prune",
        "2501.16214",
        2025,
    )


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ("0", "must be 1 to 24, got 0"),
        ("99", "must be 1 to 24, got 99"),
        ("many", "Invalid value for '--questions'"),
    ],
)
def test_a_number_of_questions_that_the_demo_does_not_have(
    run: Run, tmp_path: Path, questions: str, said: str
) -> None:
    page = tmp_path / "page.html"
    assert said in failed(run("demo", "--questions", questions, "--html", page))
    assert not page.exists()


def test_an_unknown_command(run: Run) -> None:
    assert "No such command 'methos'. Did you mean 'methods'?" in failed(run("methos"))


def test_the_server_says_what_keeps_it_from_serving(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = run("serve-context", *BM25, "--port", str(taken.getsockname()[1]))
    assert (ran.code, ran.out) == (2, "")
    assert "Address already in use" in ran.err
    ran = run("serve-context", *BM25, "--max-bytes", "0")
    assert (ran.code, ran.out) == (2, "")
    assert "The limit body_bytes must be more than 0, got 0." in ran.err


# ---------------------------------------------------------------------- context label and train


def test_context_prunes_whether_or_not_it_says_so(run: Run) -> None:
    given = (*QUESTION, *BM25)
    assert run("context", "prune", *given, stdin=jsonl(CURIE)) == run(
        "context", *given, stdin=jsonl(CURIE)
    )
    shown = run("context", "--help")
    assert shown.code == 0
    assert {"prune", "label", "train"} <= set(shown.out.split())


def test_labels_from_a_server(run: Run, reader: Any, tmp_path: Path) -> None:
    reader.said = json.dumps({"answer": None, "sentences": []})
    source, out = tmp_path / "questions.jsonl", tmp_path / "rows.jsonl"
    source.write_bytes(
        jsonl({"question": "Who cycles?", "passages": [CURIE, PARIS], "answers": ["Pierre"]})
    )
    server = ("--endpoint", reader.url, "--llm", "big", "--api-key", "secret")
    ran = run("context", "label", source, "--out", out, *server)
    assert (ran.code, ran.out) == (0, "")
    assert "2 of 2 kept: 2 no answer" in ran.err
    assert "2 prompts, 42 tokens read, 4 written" in ran.err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["title"], row["passage"], row["evidence"]) for row in rows] == [
        (None, CURIE, []),
        ("Paris", PARIS["text"], []),
    ]
    assert {asked["key"] for asked in reader.asked} == {"Bearer secret"}
    assert run("context", "label", source, "--out", out, *server).code == 0
    assert len(reader.asked) == 2  # not asked again

    said = failed(run("context", "label", source, "--out", out, *server[:3], "other"))
    assert """'model' was "big" and is now "other\"""" in said
    source.write_bytes(jsonl({"question": "Q"}))
    said = failed(run("context", "label", source, "--out", out, *server))
    assert "questions.jsonl', line 1 (blank ones not counted): there must be either" in said


def test_training_by_command(run: Run, tmp_path: Path) -> None:
    base = toy_encoder(tmp_path / "encoder")
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(40))
    dev = write_rows(tmp_path / "dev.jsonl", toy_rows(30, seed=7))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text("steps: 9\nquestions: 4\nmax_tokens: 128\nlearning_rate: 0.001\n")
    command = ("context", "train", rows, "--base", base, "--out", out, "--recipe", recipe)
    ran = run(*command, "--steps", "2", "--dev", dev, "--method", "late")
    assert (ran.code, ran.out) == (0, f"{out / 'model'}\n")
    assert "training: 100%" in ran.err
    for engine in ("provence", "late", "both"):
        assert any(line.startswith(engine) and "MRR" in line for line in ran.err.splitlines())
    config = json.loads((out / "run.json").read_text())["extra"]["config"]
    assert (config["steps"], config["questions"], config["learning_rate"]) == (2, 4, 1e-3)
    assert run("context", *QUESTION, "--model", out / "model", stdin=jsonl(CURIE)).code == 0

    assert "holds a run with other settings" in run(*command, "--steps", "3").err
    recipe.write_text("stps: 9\n")
    assert "Did you mean 'steps'?" in failed(run(*command))
    assert "Did you mean 'late'?" in run(*command[:-2], "--method", "lat").err


# ------------------------------------------------------------------------------------ kv plan

KV_PAGE = (ROOT / "docs" / "kv-cache.md").read_text(encoding="utf-8")


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of docs/kv-cache.md, in the working folder."""
    [config] = re.findall(r"^```json\n(.*?)^```$", KV_PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("llama-8b").mkdir()
    Path("llama-8b/config.json").write_text(config)
    return Path("llama-8b")


def test_the_page_shows_what_its_commands_print(run: Run, llama: Path) -> None:
    blocks = re.findall(r"^```console\n\$ prunekit (.*)\n((?:.*\n)*?)```$", KV_PAGE, re.MULTILINE)
    assert len(blocks) == 2
    for command, printed in blocks:
        assert run(*shlex.split(command)) == Ran(0, printed, "")


def test_a_plan_as_json_is_an_object_and_without_a_method_a_list(run: Run, llama: Path) -> None:
    size = ("kv", "plan", "--model", llama, "--gpu-memory", "80GB", "--context", "8192", "--json")
    rows = json.loads(run(*size).out)
    assert [
        tuple(row["config"][name] for name in ("method", "key_ratio", "value_ratio"))
        for row in rows
    ] == [("think", 0.5, 0), ("think", 0.5, 0.5), ("mustafar", 0.5, 0.5), ("mustafar", 0.7, 0.7)]
    assert json.loads(run(*size, "--method", "think").out) == rows[0]
    options = ("--method", "mustafar", "--key-ratio", "0.7", "--value-ratio", "0.7")
    assert json.loads(run(*size, *options).out) == rows[3]
    other = ("--recent", "32", "--block-size", "128", "--dtype", "float32")
    got = json.loads(run(*size, *options, *other).out)
    assert got["config"]["recent"] == 32
    assert (got["block_size"], got["weights_bytes"]) == (128, 2 * rows[3]["weights_bytes"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gpu-memory", "lots"), "must be a number above 0 with a unit, got 'lots'"),
        (("--gpu-memory", "8GiB"), "8.00 GiB of memory are too small for the weights"),
        (("--key-ratio", "0.4"), "--key-ratio needs --method: name think or mustafar."),
        (("--method", "thin"), "Did you mean 'think'?"),
        (("--dtype", "fp8"), "A cache in fp8 cannot be pruned"),
        (("--block-size", "8"), "The block size must be a multiple of 16"),
        (("--context", "0"), "context must be a whole number of tokens above 0"),
    ],
)
def test_a_plan_that_cannot_be(run: Run, llama: Path, options: tuple[str, str], says: str) -> None:
    size = ("--model", llama, "--gpu-memory", "80GB", "--context", "8192")
    assert says in failed(run("kv", "plan", *size, *options))


# ------------------------------------------------------------------------------- kv calibrate
def test_calibration_writes_a_file_of_masks(run: Run, tmp_path: Path) -> None:
    folder = toy_language_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the cat is in paris today . " * 60)
    out = tmp_path / "masks.safetensors"
    ran = run("kv", "calibrate", folder, text, "--out", out, "--tokens", "128")
    assert (ran.code, ran.out) == (0, f"Wrote {out}.\n")
    config = AutoConfig.from_pretrained(folder)
    assert load_masks(out, model_fingerprint(config)).shape == (3, 2, 32)


def test_calibration_that_cannot_be(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe")
    assert "give a text file in UTF-8" in failed(run("kv", "calibrate", tmp_path, text))
    text.write_text("short")
    assert "Cannot load a language model" in failed(run("kv", "calibrate", tmp_path, text))


# -------------------------------------------------------------------- model and model-eval


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Path]:
    """A language model's folder and a text that it can read."""
    text = tmp_path / "text.txt"
    text.write_text("the cat is in paris today .\n" * 400)
    return toy_language_model(tmp_path / "model"), text


def test_a_look_before_anything_is_pruned(run: Run, toy: Any, tmp_path: Path) -> None:
    model, text = toy
    read = ("--calibration", text, "--windows", "2", "--tokens", "32")
    ran = run("model", model, "--method", "flap", "--remove", "0.25", *read, "--dry-run")
    assert ran.code == 0
    assert "model: flap, remove 0.25" in ran.out
    assert "of the decoder layers" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_prune_a_model_by_a_plan_that_was_kept(run: Run, toy: Any, tmp_path: Path) -> None:
    model, text = toy
    read = ("--calibration", text, "--windows", "2", "--tokens", "32")
    kept, out, again = (tmp_path / name for name in ("plan.json", "out", "again"))
    options = ("--method", "wanda", "--pattern", "2:4", "--target", "mlp.*", *read)
    ran = run("model", model, *options, "--out", out, "--save-plan", kept, "--evaluate", text)
    assert ran.code == 0
    assert "Gone: 50.0 % of the target" in ran.out
    assert "perplexity, text.txt:" in ran.out
    assert json.loads((out / "prunekit.json").read_text())["settings"]["targets"] == ["mlp.*"]
    page = tmp_path / "page.html"
    assert run("model", model, "--plan", kept, "--out", again, "--html", page).code == 0
    assert page.read_text().startswith("<!doctype html>")
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (out, again))
    assert one == other

    measure = ("--text", text, "--tokens", "32")
    ran = run("model-eval", out, *measure, "--against", again)
    assert "text.txt: perplexity " in ran.out
    assert "1.000 times the perplexity" in ran.out
    found = json.loads(run("model-eval", model, *measure, "--json").out)
    assert found["perplexity"]["text.txt"]["protocol"]["tokens"] == 32


def test_settings_that_only_one_method_has(run: Run, toy: Any) -> None:
    model, _ = toy
    dry = ("--method", "random", "--dry-run")
    one, other = (run("model", model, *dry, "--set", f"seed={s}").out for s in (1, 2))
    assert one == other  # as many go, but not the same: see the contract tests
    said = failed(run("model", model, *dry, "--set", "sed=1"))
    assert "Unknown key 'sed'. Did you mean 'seed'?" in said
    assert "--set takes NAME=VALUE, got 'seed'" in failed(
        run("model", model, *dry, "--set", "seed")
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--dry-run",), "Name a --method to plan by, or a --plan to follow"),
        (("--method", "wanda"), "Name the folder to write with --out"),
        (("--method", "wanda", "--dry-run"), "name a text file with --calibration"),
        (("--method", "wanda", "--sparsity", "50", "--dry-run"), "write 0.5 for 50 %"),
        (("--plan", "no.json", "--dry-run"), "Cannot read the plan 'no.json'"),
        (("--method", "random", "--evaluate", "no.txt", "--out", "out"), "the text 'no.txt'"),
    ],
)
def test_a_model_that_cannot_be_pruned(
    run: Run, toy: Any, options: tuple[str, ...], says: str
) -> None:
    assert says in failed(run("model", toy[0], *options))


def test_experts_of_a_task_and_of_a_query(run: Run, tmp_path: Path) -> None:
    from tiny import toy_tokenizer
    from tiny_mixtures import tiny_mixture

    model, library, out = (tmp_path / name for name in ("model", "library", "out"))
    tokenizer = toy_tokenizer()
    tiny_mixture("mixtral", vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    read = ("--windows", "4", "--tokens", "32")
    for task, words in (("cats", "the cat is in paris . "), ("them", "not one of them saw it ? ")):
        text = tmp_path / f"{task}.txt"
        text.write_text(words * 100)
        ran = run("experts", model, library, "--task", task, "--calibration", text, *read)
        assert (ran.code, ran.out) == (0, "")
    plan = tmp_path / "plan.json"
    query = ("--query", "not one of them saw it ? not one", "--keep", "3", "--save-plan", plan)
    ran = run("experts", model, library, *query)
    assert re.fullmatch(r"them: distance 0\.\d+\ncats: distance 0\.\d+\n", ran.out)
    assert "3/8 experts" in run("model", model, "--plan", plan, "--out", out).out
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    said = failed(run("experts", model, library, "--task", "cat", "--save-plan", plan))
    assert "knows no task 'cat'. Did you mean 'cats'?" in said
    assert "one of the two" in failed(run("experts", model, library))


def test_nothing_to_measure_on(run: Run, toy: Any) -> None:
    assert "--text FILE, or --task NAME" in failed(run("model-eval", toy[0]))


# ------------------------------------------------------------------ an ONNX file
@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    pytest.importorskip("onnx")
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.randn(2, 6),),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )
    return path


def test_an_onnx_file_is_pruned_into_another(run: Run, onnx_file: Path, tmp_path: Path) -> None:
    out, page, data = tmp_path / "small.onnx", tmp_path / "page.html", tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).normal(size=(40, 6)), labels=np.arange(40) % 3)
    looked = run("model", onnx_file, "--method", "spa", "--remove", "0.5", "--dry-run")
    assert looked.code == 0
    assert "7 of 16 channels" in looked.out
    assert not out.exists()
    read = ["--calibration", data, "--out", out]
    for options in (
        ["--method", "obspa", "--remove", "0.5", "--html", page],
        ["--method", "spa", "--remove", "0.5", "--set", "criterion=snip", "--overwrite"],
    ):
        ran = run("model", onnx_file, *options, *read)
        assert (ran.code, ran.err) == (0, "")
        assert "parameters: 163 -> 73" in ran.out
    assert json.loads(out.with_suffix(".json").read_text())["parameters"] == [163, 73]
    assert "7" in page.read_text()
    assert out.stat().st_size < onnx_file.stat().st_size


def test_what_an_onnx_file_does_not_take_is_said(run: Run, onnx_file: Path, tmp_path: Path) -> None:
    base = ["model", onnx_file, "--out", tmp_path / "small.onnx"]
    for options, words in (
        (["--method", "wanda"], "Unknown method of ONNX files 'wanda'. Known: obspa, spa."),
        (["--method", "spa", "--sparsity", "0.5"], "Unknown key 'sparsity'."),
        (["--method", "spa", "--windows", "3"], "An ONNX file takes no --windows."),
        (["--plan", "plan.json"], "An ONNX file takes no --plan."),
        (["--method", "spa", "--set", "criterion=grasp"], "give a .npz file with the inputs"),
        (["--method", "obspa", "--calibration", "absent.npz"], "Cannot read 'absent.npz'"),
    ):
        assert words in failed(run(*base, *options))
    assert not (tmp_path / "small.onnx").exists()
