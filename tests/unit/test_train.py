"""Training on a toy task with a tiny encoder built in code: rows, losses, resuming, calibration."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from prune_core.errors import CheckpointError, InputError, UnknownName
from rag_prune import ContextPruner
from rag_prune.context import train as train_module
from rag_prune.context.calibrate import calibrate
from rag_prune.context.checkpoints import ENGINES, Settings, load, save
from rag_prune.context.evaluate import Task, build_tasks, score_tasks
from rag_prune.context.model import pad
from rag_prune.context.pruner import DEFAULT_THRESHOLD
from rag_prune.context.sentences import split
from rag_prune.context.train import TrainConfig, draw, rate_share, train
from rag_prune.context.train_rows import (
    IGNORED,
    Row,
    hard_negatives,
    labelled_rows,
    piece,
    read_rows,
    sentence_labels,
)


def words(text: str) -> list[str]:
    return text.split()


NOUNS = words(
    "cat dog bird tree house lake boat train king queen apple river stone glass paper horse cloud "
    "table chair piano"
)
PLACES = words("paris rome berlin madrid oslo lima cairo delhi")
OTHERS = words("where is the a now it was in long ago today not one of them saw")
WORDS = [*NOUNS, *PLACES, *OTHERS]


def tokenizer() -> Any:
    """Words of the toy task, one token each."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*specials, *WORDS, *".?"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    named = {f"{token[1:-1].lower()}_token": token for token in specials}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def build_encoder(folder: Path, hidden: int = 32) -> str:
    of_words = tokenizer()
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


def toy_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The sentence that shares a noun with the question, and says "today", is the evidence.

    Two rows in five have none; theirs are the only passages that may be negatives.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        asked, title, *others = rng.choice(NOUNS, size=5, replace=False).tolist()
        sentences = [f"The {noun} was in {rng.choice(PLACES)} long ago. " for noun in others]
        evidence = []
        if i % 5 > 1:
            at = int(rng.integers(3))
            sentences[at] = f"The {asked} is in {rng.choice(PLACES)} today. "
            start = sum(map(len, sentences[:at]))
            evidence = [[start, start + len(sentences[at])]]
        rows.append(
            {
                "question": f"Where is the {asked}?",
                "title": f"{title} {i}",
                "passage": "".join(sentences),
                "evidence": evidence,
                "answers": ["today"],
            }
        )
    return rows


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_encoder(tmp_path_factory.mktemp("base") / "encoder")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", toy_rows(40))


# --------------------------------------------------------------------------------------- rows

