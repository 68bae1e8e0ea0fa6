"""The `late` engine: vectors of passages, kept by hash, saved and read again."""

import numpy as np
import pytest

from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.result import Passage, Request
from tiny import PASSAGES, QUESTION


@pytest.fixture
def late(tiny_checkpoint):
    """A late pruner of its own, without vectors, whose encoder's rows are counted."""
    pruner = ContextPruner.from_pretrained(tiny_checkpoint, method="late", device="cpu")
    run, pruner.rows = pruner.scorer.run, []

    def counted(forward, rows):
        pruner.rows.extend(rows)
        return run(forward, rows)

    pruner.scorer.run = counted
    return pruner


def test_indexed_passages_are_not_read_again(late):
    passages = [*PASSAGES, "Radium. " * 40]
    late.scorer.index(passages)
    assert len(late.rows) > len(passages)  # the last one needs several windows
    late.rows.clear()
    late.prune(QUESTION, passages)
    late.prune_many([("cat?", passages), ("city?", passages[:2])])
    assert len(late.rows) == 3  # the questions
    late.prune(QUESTION, [PASSAGES[1]["text"]])  # without its title it is another passage
    assert len(late.rows) == 5


def test_passages_that_are_not_indexed_are_forgotten_in_the_order_of_their_last_use(
    late, monkeypatch
):
    late.scorer.index([PASSAGES[0]])
    monkeypatch.setattr("rag_prune.context.late.RECENT_BYTES", 2 * (1 + 1) * 32 * 8)  # two of one
    first, second, third = "Radium glows.", "It is old.", "Paris is far."
    for passage in (PASSAGES[0], first, second, first, third):
        late.prune(QUESTION, [passage])
    late.rows.clear()
    late.prune(QUESTION, [PASSAGES[0], first, third])
    assert len(late.rows) == 1  # the question
    late.prune(QUESTION, [second])
    assert len(late.rows) == 3
    late.prune(QUESTION, ["One. Two. Three. Four. Five. Six."])  # more than there is room for
    assert not late.scorer._recent


def test_a_saved_index_gives_the_same_scores_without_a_second_pass(late, tiny_pruners, tmp_path):
    late.scorer.index([*PASSAGES, "", " "])
    late.scorer.save_index(tmp_path / "sub" / "corpus.safetensors")
    late.scorer._indexed.clear()
    late.rows.clear()
    late.scorer.load_index(tmp_path / "sub" / "corpus.safetensors")
    stored = late.scorer.score([_request([*PASSAGES, "", " "])])[0]
    assert len(late.rows) == 1
    fresh = tiny_pruners["late"].scorer.score([_request([*PASSAGES, "", " "])])[0]
    for a, b in zip(stored, fresh, strict=True):
        # Half precision moves a cosine by less than 1e-3, and this model's scores by 30 times that.
        np.testing.assert_allclose(a.sentences, b.sentences, atol=0.03)
        assert a.relevance == pytest.approx(b.relevance, abs=0.005)


def _request(passages):
    return Request(QUESTION, tuple(Passage.read(p, i) for i, p in enumerate(passages)))


def test_vectors_of_other_weights_are_not_used(late, make_checkpoint, tmp_path):
    other = ContextPruner.from_pretrained(make_checkpoint(tmp_path / "x", seed=1), method="late")
    other.scorer.index(PASSAGES)
    other.scorer.save_index(tmp_path / "other.safetensors")
    late.scorer.load_index(tmp_path / "other.safetensors")
    late.prune(QUESTION, PASSAGES)
    assert len(late.rows) == 1 + len(PASSAGES)


def test_an_index_that_cannot_be_read(late, tmp_path):
    file = tmp_path / "index.safetensors"
    with pytest.raises(
        InputError, match=r"Cannot read the vector index .*Make one with save_index"
    ):
        late.scorer.load_index(file)
    file.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="Cannot read the vector index"):
        late.scorer.load_index(file)
