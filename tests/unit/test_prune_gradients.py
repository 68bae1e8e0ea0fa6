"""Methods that need the whole model: which numbers they compute with, and in which mode."""

import copy

import pytest
import torch

from model_prune import load_method
from model_prune.core.calibration import Calibration
from model_prune.methods.adapt_pruner import cosines
from tiny_decoders import random_windows, roomy_decoder

WINDOWS = random_windows()


@pytest.mark.parametrize("method", ["llm_pruner", "adapt_pruner"])
def test_a_half_precision_model_is_differentiated_in_float32(method, monkeypatch):
    half = roomy_decoder("llama").bfloat16()
    forward, seen = type(half).forward, set()

    def watched(self, *args, **kwargs):
        seen.add(self.dtype)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(half), "forward", watched)
    pruner = load_method(method, remove=0.2)
    found = pruner.plan(half, WINDOWS, progress=False)
    assert seen == {torch.float32}
    assert half.dtype == torch.bfloat16
    whole = pruner.plan(copy.deepcopy(half).float(), WINDOWS, progress=False)
    assert set(found.compare(whole).values()) == {1.0}


def test_layers_are_compared_in_evaluation_and_left_in_their_mode():
    model = roomy_decoder("llama", attention_dropout=0.5)
    expected = cosines(model, Calibration(WINDOWS))
    model.train()
    model.model.layers[1].eval()
    assert (cosines(model, Calibration(WINDOWS)) == expected).all()
    assert [layer.training for layer in model.model.layers] == [True, False, True, True]
