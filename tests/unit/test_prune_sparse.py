"""2:4 matrices for GPUs: what is converted, what is refused. The conversion itself is torch's."""

import pytest
import torch

from kv_oracle import tiny_llama
from model_prune import load_method
from model_prune.sparse import is_2_4, semi_structured
from prune_core.errors import InputError


def test_two_of_four():
    assert is_2_4(torch.tensor([[0, 1, 0, 2.0, 3, 0, 0, 0]]))
    assert not is_2_4(torch.tensor([[0, 1, 0, 2.0, 3, 0, 4, 5]]))  # as many zeros, elsewhere
    assert not is_2_4(torch.zeros(2, 6))


def test_models_elsewhere_are_refused():
    with pytest.raises(InputError, match="the model is on 'cpu' in float32"):
        semi_structured(tiny_llama())


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Parameters that say they are in half precision on a GPU, which takes them as they are."""
    monkeypatch.setattr("model_prune.sparse._is_for_gpus", lambda parameter: True)
    taken = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: taken.append(w) or w)
    return taken


def test_what_is_converted(on_a_gpu):
    model = tiny_llama()
    load_method("magnitude", pattern="2:4", targets=["mlp.*"]).plan(model, progress=False).apply(
        model
    )
    names = semi_structured(model)
    # down's rows are 96 long, which is no multiple of 64.
    assert names == [f"layers.{i}.mlp.{m}" for i in range(3) for m in ("gate_proj", "up_proj")]
    assert len(on_a_gpu) == 6
    with pytest.raises(InputError, match="prune it with pattern='2:4' first"):
        semi_structured(tiny_llama())
