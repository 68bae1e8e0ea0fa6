import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prune_core
from prune_core import provenance as module
from prune_core.provenance import provenance


def test_the_record_is_json_and_complete():
    record = provenance(seed=3, dataset="toy", score=np.float32(0.5), ids=np.arange(2))
    assert json.loads(json.dumps(record)) == record
    assert record["prunekit"] == prune_core.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["seed"] == 3
    assert record["extra"] == {"dataset": "toy", "score": 0.5, "ids": [0, 1]}
    assert record["cores"] >= 1
    assert record["memory"] > 2**20
    assert record["cpu"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["time"])


def test_what_json_cannot_hold_becomes_text_and_does_not_raise():
    circular: list = []
    circular.append(circular)
    extra = provenance(thing=Path("a"), loop=circular, key={(1, 2): 3}, python="mine")["extra"]
    assert all(isinstance(value, str) for value in extra.values())
    assert extra["python"] == "mine"  # and does not hide the real one


def test_the_command_line_does_not_tell_where_the_program_lives(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/marie/bin/prunekit", "demo", "--seed=1"])
    assert provenance()["command"] == ["prunekit", "demo", "--seed=1"]
    monkeypatch.setattr(sys, "argv", ["prunekit", "--docs", "/home/marie/docs/", "out/a.json"])
    assert provenance()["command"] == ["prunekit", "--docs", "…/docs", "out/a.json"]
    monkeypatch.setattr(sys, "argv", [])
    assert provenance()["command"] == [""]


def test_home_is_nowhere_in_the_record(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prunekit"])
    text = json.dumps(provenance())
    assert str(Path.home()) + "/" not in text
    assert str(Path(prune_core.__file__).parent) not in text


def test_cpu_flags_come_from_cpuinfo(monkeypatch):
    fields = {"model name": "EPYC", "flags": "fpu avx2 avx512f sse amx_bf16"}
    monkeypatch.setattr(module, "cpuinfo", lambda: fields)
    record = provenance()
    assert (record["cpu"], record["simd"]) == ("EPYC", ["avx2", "avx512f", "amx_bf16"])
    monkeypatch.setattr(module, "cpuinfo", dict)
    assert provenance()["simd"] == []


def test_a_process_without_torch_does_not_import_it():
    code = """if True:
        import sys
        from prune_core import errors, provenance, recipe, registry, results, storage, testing
        gpus = provenance.provenance()["gpus"]
        print(sorted({"torch", "yaml", "transformers", "pandas"} & set(sys.modules)), gpus)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] []"


def fake_torch(available, name):
    def raising(i):
        raise RuntimeError("a broken driver")

    cuda = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 2,
        get_device_name=(lambda i: f"{name} {i}") if name else raising,
    )
    return SimpleNamespace(cuda=cuda)


@pytest.mark.parametrize(
    ("torch", "gpus"),
    [
        (fake_torch(True, "H100"), ["H100 0", "H100 1"]),
        (fake_torch(False, "H100"), []),
        (fake_torch(True, None), []),
        (SimpleNamespace(), []),  # half imported
    ],
)
def test_gpus_are_asked_of_a_torch_that_is_loaded(monkeypatch, torch, gpus):
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert provenance()["gpus"] == gpus


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one commit, and that commit."""

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        pytest.skip("needs git")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    return tmp_path, git("rev-parse", "HEAD")


def test_the_commit_is_of_the_checkout_that_holds_the_package(checkout, monkeypatch):
    top, commit = checkout
    (top / "prune_core").mkdir()
    monkeypatch.setattr(module, "__file__", str(top / "prune_core" / "provenance.py"))
    assert provenance()["git_commit"] == commit
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_commit"] is None


def test_a_package_installed_inside_another_checkout_has_no_commit(checkout, monkeypatch):
    top, _ = checkout
    inside = top / ".venv" / "lib" / "prune_core"
    inside.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(inside / "provenance.py"))
    assert provenance()["git_commit"] is None
