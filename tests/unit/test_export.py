"""What is exported is a stock model: transformers alone reads it and gives the same logits."""

import sys

import pytest
import torch
from transformers import AutoModelForTokenClassification

from prune_core.errors import InputError
from rag_prune.context.checkpoints import load
from rag_prune.context.export import export, main
from rag_prune.context.pruner import checkpoint_folder


def test_the_bundled_pruner_as_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "out")])
    main()
    assert "vllm serve" in capsys.readouterr().out
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    again = load(tmp_path / "out")
    bundled = load(checkpoint_folder(None))
    ids = torch.tensor([[101, 2040, 102, 3449, 102]])
    with torch.inference_mode():
        logits = stock(input_ids=ids).logits
        expected = bundled.model.joint(ids, torch.ones_like(ids))
    assert stock.dtype == torch.float32
    assert stock.config.io_processor_plugin == "prunekit"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert again.settings == bundled.settings


def test_a_folder_is_not_overwritten_unasked(tmp_path, tiny_checkpoint):
    export(tmp_path / "out", tiny_checkpoint)
    with pytest.raises(InputError, match="overwrite=True"):
        export(tmp_path / "out", tiny_checkpoint)
    export(tmp_path / "out", tiny_checkpoint, overwrite=True)