GOOD = {"question": "Where?", "passage": "In Rome. Or not.", "evidence": [[0, 9]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": ...}, "has no 'question'"),
        ({"passage": ...}, "has no 'passage'"),
        ({"evidence": ...}, "has no 'evidence'"),
        ({"question": "  "}, "must have text as 'question', got '  '"),
        ({"question": 7}, "must have text as 'question', got 7"),
        ({"passage": ""}, "must have text as 'passage'"),
        ({"evidence": {"start": 0}}, "must have a list as 'evidence'"),
        ({"evidence": [[0, 17]]}, r"the evidence \[0, 17\], which is no span of its 16 char"),
        ({"evidence": [[-1, 5]]}, r"the evidence \[-1, 5\], which is no span"),
        ({"evidence": [[9, 3]]}, r"the evidence \[9, 3\], which is no span"),
        ({"evidence": [[3, 3]]}, r"the evidence \[3, 3\], which is no span"),
        ({"evidence": [[0, 9], [1.0, 9]]}, r"the evidence \[1.0, 9\], which is not \[start, end\]"),
        ({"evidence": [[True, 9]]}, r"the evidence \[True, 9\], which is not"),
        ({"evidence": [["0", "9"]]}, r"which is not \[start, end\]"),
        ({"evidence": [[0, 4, 9]]}, r"which is not \[start, end\]"),
        ({"evidence": ["In Rome."]}, r"the evidence 'In Rome.', which is not \[start, end\]"),
        ({"title": 3}, "must have text or null as 'title', got 3"),
        ({"answers": "Rome"}, "must have a list of texts as 'answers', got 'Rome'"),
        ({"answers": [""]}, "must have a list of texts as 'answers'"),
        ({"weight": -1}, "must have a number of at least 0 as 'weight', got -1"),
        ({"weight": "2"}, "must have a number of at least 0 as 'weight', got '2'"),
        ({"weight": float("nan")}, "must have a number of at least 0 as 'weight', got nan"),
    ],
)
def test_a_bad_row_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, bad])
    with pytest.raises(InputError, match=rf"rows\.jsonl', line 2 .*{said}.* A training row has"):
        read_rows(file, tokenizer())


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no training rows: give one JSON object a line"):
        labelled_rows(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match=r"Cannot read '.*absent\.jsonl'"):
        labelled_rows(tmp_path / "absent.jsonl")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + '\n{"question"')
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        labelled_rows(tmp_path / "broken.jsonl")


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    given = {**GOOD, "title": "Rome", "answers": ["Rome"], "weight": 2, "more": "ignored"}
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [GOOD, given]), tokenizer())
    assert [row.weight for row in rows] == [1.0, 2.0]
    assert [row.title for row in rows] == [None, "Rome"]
    assert [row.answers for row in rows] == [(), ("Rome",)]
    assert [row.answered for row in rows] == [True, True]
    assert rows[0].labels.tolist() == [1, 0]
    assert rows[0].tokens.sentence.tolist() == [0, 0, 0, 1, 1, 1]


def test_sentence_labels() -> None:
    passage = "Born in Rome. Died in Oslo. Rome was big. No city at all. Yes."
    sentences = split(passage)
    assert len(sentences) == 5
    labels = sentence_labels(passage, sentences, [[14, 27]], ["Rome", "yes", "at"])
    # Whoever wrote the labels did not mark what else names Rome; short answers are everywhere.
    assert labels.tolist() == [IGNORED, 1, IGNORED, 0, 0]
    assert sentence_labels(passage, sentences, [], []).tolist() == [0] * 5
    # Half a sentence is evidence enough, a touch is not.
    assert sentence_labels(passage, sentences, [[7, 16]], []).tolist() == [1, 0, 0, 0, 0]


def test_hard_negatives_look_right_and_do_not_answer(tmp_path: Path) -> None:
    def row(question: str, title: str | None, passage: str, answered: bool) -> dict[str, Any]:
        evidence = [[0, len(passage)]] if answered else []
        return {
            "question": question,
            "title": title,
            "passage": passage,
            "evidence": evidence,
            "answers": ["berlin"],
        }

    rows = [
        row("Where is the cat?", "cat", "The cat is in berlin.", True),
        row("Where is the cat?", "cats", "Them saw a long stone.", False),  # its own, unanswered
        row("Where is the dog?", "cat", "The cat was a king.", True),  # of the same title
        row("Where is the bird?", "bird", "The cat saw berlin.", True),  # holds an answer
        row("Where is the tree?", "tree", "The cat is a tree.", True),
        row("Where is the lake?", None, "The lake is a cat.", True),
        row("Where is the boat?", None, "The cat is in berlin.", True),  # the same passage
    ]
    read = read_rows(write_rows(tmp_path / "rows.jsonl", rows), tokenizer())
    negatives = hard_negatives(read, per_question=4)
    assert negatives[0][0] == 1
    assert set(negatives[0]) == {1, 4, 5}
    assert hard_negatives(read, per_question=1)[0] == [1]
    for row_read, found in zip(read, negatives, strict=True):
        for other in (read[i] for i in found):
            assert other.passage != row_read.passage
            own = other.question == row_read.question and not other.answered
            assert own or row_read.title is None or other.title != row_read.title
            assert own or "berlin" not in other.passage


# -------------------------------------------------------------------------------------- pieces


