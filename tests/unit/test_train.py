"""Training on a toy task with a tiny encoder built in code: recipe, losses, resuming, result."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, BertConfig, BertModel

from prune_core.errors import CheckpointError, InputError, UnknownName
from rag_prune import ContextPruner
from rag_prune.context import train as train_module
from rag_prune.context.checkpoints import ENGINES, Settings, load, save
from rag_prune.context.evaluate import build_tasks, score_tasks
from rag_prune.context.model import pad
from rag_prune.context.pruner import DEFAULT_THRESHOLD
from rag_prune.context.train import TrainConfig, draw, rate_share, report, train
from rag_prune.context.train_losses import Verdict, agreement_loss
from rag_prune.context.train_rows import Piece, hard_negatives, labelled_rows, read_rows
from tiny import toy_rows, toy_tokenizer, write_rows


def build_encoder(folder: Path, hidden: int = 32) -> str:
    of_words = toy_tokenizer()
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(
            vocab_size=len(of_words),
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=160,
            initializer_range=0.2,
        )
    )
    encoder.save_pretrained(folder)
    of_words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_encoder(tmp_path_factory.mktemp("base") / "encoder")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", toy_rows(40))


# ------------------------------------------------------------------------------------------ recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps, late_every and save_every must be at least 1"),
        ({"questions": 1}, "questions at least 2"),
        ({"late_share": 1.5}, "late_share is a share between 0 and 1, got 1.5"),
        ({"hard_rate": -0.1}, "hard_rate is a share between 0 and 1, got -0.1"),
        ({"agreement": -1.0}, "agreement is a weight of at least 0, got -1.0"),
        ({"max_tokens": 100}, "max_tokens must be at least 128, got 100"),
    ],
)
def test_a_recipe_that_cannot_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(**change)


def test_the_learning_rate_rises_and_falls_in_each_stage() -> None:
    config = TrainConfig(steps=100, late_share=0.3, warmup=0.1)
    shares = [rate_share(config, step) for step in range(100)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[29] == pytest.approx(1 / 27)
    assert shares[30:37] == pytest.approx([i / 7 for i in range(1, 8)])
    assert shares[99] == pytest.approx(1 / 63)
    assert all(0 < share <= 1 for share in shares)
    for late_share in (0, 1):  # one stage alone
        config = TrainConfig(steps=10, late_share=late_share)
        assert all(0 < rate_share(config, step) <= 1 for step in range(10))


def test_a_step_is_drawn_from_seed_and_number_alone(train_file: Path) -> None:
    rows = [
        replace(row, weight=0.0 if i < 10 else 1.0)
        for i, row in enumerate(read_rows(train_file, toy_tokenizer()))
    ]
    negatives = hard_negatives(rows)
    config = TrainConfig(questions=16, max_tokens=128)

    def drawn(config: TrainConfig, step: int) -> list[list[int]]:
        own, hard = draw(rows, negatives, config, step)
        assert len(own) == len(hard) == 16
        assert len({id(p.row) for p in own}) == 16
        assert not any(p.row.weight == 0 for p in own)
        return [p.ids for p in own + hard]

    assert drawn(config, 5) == drawn(config, 5)
    assert drawn(config, 5) != drawn(config, 6)
    assert drawn(config, 5) != drawn(replace(config, seed=1), 5)


# ---------------------------------------------------------------------------------------- training


TOY = TrainConfig(
    steps=60,
    questions=8,
    late_share=0.5,
    late_every=2,
    learning_rate=1e-3,
    max_tokens=128,
    hard_rate=1.0,
    save_every=20,
)


@pytest.fixture(scope="module")
def trained(base: str, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, calibrated."""
    folder = tmp_path_factory.mktemp("trained")
    dev = write_rows(folder / "dev.jsonl", toy_rows(30, seed=7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "LOG_EVERY", 10)
        model = train(TOY, train_file, base, folder / "run", dev_file=dev)
    assert model == folder / "run" / "model"
    return folder


def test_the_losses_fall(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [10, 20, 30, 40, 50, 60]
    late, joint = ([r[name] for r in log if name in r] for name in ("late", "joint"))
    assert (len(late), len(joint)) == (6, 3)
    assert [record["step"] for record in log if "agreement" in record] == [40, 50, 60]
    assert late[2] < 0.2 * late[0]
    assert joint[2] < 0.8 * joint[0]


def test_what_a_run_leaves(trained: Path) -> None:
    run = trained / "run"
    assert {path.name for path in run.iterdir()} == {
        "late-model",
        "log.jsonl",
        "model",
        "run.json",
        "training.safetensors",
    }
    provenance = json.loads((run / "run.json").read_text())
    assert provenance["extra"]["config"]["learning_rate"] == TOY.learning_rate
    assert provenance["extra"]["dev"].keys() == set(ENGINES)
    shown = report(run).splitlines()
    assert [line.split()[0] for line in shown] == list(ENGINES)
    assert f"MRR {provenance['extra']['dev']['both']['mrr']:.3f}" in shown[2]
    assert load(run / "late-model").settings.method == "late"
    assert load(run / "model").settings.method == "both"


def test_the_trained_pruner_prunes(trained: Path) -> None:
    pruner = ContextPruner.from_pretrained(trained / "run" / "model", device="cpu")
    tasks = build_tasks(toy_rows(40), distractors="bm25")
    scored = score_tasks(pruner, tasks)
    chance = score_tasks(ContextPruner.from_pretrained(method="random"), tasks)
    assert scored.mrr > 0.9 > chance.mrr + 0.3
    at, by_chance = scored.threshold_at(0.9), chance.threshold_at(0.9)
    assert scored.compression(at) > 0.8 > chance.compression(by_chance) + 0.3


def test_dev_rows_give_the_default_threshold_its_meaning(trained: Path) -> None:
    rows = labelled_rows(trained / "dev.jsonl")
    tasks = [*build_tasks(rows, distractors="random"), *build_tasks(rows, distractors="bm25")]
    for method in ENGINES:
        pruner = ContextPruner.from_pretrained(
            trained / "run" / "model", method=method, device="cpu"
        )
        calibration = pruner.scorer.checkpoint.settings.calibration[method]  # type: ignore[attr-defined]
        assert calibration.scale > 0
        scored = score_tasks(pruner, tasks)
        assert scored.recall(DEFAULT_THRESHOLD) >= 0.96
        assert scored.recall(DEFAULT_THRESHOLD + 0.02) < 1  # and not by keeping everything


def test_training_goes_on_from_a_pruner(trained: Path, train_file: Path, tmp_path: Path) -> None:
    before = load(trained / "run" / "model")
    still = replace(TOY, steps=1, late_share=0.0, learning_rate=1e-12)
    train(still, train_file, str(trained / "run" / "model"), tmp_path / "still")
    after = load(tmp_path / "still" / "model")
    for (name, old), new in zip(
        before.model.state_dict().items(), after.model.state_dict().values(), strict=True
    ):
        assert torch.allclose(old, new, atol=1e-6), name


def test_the_engines_learn_from_their_mean() -> None:
    pieces = [
        Piece(None, [], [5, 6, 7], np.array([0, 0, 1]), np.array([1, 0])),  # type: ignore[arg-type]
        Piece(None, [], [5], np.array([0]), np.array([0])),  # type: ignore[arg-type]
    ]
    logits = [torch.randn(2, 2, requires_grad=True) for _ in range(2)]
    relevance = [torch.randn(2, requires_grad=True) for _ in range(2)]
    a, b = (Verdict(k, r) for k, r in zip(logits, relevance, strict=True))
    agreement_loss(a, b, pieces[:1], pieces[1:]).backward()
    mean = (a.keep + b.keep) / 2
    for verdict in (a, b):
        # Downhill is towards the mean, for what was read; padding teaches nothing.
        assert verdict.keep.grad is not None
        towards = (verdict.keep.sigmoid() - mean.sigmoid()) / 3
        towards[1, 1] = 0
        assert torch.allclose(verdict.keep.grad, towards.detach(), atol=1e-6)
        assert verdict.relevance.grad is not None
        gap = verdict.margin - (a.margin + b.margin) / 2
        assert torch.allclose(
            verdict.relevance.grad, 0.2 * gap.detach() * torch.tensor([1.0, -1.0])
        )


def stopped_after(patch: pytest.MonkeyPatch, calls: int) -> None:
    """Make the training fail as a kill would, after so many losses."""
    count = 0
    for name in ("late_loss", "joint_loss"):
        original = getattr(train_module, name)

        def loss(*args: Any, original: Any = original) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(train_module, name, loss)


SHORT = replace(TOY, steps=12, save_every=4)


def test_a_stopped_run_goes_on_to_the_same_weights(
    base: str, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LOG_EVERY", 2)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(SHORT, train_file, base, straight)

    # After step 7: late-model was written at 6, the checkpoint at 4.
    with monkeypatch.context() as patch:
        stopped_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(SHORT, train_file, base, stopped)
    left = {path.name for path in stopped.iterdir()}
    assert left == {"training.safetensors", "log.jsonl", "late-model"}

    train(SHORT, train_file, base, stopped)
    for name in ("training.safetensors", "model/model.safetensors", "late-model/model.safetensors"):
        expected, got = load_file(straight / name), load_file(stopped / name)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(value, got[key]), key
    for run in (straight, stopped):
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == [2, 4, 6, 8, 10, 12]
        assert sorted(log, key=lambda record: record["seconds"]) == log

    # A finished run only writes its pruner again, without reading its rows.
    again = train(SHORT, tmp_path / "gone.jsonl", base, stopped, method="provence", int8=True)
    assert load(again).settings.method == "provence"
    assert torch.equal(
        load_file(stopped / "training.safetensors")["model.late"],
        load_file(straight / "training.safetensors")["model.late"],
    )


def test_a_run_with_other_settings_is_refused(
    base: str, train_file: Path, tmp_path: Path, trained: Path
) -> None:
    run = trained / "run"
    before = (run / "training.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run with other settings"):
        train(replace(TOY, seed=1), train_file, base, run)
    with pytest.raises(CheckpointError, match="began from another encoder"):
        train(TOY, train_file, build_encoder(tmp_path / "other", hidden=16), run)
    assert (run / "training.safetensors").read_bytes() == before

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.safetensors").write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match=r"is damaged .*: delete it to start the run again"):
        train(TOY, train_file, base, tmp_path / "run")


def test_what_is_wrong_is_said_before_the_training(
    base: str, train_file: Path, tmp_path: Path
) -> None:
    bad_dev = write_rows(tmp_path / "dev.jsonl", [{"question": "Q"}])
    with pytest.raises(InputError, match=r"dev\.jsonl', line 1 .* has no 'passage'"):
        train(SHORT, train_file, base, tmp_path / "run", dev_file=bad_dev)
    with pytest.raises(CheckpointError, match="Cannot start from 'no/such'"):
        train(SHORT, train_file, "no/such", tmp_path / "run")
    with pytest.raises(UnknownName, match="Did you mean 'late'"):
        train(SHORT, train_file, base, tmp_path / "run", method="lat")  # type: ignore[arg-type]
    few = write_rows(
        tmp_path / "few.jsonl", toy_rows(7) + [{**r, "weight": 0} for r in toy_rows(9)]
    )
    with pytest.raises(InputError, match="draws 8 questions, and only 7 rows have a weight"):
        train(SHORT, few, base, tmp_path / "run")
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_a_loss_that_is_no_number_stops_the_run(
    base: str, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "late_loss", lambda *_: (torch.tensor(math.nan), None))
    with pytest.raises(InputError, match="The loss is nan at step 1: try a lower learning_rate"):
        train(SHORT, train_file, base, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_the_command_line(
    base: str,
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> int:
        files = ("--train", str(train_file), "--base", base, "--out", str(tmp_path / "run"))
        small = ("--steps", "2", "--questions", "4", "--max-tokens", "128")
        monkeypatch.setattr(sys, "argv", ["train", *files, *small, *arguments])
        try:
            train_module.main()
        except SystemExit as exit:
            return int(exit.code or 0)
        return 0

    assert run("--method", "late", "--int8") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == str(tmp_path / "run" / "model")
    assert "training: 100%" in shown.err
    assert load(tmp_path / "run" / "model").settings.method == "late"

    assert run("--seed", "3") == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after what transformers has to say
    assert said.startswith("python -m rag_prune.context.train: '")
    assert "other settings" in said

    def interrupted(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train", interrupted)
    assert run() == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_int8_moves_scores_little(trained: Path, tmp_path: Path) -> None:
    exact = load(trained / "run" / "model")
    settings = Settings(exact.settings.window)  # the toy's calibration is nearly a step
    for name, int8 in (("exact", False), ("int8", True)):
        save(tmp_path / name, exact.model, exact.tokenizer, settings, int8=int8)
    tasks = build_tasks(toy_rows(20), distractors="random")
    for method in ENGINES:
        scores = [
            score_tasks(ContextPruner.from_pretrained(folder, method=method, device="cpu"), tasks)
            for folder in (tmp_path / "exact", tmp_path / "int8")
        ]
        moved = np.abs(scores[0].score - scores[1].score)
        assert moved.max() < 0.05
        assert moved.mean() < 0.01


def test_the_folder_is_a_stock_token_classifier(trained: Path) -> None:
    folder = trained / "run" / "model"
    ours = load(folder)
    stock = AutoModelForTokenClassification.from_pretrained(folder, use_safetensors=True).eval()
    assert stock.config.id2label == {0: "keep", 1: "relevance"}
    text = ["Where is the cat now?", "The cat was in rome long ago."]
    rows = [ours.tokenizer(t)["input_ids"] for t in text]
    ids, mask = pad(rows, ours.tokenizer.pad_token_id)
    with torch.inference_mode():
        assert torch.equal(
            stock(input_ids=ids, attention_mask=mask).logits, ours.model.joint(ids, mask)
        )
