"""The page and the examples on other frameworks, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))


@pytest.mark.parametrize("stack", ["LangChain", "LlamaIndex", "Haystack"])
def test_the_snippet_of_the_page_runs_and_prints_what_it_says(stack, capsys):
    [code] = re.findall(r"^```python\n(.*?)^```$", SECTIONS[stack], re.MULTILINE | re.DOTALL)
    exec(compile(code, f"docs/stacks.md, {stack}", "exec"), {"__name__": "snippet"})
    claims = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert claims == ["With Pierre Curie she discovered radium in 1898."]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].rstrip() == claims[0]
    assert printed[1].endswith("[[32, 81]]")


def run_example(name, *arguments):
    script = ROOT / "examples" / f"{name}_rag.py"
    assert len(script.read_text().splitlines()) <= 40
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**environment, "HAYSTACK_TELEMETRY_ENABLED": os.environ["HAYSTACK_TELEMETRY_ENABLED"]},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # as costly as the next one, and hardly different
@pytest.mark.parametrize("name", ["langchain", "llama_index", "haystack"])
def test_an_example_takes_a_checkpoint(name, tiny_checkpoint):
    assert "Who found radium?" in run_example(name, tiny_checkpoint)


@pytest.mark.parametrize("name", ["langchain", "llama_index", "haystack"])
def test_an_example_finds_the_answer(name):
    printed = run_example(name)
    assert "In 1898 she found radium together with Pierre Curie." in printed
    assert "Bananas" not in printed