@st.composite
def long_rows(draw_: st.DrawFn) -> dict[str, Any]:
    numbers = st.integers(0, len(WORDS) - 1)
    sentences = draw_(st.lists(st.lists(numbers, min_size=2, max_size=12), min_size=1, max_size=15))
    texts = [" ".join(WORDS[i] for i in words).capitalize() + ". " for words in sentences]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    marked = draw_(st.sets(st.integers(0, len(texts) - 1), max_size=3))
    return {
        "question": "Where?",
        "title": draw_(st.sampled_from([None, "the cat"])),
        "passage": "".join(texts),
        "evidence": [[ends[i] - len(texts[i]), ends[i]] for i in sorted(marked)],
    }


def read_row(given: dict[str, Any], folder: Path) -> Row:
    [row] = read_rows(write_rows(folder / "row.jsonl", [given]), tokenizer())
    return row


@settings(deadline=None)
@given(given_row=long_rows(), seed=st.integers(0, 99), room=st.integers(20, 60))
def test_a_piece_is_a_window_that_keeps_evidence(
    tmp_path_factory: pytest.TempPathFactory, given_row: dict[str, Any], seed: int, room: int
) -> None:
    row = read_row(given_row, tmp_path_factory.getbasetemp())
    cut = piece(row, room, np.random.default_rng(seed), title_rate=0.5, as_negative=False)
    ids, sentence = row.tokens.ids, row.tokens.sentence
    n = len(cut.ids)
    assert cut.title_ids in ([], row.title_ids)
    assert n == min(len(ids), room - (len(cut.title_ids) + 1 if cut.title_ids else 0))
    starts = [
        s
        for s in range(len(ids) - n + 1)
        if ids[s : s + n].tolist() == cut.ids
        and (sentence[s : s + n] - sentence[s]).tolist() == cut.sentence.tolist()
    ]
    assert starts
    assert len(cut.labels) == cut.sentence[-1] + 1
    if len(starts) > 1:  # a passage that repeats itself; which part it is cannot be seen
        return
    start, end = starts[0], starts[0] + n
    low = sentence[start]
    labels = row.labels[low : low + len(cut.labels)]
    first_tokens = [np.flatnonzero(sentence == s)[0] for s in np.flatnonzero(row.labels == 1)]
    if first_tokens and max(first_tokens) < len(ids) - n // 2:  # see the expected failure below
        assert any(start <= first < end for first in first_tokens)
    if end < len(ids) and sentence[end] == sentence[end - 1]:
        # What is cut short and should be kept is neither rewarded nor punished.
        assert cut.labels[-1] == (IGNORED if labels[-1] == 1 else labels[-1])
        assert cut.labels[:-1].tolist() == labels[:-1].tolist()
    else:
        assert cut.labels.tolist() == labels.tolist()
    negative = piece(row, room, np.random.default_rng(seed), title_rate=0.5, as_negative=True)
    assert negative.ids == cut.ids
    assert not negative.labels.any()


def long_row(noun: str, folder: Path) -> Row:
    """Twenty sentences of six tokens each, all different; the one with `noun` is the evidence."""
    passage = "".join(f"The {other} was in rome. " for other in NOUNS)
    start = passage.index(f"The {noun}")
    evidence = [[start, start + len(f"The {noun} was in rome. ")]]
    return read_row({**GOOD, "passage": passage, "evidence": evidence}, folder)


def test_a_piece_begins_at_a_sentence_where_one_is_within_reach(tmp_path: Path) -> None:
    row = long_row("apple", tmp_path)  # the eleventh: its first token is number 60
    ids = row.tokens.ids.tolist()
    starts = set()
    for seed in range(60):
        cut = piece(row, 40, np.random.default_rng(seed), title_rate=1, as_negative=False)
        (start,) = (s for s in range(len(ids)) if ids[s : s + 40] == cut.ids)
        assert start % 6 == 0 or start == 60 - 40 // 2
        assert start <= 60
        assert (cut.labels == 1).sum() + (cut.labels == IGNORED).sum() == 1
        starts.add(start)
    assert starts == {40, 42, 48, 54, 60}
    whole = piece(row, 500, np.random.default_rng(0), title_rate=1, as_negative=False)
    assert whole.ids == ids
    assert whole.labels.tolist() == row.labels.tolist()


