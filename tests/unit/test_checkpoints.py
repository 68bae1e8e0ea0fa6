"""Checkpoints: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prune_core.errors import CheckpointError, InputError, UnknownName
from rag_prune import ContextPruner
from rag_prune.context.checkpoints import load, save
from rag_prune.context.result import Passage, Request
from tiny import PASSAGES, QUESTION


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, sentence, **options):
    with pytest.raises(CheckpointError, match=sentence) as error:
        ContextPruner.from_pretrained(folder, **options)
    assert str(folder) in str(error.value)


def test_save_and_load_give_the_same_scores(tiny_checkpoint, tiny_pruner):
    again = ContextPruner.from_pretrained(str(tiny_checkpoint), method=tiny_pruner.scorer.name)
    first, second = (p.prune(QUESTION, PASSAGES).to_dict() for p in (tiny_pruner, again))
    assert first == second


def test_the_checkpoint_names_its_method(checkpoint):
    assert ContextPruner.from_pretrained(checkpoint).scorer.name == "provence"
    edit_config(checkpoint, lambda c: c["prunekit"].update(method="late"))
    assert ContextPruner.from_pretrained(checkpoint).scorer.name == "late"


def test_int8_rows_cost_little(tiny_pruners, tmp_path):
    from rag_prune.context.checkpoints import save

    whole = tiny_pruners["provence"]
    loaded = whole.scorer.checkpoint
    save(tmp_path / "small", loaded.model, loaded.tokenizer, loaded.settings, int8=True)
    small = ContextPruner.from_pretrained(tmp_path / "small")
    request = Request(QUESTION, tuple(Passage.read(p, i) for i, p in enumerate(PASSAGES)))
    for a, b in zip(*(p.scorer.logits([request])[0] for p in (whole, small)), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=0.1)
    size = sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))
    state = loaded.model.classifier.state_dict().values()
    assert size < 0.5 * sum(v.numel() * 4 for v in state)


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "There is no folder")


def test_a_name_that_neither_folder_nor_hub_has():
    refused("nobody/nothing", "neither a folder here nor a model that could be fetched")


def test_a_folder_without_a_config(tmp_path):
    refused(tmp_path, "is not a checkpoint: it has no config.json")


def test_a_folder_with_only_a_pickle(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, r"must hold its weights as \*.safetensors; found none")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(checkpoint, "found only pytorch_model.bin, which can run code when read")


def test_a_config_that_asks_for_remote_code(checkpoint):
    edit_config(checkpoint, lambda c: c.update(auto_map={"AutoModel": "modeling_x.X"}))
    (checkpoint / "modeling_x.py").write_text("raise SystemExit('remote code was run')")
    refused(checkpoint, r"asks for remote code \(auto_map\), which prunekit never runs")


def test_a_tokenizer_that_asks_for_remote_code_is_not_run(checkpoint):
    file = checkpoint / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    config["tokenizer_class"] = "X"
    file.write_text(json.dumps(config))
    (checkpoint / "tokenization_x.py").write_text("raise SystemExit('remote code was run')")
    assert ContextPruner.from_pretrained(checkpoint).prune(QUESTION, PASSAGES).passages


@pytest.mark.parametrize("content", ["{", "\udcff", "[]", '{"prunekit": 3}'])
def test_a_config_that_is_no_json_object(checkpoint, content):
    (checkpoint / "config.json").write_text(content, errors="surrogateescape")
    refused(checkpoint, "is not valid JSON|must be JSON objects")


def test_a_config_of_another_library(checkpoint):
    edit_config(checkpoint, lambda c: c.pop("prunekit"))
    refused(checkpoint, "has no 'prunekit' section, so .* is not a prunekit pruner")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("late"), "'late'"),
        (lambda s: s.update(late="x"), "cannot be read"),
        (lambda s: s.update(windows=3), "Did you mean 'window'"),
        (lambda s: s.update(window=8), "window must be at least 16 tokens, got 8"),
        (lambda s: s["calibration"].pop("late"), "calibration must have provence, late, both"),
        (lambda s: s.update(method="bm25"), "method"),
    ],
)
def test_a_damaged_prunekit_section(checkpoint, change, sentence):
    edit_config(checkpoint, lambda c: change(c["prunekit"]))
    refused(checkpoint, f"The 'prunekit' section of .* cannot be read .*{sentence}|{sentence}")


def test_weights_that_do_not_fit(checkpoint):
    edit_config(checkpoint, lambda c: c.update(intermediate_size=48))
    refused(checkpoint, r"The weights in .* do not fit its config.json: (.|\n)*size mismatch")


@pytest.mark.parametrize("late", [[1.0, 2.0, 3.0], [[1.0, 2.0]]])
def test_late_weights_that_do_not_fit(checkpoint, late):
    edit_config(checkpoint, lambda c: c["prunekit"].update(late=late))
    refused(
        checkpoint, r"The weights in .* do not fit its config.json: (.|\n)*size mismatch for late"
    )


def test_a_truncated_weights_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(checkpoint, "The weights in .* do not fit")


def test_another_splitter_version(checkpoint):
    edit_config(checkpoint, lambda c: c["prunekit"].update(splitter="nltk-3"))
    refused(checkpoint, "trained with the sentence splitter 'nltk-3', .* Train it again")


def test_an_unknown_method(tiny_checkpoint):
    with pytest.raises(UnknownName, match=r"Unknown .* 'provance'\. Did you mean 'prov"):
        ContextPruner.from_pretrained(tiny_checkpoint, method="provance")


def test_a_model_for_a_baseline_that_has_none(tiny_checkpoint):
    with pytest.raises(InputError, match=r"The baseline 'bm25' has no model, so '.*' must go"):
        ContextPruner.from_pretrained(tiny_checkpoint, method="bm25")


def test_int8_rows_are_within_half_a_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exact = load(tiny_checkpoint)
    save(tmp_path / "int8", exact.model, exact.tokenizer, exact.settings, int8=True)
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    rounded = load(tmp_path / "int8").model.classifier.state_dict()
    checked = 0
    for name, value in exact.model.classifier.state_dict().items():
        if (scale := stored.get(f"{name}.scale")) is None:
            assert torch.equal(value, rounded[name])
            continue
        checked += 1
        assert stored[name].dtype == torch.int8
        assert scale.shape == value.shape[:1]
        off = (value - rounded[name]).abs().amax(1)
        assert (off <= scale / 2 * (1 + 1e-5)).all()
        assert torch.equal(value.abs().amax(1).round(decimals=4), (scale * 127).round(decimals=4))
    assert checked > 10
    full, small = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (tiny_checkpoint, tmp_path / "int8")
    )
    assert small < 0.5 * full


def test_a_matrix_of_zeros_survives_int8(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint)
    with torch.no_grad():
        next(checkpoint.model.classifier.bert.encoder.layer.parameters()).zero_()
    save(tmp_path / "int8", checkpoint.model, checkpoint.tokenizer, checkpoint.settings, int8=True)
    again = load(tmp_path / "int8")
    assert not next(again.model.classifier.bert.encoder.layer.parameters()).any()


def test_a_folder_in_use_is_not_replaced_unless_asked(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load(tiny_checkpoint)
    parts = (checkpoint.model, checkpoint.tokenizer, checkpoint.settings)
    folder = tmp_path / "pruner"
    save(folder, *parts)
    with pytest.raises(InputError, match="must be new or empty"):
        save(folder, *parts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rag_prune.context.checkpoints.save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save(folder, *parts, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
