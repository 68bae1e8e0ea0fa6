"""`prunekit data`: what it writes, and what it says of what is wrong, in one line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.cli import app, main
from prune_core.errors import InputError

ROWS = [
    {"prompt": f"What is {i}?", "completion": f"It is {i}.", "kind": "ab"[i % 5 == 0], "s": i}
    for i in range(50)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(50, 6)))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["data", "rows.jsonl", *arguments], catch_exceptions=False)


def kept(folder):
    lines = (folder / "selected.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_it_writes_what_select_gives(place):
    from data_prune import select

    told = run("--metric", "prototypes", "--embeddings", "v.npy", "--budget", "20%", "--out", "o")
    assert told.stdout.strip().endswith(
        "10 of 50 rows kept (20.0 %) by prototypes, budget 20 % of the rows, seed 0"
    )
    here = select(ROWS, embeddings=np.load("v.npy"), budget=0.2)
    assert kept(place / "o") == here.dataset()
    assert {path.name for path in (place / "o").iterdir()} == {
        *("selected.jsonl", "rows.parquet", "selection.json", "report.html", "card.md")
    }


def test_settings_groups_and_workers(place):
    run(
        *("--metric", "imported", "--scores", "s", "--budget", "10", "--out", "o"),
        *("--group-by", "kind", "--min-per-group", "0.4", "--workers", "1"),
    )
    assert sum(row["kind"] == "b" for row in kept(place / "o")) == 4
    run(
        *("--embeddings", "v.npy", "--set", "keep=easy", "--set", "clusters=3"),
        *("--budget", "10", "--out", "p"),
    )
    manifest = json.loads((place / "p" / "selection.json").read_text(encoding="utf-8"))
    assert manifest["metric"] == {
        "name": "prototypes",
        "keep": "easy",
        "clusters": 3,
        "balance": 0.5,
    }


def test_a_log_of_training(place):
    import torch

    from data_prune.training_log import TrainingLog

    log = TrainingLog(50, place / "log")
    log.record(torch.arange(50), torch.randn(50, 3), torch.zeros(50, dtype=torch.long))
    log.end_epoch()
    run("--metric", "aum", "--log", "log", "--budget", "10", "--out", "o")
    assert len(kept(place / "o")) == 10


def test_paser_loads_both_models_and_asks_them(place, monkeypatch):
    from types import SimpleNamespace

    import data_prune.divergence
    import pipelines.language_model

    def load(name):
        return SimpleNamespace(model=f"model {name}", tokenizer=f"tokenizer {name}")

    class Lost:
        def __init__(self, original, pruned, tokenizer):
            assert (original, pruned, tokenizer) == ("model a", "model b", "tokenizer a")

        def __call__(self, prompts, responses):
            return [float(prompt.removeprefix("What is ")[:-1]) for prompt in prompts]

    monkeypatch.setattr(pipelines.language_model.LocalModel, "from_pretrained", load)
    monkeypatch.setattr(data_prune.divergence, "ResponseDivergence", Lost)
    run(
        *("--metric", "paser", "--original", "a", "--pruned", "b", "--set", "clusters=1"),
        *("--embeddings", "v.npy", "--budget", "10", "--out", "o"),
    )
    assert [row["s"] for row in kept(place / "o")] == list(range(40, 50))


def test_notes_are_lines(place):
    (place / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [*ROWS, {"prompt": "", "completion": "x"}])), encoding="utf-8"
    )
    told = run("--metric", "random", "--budget", "10", "--out", "o")
    assert "note: 1 of the rows cannot be scored" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o"], "Give a --budget"),
        (["--budget", "5", "--budget-tokens", "9", "--out", "o"], "one of the two"),
        (["--budget", "5"], "Name the folder to write with --out"),
        (["--budget", "5", "--out", "cache"], "'cache' is there already"),
        (["--budget", "60", "--metric", "random", "--out", "o"], "60 rows, but only 50 of 50"),
        (["--budget", "5", "--metric", "rndom", "--out", "o"], "Did you mean 'random'"),
        (["--budget", "5", "--metric", "kd_data_pruning", "--out", "o"], "is a way to train"),
        (["--budget", "5", "--pruned", "m", "--out", "o"], "--original and --pruned go together"),
        (["--budget", "5", "--set", "k", "--out", "o"], "--set takes NAME=VALUE"),
        (["--budget", "5", "--set", "klusters=3", "--out", "o"], "Unknown key 'klusters'"),
        (["--budget", "5", "--embeddings", "w.npy", "--out", "o"], "Cannot read the array"),
        (["--budget-tokens", "5", "--metric", "random", "--out", "o"], "needs tokenizer="),
    ],
)
def test_what_is_wrong_is_said_in_a_line(place, arguments, message):
    (place / "cache").mkdir()
    (place / "cache" / "x").touch()
    with pytest.raises(InputError, match=message):
        run(*arguments)
    assert not (place / "o").exists()


def test_the_exit_code_is_two(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prunekit", "data", "rows.jsonl", "--out", "o"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("prunekit: Give a --budget")