@pytest.mark.xfail(
    strict=True,
    reason="Evidence in the last half window of a long passage may be left out. The bundled pruner "
    "was trained so; `piece` may count from the evidence instead when it is trained again.",
)
def test_a_piece_keeps_evidence_at_the_end_of_a_long_passage(tmp_path: Path) -> None:
    row = long_row("piano", tmp_path)
    for seed in range(60):
        cut = piece(row, 40, np.random.default_rng(seed), title_rate=1, as_negative=False)
        assert 1 in cut.labels.tolist() or IGNORED in cut.labels.tolist()


# ------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps, late_every and save_every must be at least 1"),
        ({"questions": 1}, "questions at least 2"),
        ({"late_share": 1.5}, "late_share is a share between 0 and 1, got 1.5"),
        ({"hard_rate": -0.1}, "hard_rate is a share between 0 and 1, got -0.1"),
        ({"max_tokens": 100}, "max_tokens must be at least 128, got 100"),
    ],
)
def test_a_recipe_that_cannot_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(**change)


def test_the_recipe_of_the_bundled_pruner_stays() -> None:
    assert TrainConfig() == TrainConfig(
        steps=1250,
        questions=16,
        late_share=0.29,
        late_every=4,
        learning_rate=7e-5,
        warmup=0.06,
        weight_decay=0.01,
        max_tokens=256,
        hard_rate=0.8,
        title_rate=0.5,
        save_every=200,
        seed=0,
    )


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
        for i, row in enumerate(read_rows(train_file, tokenizer()))
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


# ----------------------------------------------------------------------------------- training

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
    assert load(run / "late-model").settings.method == "late"
    assert load(run / "model").settings.method == "both"


def test_the_trained_pruner_prunes(trained: Path) -> None:
    pruner = ContextPruner.from_pretrained(trained / "run" / "model", device="cpu")
    tasks = build_tasks(toy_rows(40), hard=True)
    scored = score_tasks(pruner, tasks)
    chance = score_tasks(ContextPruner.from_pretrained(method="random"), tasks)
    assert scored.mrr > 0.9 > chance.mrr + 0.3
    at, by_chance = scored.threshold_at(0.9), chance.threshold_at(0.9)
    assert scored.compression(at) > 0.8 > chance.compression(by_chance) + 0.3


def test_dev_rows_give_the_default_threshold_its_meaning(trained: Path) -> None:
    rows = labelled_rows(trained / "dev.jsonl")
    tasks = [*build_tasks(rows, hard=False), *build_tasks(rows, hard=True)]
    for method in ENGINES:
        pruner = ContextPruner.from_pretrained(
            trained / "run" / "model", method=method, device="cpu"
        )
        calibration = pruner.scorer.checkpoint.settings.calibration[method]  # type: ignore[attr-defined]
        assert calibration.scale > 0
        scored = score_tasks(pruner, tasks)
        assert scored.recall(DEFAULT_THRESHOLD) >= 0.96
        assert scored.recall(DEFAULT_THRESHOLD + 0.02) < 1  # and not by keeping everything


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
    few = write_rows(tmp_path / "few.jsonl", [GOOD] * 7 + [{**GOOD, "weight": 0}] * 9)
    with pytest.raises(InputError, match="draws 8 questions, and only 7 rows have a weight"):
        train(SHORT, few, base, tmp_path / "run")
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_a_loss_that_is_no_number_stops_the_run(
    base: str, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "late_loss", lambda *_: torch.tensor(float("nan")))
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
    assert shown.out.strip() == str(tmp_path / "run" / "model")
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


