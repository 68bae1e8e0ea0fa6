"""A tiny pruner, built in code, that every test may use; and no way to a model hub."""

import os

# Read when the hub's client is first imported, here and in the subprocesses of tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
# Threads that spin while they wait make tests of tiny models crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import socket
import string

import pytest

from tiny import wordpiece

METHODS = ("provence", "late", "both")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections may go to this machine alone: a test that needs another is a test that breaks."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"A test tried to connect to {address}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def build_checkpoint(folder, *, seed=0, **settings):
    """Save a random two-layer pruner that reads 64 tokens at once; returns its folder."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    from rag_prune.context.checkpoints import Calibration, Settings, save
    from rag_prune.context.model import PrunerModel

    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation, *"。你好日本語é👍"]
    words = ["the", "cat", "radium", "curie", "found", "##ing", "##ed", "##s"]
    tokenizer = wordpiece([*characters, *(f"##{c}" for c in characters), *words])

    torch.manual_seed(seed)
    network = BertForTokenClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.3,
            num_labels=2,
        )
    )
    model = PrunerModel(network)
    model.late.data = torch.tensor([[6.0, 2.0, -4.0], [3.0, 3.0, -3.0]])
    # Random logits lie close together; this spreads the scores over [0, 1].
    spread = {method: Calibration(6.0, -21.0) for method in METHODS}
    save(folder, model, tokenizer, Settings(window=64, calibration=spread, **settings))
    return folder


@pytest.fixture(scope="session")
def make_checkpoint():
    """`build_checkpoint`, for a test that needs a pruner of its own."""
    return build_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The folder of a tiny pruner with random weights, to be read, not written."""
    return build_checkpoint(tmp_path_factory.mktemp("tiny") / "pruner")


@pytest.fixture(scope="session")
def tiny_pruners(tiny_checkpoint):
    """A pruner for each engine of the tiny checkpoint, by method."""
    from rag_prune import ContextPruner

    return {
        method: ContextPruner.from_pretrained(tiny_checkpoint, method=method, device="cpu")
        for method in METHODS
    }


@pytest.fixture(params=METHODS)
def tiny_pruner(request, tiny_pruners):
    """The tiny pruner, once with each of its engines."""
    return tiny_pruners[request.param]
