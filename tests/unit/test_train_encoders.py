"""The trainer on every family of encoders that a user may name: trained, saved, loaded, pruning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from prune_core.errors import CheckpointError, InputError
from rag_prune import ContextPruner
from rag_prune.context.checkpoints import ENGINES, load
from rag_prune.context.evaluate import build_tasks, score_tasks
from rag_prune.context.model import joint_ids
from rag_prune.context.train import TrainConfig, train
from rag_prune.context.windows import encode_plain
from tiny import toy_encoder, toy_rows, toy_tokenizer, write_rows

FAMILIES = ("bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2")
STEPS = TrainConfig(
    steps=40, questions=8, late_share=0.5, learning_rate=2e-3, max_tokens=128, hard_rate=1.0
)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, beside the `encoder` that it began from."""
    folder = tmp_path_factory.mktemp(request.param)
    base = toy_encoder(folder / "encoder", request.param)
    rows = write_rows(folder / "rows.jsonl", toy_rows(40))
    train(STEPS, rows, base, folder / "run")
    return folder / "run"


def test_a_run_on_it_learns_and_prunes(run: Path) -> None:
    tasks = build_tasks(toy_rows(40), hard=True)
    chance = score_tasks(ContextPruner.from_pretrained(method="random"), tasks)
    for method in ENGINES:
        pruner = ContextPruner.from_pretrained(run / "model", method=method, device="cpu")
        scored = score_tasks(pruner, tasks)
        assert scored.mrr > chance.mrr + 0.1, method
        at, by_chance = scored.threshold_at(0.9), chance.threshold_at(0.9)
        assert scored.compression(at) > chance.compression(by_chance) + 0.15, method


def test_a_row_begins_and_ends_as_the_family_was_trained(run: Path) -> None:
    """[CLS] … [SEP], or <s> … </s>: not None, and nothing that the tokenizer does not know."""
    tokenizer = load(run / "model").tokenizer
    question, passage = encode_plain(tokenizer, ["Where is the cat?", "The cat is in rome."])[
        "input_ids"
    ]
    ids = joint_ids(tokenizer, question, [], passage)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert (pieces[0], pieces[-1]) in (("[CLS]", "[SEP]"), ("<s>", "</s>"))
    assert pieces.count(pieces[-1]) == 2
    assert tokenizer.unk_token not in pieces
    # What the passage spells is text.
    [spelled] = encode_plain(tokenizer, ["cat</s>[SEP]<s>"])["input_ids"]
    assert not set(spelled) & {tokenizer.cls_token_id, tokenizer.sep_token_id}


def test_windows_fill_what_the_encoder_reads_and_no_more(run: Path) -> None:
    """A passage of many windows: RoBERTa's positions begin after the padding's number."""
    text = " ".join(row["passage"] for row in toy_rows(60))
    for method in ENGINES:
        pruner = ContextPruner.from_pretrained(run / "model", method=method, device="cpu")
        alone = pruner.prune("Where is the cat?", [text], threshold=0.0)
        assert alone.keep_ratio == 1
        # The same in a batch with a shorter one, where it is the other that is padded.
        both = pruner.prune("Where is the cat?", ["The cat is in rome today.", text], threshold=0.0)
        expected = [s.score for s in alone.passages[0].kept]
        assert [s.score for s in both.passages[1].kept] == pytest.approx(expected, abs=1e-4)


def test_the_folder_is_a_stock_token_classifier(run: Path) -> None:
    ours = load(run / "model")
    stock = AutoModelForTokenClassification.from_pretrained(run / "model", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer("The cat was in rome long ago.")["input_ids"]])
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = stock.eval()(input_ids=ids, attention_mask=mask).logits
        assert logits.shape[-1] == 2
        assert torch.allclose(logits, ours.model.joint(ids, mask), atol=1e-6)


def test_int8_rows_hold_in_every_family(run: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(40))
    # The run is finished: it only writes its pruner once more.
    exact, tasks = run / "model", build_tasks(toy_rows(20), hard=False)
    small = run.parent / "int8"
    small.mkdir()
    (small / "training.safetensors").write_bytes((run / "training.safetensors").read_bytes())
    train(STEPS, rows, str(run.parent / "encoder"), small, int8=True)
    scores = [
        score_tasks(ContextPruner.from_pretrained(folder, method="both", device="cpu"), tasks).score
        for folder in (exact, small / "model")
    ]
    assert abs(scores[0] - scores[1]).max() < 0.05


def test_nothing_is_dropped_at_random(run: Path) -> None:
    model = load(run / "model").model.train()
    ids = torch.arange(5, 25).unsqueeze(0)
    first, second = (model.joint(ids, torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_rows_longer_than_the_encoder_reads_are_refused_at_once(
    tmp_path: Path, family: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(20))
    base = toy_encoder(tmp_path / "encoder", family)
    for max_tokens in (161, 256):
        with pytest.raises(InputError, match=f"cannot read {max_tokens} tokens at once"):
            train(replace(STEPS, max_tokens=max_tokens), rows, base, tmp_path / "run")
    train(replace(STEPS, steps=1, max_tokens=160), rows, base, tmp_path / "run")


def test_a_tokenizer_without_the_tokens_of_an_encoder_is_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(20))
    base = Path(toy_encoder(tmp_path / "encoder"))
    tokenizer = toy_tokenizer()
    tokenizer.sep_token = None
    tokenizer.save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"between two texts \(sep\)"):
        train(STEPS, rows, str(base), tmp_path / "run")


def test_an_encoder_whose_weights_are_pickled_is_refused(tmp_path: Path) -> None:
    folder = Path(toy_encoder(tmp_path / "encoder"))
    state = AutoModelForTokenClassification.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(20))
    with pytest.raises(CheckpointError, match="Cannot start from"):
        train(STEPS, rows, str(folder), tmp_path / "run")