# --------------------------------------------------------------------------------- calibration


class Fixed:
    """An engine whose logits are given: one list for each passage in turn."""

    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        self.given = logits

    def logits(self, requests: Sequence[Any]) -> list[list[tuple[Any, float]]]:
        given = iter(self.given)
        return [[(np.array(next(given)), 0.0) for _ in r.passages] for r in requests]


TEXT = "One. Two. Three. Four. Five."
MARKED = ((0, 5), (5, 10), (10, 17), (17, 23))  # all but the last sentence
FIVE = Task("Q?", ({"text": TEXT}, {"text": "One. Two."}), 0, MARKED, ())


@pytest.mark.parametrize(
    ("recall", "kept"), [(1.0, 4), (0.8, 4), (0.75, 3), (0.5, 2), (0.3, 2), (0.01, 1)]
)
def test_the_default_threshold_keeps_the_stated_share(recall: float, kept: int) -> None:
    own = [3.0, 1.0, -1.0, -2.0, -4.0]
    engine: Any = Fixed([own, [-3.0, -5.0]])
    calibration = calibrate(engine, [FIVE], recall)
    assert calibration.scale > 0
    probability = calibration(np.array(own))
    assert (probability[:4] >= DEFAULT_THRESHOLD).sum() == kept
    assert probability[kept - 1] == pytest.approx(DEFAULT_THRESHOLD, abs=1e-4)


def test_calibration_does_not_depend_on_the_logits_scale() -> None:
    own, other = np.array([3.0, 1.0, -3.5, -1.0, -2.0]), np.array([-3.0, 2.0])
    plain: Any = Fixed([own.tolist(), other.tolist()])
    wide: Any = Fixed([(5 * own + 7).tolist(), (5 * other + 7).tolist()])
    a, b = calibrate(plain, [FIVE]), calibrate(wide, [FIVE])
    assert a(own) == pytest.approx(b(5 * own + 7), abs=1e-3)


def test_sentences_without_a_token_do_not_spoil_the_calibration() -> None:
    engine: Any = Fixed([[3.0, 1.0, -1.0, -2.0, -np.inf], [-np.inf, -5.0]])
    calibration = calibrate(engine, [FIVE])
    assert np.isfinite([calibration.scale, calibration.shift]).all()


def test_nothing_to_calibrate_on() -> None:
    engine: Any = Fixed([[1.0] * 5, [1.0] * 2])
    for tasks in ([], [replace(FIVE, evidence=())]):
        with pytest.raises(InputError, match="have no evidence sentence: give rows with some"):
            calibrate(engine, tasks)


# --------------------------------------------------------------------------------- checkpoints


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


def test_int8_moves_scores_little(trained: Path, tmp_path: Path) -> None:
    exact = load(trained / "run" / "model")
    settings = Settings(exact.settings.window)  # the toy's calibration is nearly a step
    for name, int8 in (("exact", False), ("int8", True)):
        save(tmp_path / name, exact.model, exact.tokenizer, settings, int8=int8)
    tasks = build_tasks(toy_rows(20), hard=False)
    for method in ENGINES:
        scores = [
            score_tasks(ContextPruner.from_pretrained(folder, method=method, device="cpu"), tasks)
            for folder in (tmp_path / "exact", tmp_path / "int8")
        ]
        moved = np.abs(scores[0].score - scores[1].score)
        assert moved.max() < 0.05
        assert moved.mean() < 0.01


def test_a_matrix_of_zeros_survives_int8(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint)
    with torch.no_grad():
        next(checkpoint.model.classifier.bert.encoder.layer.parameters()).zero_()
    save(tmp_path / "int8", checkpoint.model, checkpoint.tokenizer, checkpoint.settings, int8=True)
    again = load(tmp_path / "int8")
    assert not next(again.model.classifier.bert.encoder.layer.parameters()).any()


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

    monkeypatch.setattr("rag_prune.context.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(folder, *parts, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
