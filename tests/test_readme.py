"""Every code block of the README, run: the Python ones in order, each command as its table says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_prune.kv import KVPruneConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of its first line of code, from 1


BLOCKS = [
    Block(found[1], found[2], README[: found.start(2)].count("\n") + 1)
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", README, re.MULTILINE)
]


def commands() -> list[str]:
    """The command lines of the shell blocks; in a console block those after a prompt."""
    lines = []
    for block in BLOCKS:
        code = block.code.replace("\\\n", " ")
        if block.language == "console":
            lines += [line[2:] for line in code.splitlines() if line.startswith("$ ")]
        elif block.language == "bash":
            lines += code.splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert README.count("\n```") == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"python", "bash", "console"}


def test_the_first_runnable_line_stands_before_line_40() -> None:
    assert BLOCKS[0].line < 40


def test_the_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    blocks = [block for block in BLOCKS if block.language == "python"]
    assert blocks
    for block in blocks:
        code = "\n" * (block.line - 1) + block.code  # so that an error names the README's line
        exec(compile(code, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        for claim in re.findall(r"^print\(.*\)\s+# (.*)$", block.code, re.MULTILINE):
            # A comment that repeats a text of the block says what is printed.
            if block.code.count(claim) > 1:
                assert claim in printed


# ----------------------------------------------------------------------------------- commands


class Reader(BaseHTTPRequestHandler):
    """An OpenAI-compatible server, in place of the language model."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = {
            "choices": [{"message": {"content": "It closes the file."}}],
            "usage": {"prompt_tokens": 30, "completion_tokens": 5},
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass(frozen=True)
class Place:
    """A folder to run commands in, with `prunekit` on the path and a server that answers."""

    folder: Path
    url: str

    def run(self, line: str) -> str:
        """Run a line as a shell does, and return what it wrote."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
        assert "Traceback" not in ran.stderr
        return ran.stdout


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "prunekit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines.cli "$@"\n')
    command.chmod(0o755)
    with HTTPServer(("127.0.0.1", 0), Reader) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Place(tmp_path, f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()
        thread.join()


PASSAGES = [
    "Marie Curie was born in Warsaw. With Pierre Curie she discovered radium in 1898.",
    {"title": "Paris", "text": "Paris is the capital of France."},
]
DOCUMENT = """# The with statement

The with statement runs a block under the control of a context manager. When the block ends, the
with statement closes the file, also after an error. Python has had it since 2005.
"""


def check_make(line: str, place: Place) -> None:
    """Its targets are there."""
    _, *targets = shlex.split(line, comments=True)
    ran = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def check_install(line: str, place: Place) -> None:
    """What it installs is this project, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _, _, *packages = shlex.split(line, comments=True)
    for package in packages:
        name, extras = re.fullmatch(r"([^[]+)(?:\[(.*)\])?", package).groups()  # type: ignore[union-attr]
        assert name in (".", project["name"])
        assert set(filter(None, (extras or "").split(","))) <= set(project["optional-dependencies"])


def check_context(line: str, place: Place) -> None:
    """It writes JSON lines, and the files that it names."""
    words = shlex.split(line, comments=True)
    with_question = "--question" in words
    request = {"question": "Who discovered radium?", "passages": PASSAGES}
    rows = PASSAGES if with_question else [request]
    source = words[words.index("<") + 1] if "<" in words else words[2]
    (place.folder / source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = place.run(line)
    files = {option: words[words.index(option) + 1] for option in words if option in OUTPUTS}
    if "--out" in files:
        assert out == ""
        out = (place.folder / files["--out"]).read_text(encoding="utf-8")
    results = [json.loads(row) for row in out.splitlines()]
    assert results
    if with_question:
        assert results[0]["text"].strip() in PASSAGES[0]
    else:
        assert results[0]["passages"][0]["kept"]
    if "--html" in files:
        assert "<html" in (place.folder / files["--html"]).read_text(encoding="utf-8")


OUTPUTS = ("--out", "--html")


def check_options(line: str, place: Place) -> None:
    """The command and its options are there; what they do is tested where it is fast to do."""
    words = shlex.split(line, comments=True)
    options = [word for word in words if word.startswith("--")]
    command = list(takewhile(re.compile("[a-z][a-z-]*").fullmatch, words))
    shown = place.run(shlex.join([*command, "--help"]))
    assert all(re.search(rf"{option}\b", shown) for option in options)


def check_ask(line: str, place: Place) -> None:
    """It answers from documents; a server stands in for the language model."""
    words = shlex.split(line, comments=True)
    docs = place.folder / words[words.index("--docs") + 1]
    docs.mkdir()
    (docs / "statements.md").write_text(DOCUMENT, encoding="utf-8")
    command = shlex.join(words)
    if "--endpoint" in words:
        command = re.sub(r"(--endpoint) \S+", rf"\1 {place.url}", command)
    else:
        command += f" --endpoint {place.url} --llm reader"
    answer, *read = place.run(command).splitlines()
    assert answer == "It closes the file."
    assert any("[statements.md]" in sentence for sentence in read)


def check_serving(line: str, place: Place) -> None:
    """What it tells vLLM is a configuration of ours; tests/serve starts servers."""
    words = shlex.split(line, comments=True)
    given = json.loads(words[words.index("--additional-config") + 1])["prunekit_kv"]
    config = KVPruneConfig.parse({"policy": "static", **given})
    assert config.method == "think"


def check_pruned_model(line: str, place: Place) -> None:
    """vLLM finds the plugin by itself, as the project says; tests/serve starts engines."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugins = project["entry-points"]["vllm.general_plugins"]
    assert plugins["prunekit_models"] == "model_prune.vllm_plugin:register"


def check_data(line: str, place: Place) -> None:
    """It says what it would cost, or writes the rows and a page; the encoder is left out."""
    words = shlex.split(line, comments=True)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(20)]
    (place.folder / words[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    array = place.folder / "vectors.npy"
    np.save(array, np.random.default_rng(0).normal(size=(20, 4)))
    out = place.run(shlex.join([*words, "--embeddings", str(array)]))
    if "--out" in words:
        folder = place.folder / words[words.index("--out") + 1]
        assert len((folder / "selected.jsonl").read_text().splitlines()) == 4
        assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
        assert "4 of 20 rows kept" in out
    else:
        assert "20 can be scored, 4 stay" in out


def check_methods(line: str, place: Place) -> None:
    """It lists them."""
    assert "provence" in place.run(line)


CHECKS: dict[str, Callable[[str, Place], None]] = {
    r"make( [a-z-]+)*": check_make,
    r"pip install( \S+)+": check_install,
    r"prunekit context (train|label) .*": check_options,
    r"prunekit context .*": check_context,
    r"prunekit serve-context.*": check_options,
    r"prunekit rag ask .*": check_ask,
    r"prunekit kv (plan|calibrate) .*": check_options,
    r"prunekit model(-eval)? .*": check_options,
    r"prunekit data .*": check_data,
    r"vllm serve \w+": check_pruned_model,
    r"vllm serve .*": check_serving,
    r"prunekit methods( --json)?": check_methods,
}


@pytest.mark.parametrize("line", commands())
def test_every_command_line_does_what_it_says(line: str, place: Place) -> None:
    command = " ".join(shlex.split(line, comments=True))
    checks = [check for pattern, check in CHECKS.items() if re.fullmatch(pattern, command)]
    assert checks, f"No check is known for `{command}`: add one to CHECKS."
    checks[0](line, place)
