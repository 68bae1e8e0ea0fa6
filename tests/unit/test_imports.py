"""Importing the packages is light, and the public names are there."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rag_prune import METHODS

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "transformers",
    "sklearn",
    "scipy",
    "vllm",
    "langchain_core",
    "jinja2",
    "starlette",
)


def test_importing_the_packages_is_light_and_fast():
    names = ["prune_core", "rag_prune", "data_prune", "model_prune"]
    packages = [name for name in names if (ROOT / name / "__init__.py").is_file()]
    assert packages[:2] == names[:2]
    code = (
        f"import sys, time; started = time.process_time(); import {', '.join(packages)}; "
        "print(time.process_time() - started); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, modules = done.stdout.splitlines()
    assert not set(HEAVY) & set(modules.split())
    assert float(seconds) < 0.3


@pytest.mark.parametrize("package", ["rag_prune", "data_prune", "model_prune"])
def test_the_public_names_are_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert dir(module) == sorted(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Pruner'"):
        _ = module.Pruner


def test_the_methods_of_the_first_issue_are_there():
    assert {"provence", "late", "bm25", "lead", "random", "keep_all"} <= set(METHODS.names)
