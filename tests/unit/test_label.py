"""Silver labels with a scripted language model: what is kept, what is dropped and why, resuming."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prune_core.errors import InputError
from rag_prune.context.label import (
    DROPPED,
    NO_ANSWER_WEIGHT,
    Item,
    Label,
    Prompt,
    Reply,
    label,
    prompt,
    read_items,
    read_reply,
)
from rag_prune.context.result import Passage
from rag_prune.context.train_rows import labelled_rows
from tiny import write_rows

CURIE = "Marie was born in Warsaw. With Pierre she found radium in 1898. She liked cycling."
QUESTION = "Who found radium?"


def item(text: str = CURIE, question: str = QUESTION, **more: Any) -> Item:
    return Item(question, Passage.read({"text": text, "title": "Curie"}, 0), **more)


def said(answer: str | None, *numbers: int) -> str:
    return json.dumps({"answer": answer, "sentences": list(numbers)})


def sentences_of(asked: Prompt) -> list[str]:
    return re.findall(r"^\[\d+\] (.*)$", asked.text, re.MULTILINE)


class Scripted:
    """A model that answers by rule, last prompt first, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, rule: Callable[[list[str]], str | Reply]) -> None:
        self.rule = rule
        self.asked: list[Prompt] = []

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        for i in reversed(range(len(prompts))):
            self.asked.append(prompts[i])
            reply = self.rule(sentences_of(prompts[i]))
            yield i, reply if isinstance(reply, Reply) else Reply(reply, 100, 10)


def good(sentences: list[str]) -> str:
    """Cites every sentence on radium."""
    numbers = [i for i, sentence in enumerate(sentences, 1) if "radium" in sentence]
    return said("Pierre", *numbers) if numbers else said(None)


def run(rule: Callable[[list[str]], str | Reply], folder: Path, **more: Any) -> Label:
    [found] = label([item(**more)], Scripted(rule), folder, progress=False).labels
    return found


# -------------------------------------------------------------------------------------- the prompt


def test_a_prompt_numbers_the_sentences_and_its_schema_knows_no_others() -> None:
    asked = prompt(" Who? ", "Marie\ud800", ["One.\r\n\r\n", "Two [7]\nand on. "])
    assert asked.text.startswith("Question: Who?\n\nTitle: Marie\ufffd\n\nPassage")
    assert "\n[1] One.\n[2] Two [7] and on.\n\nAnswer" in asked.text
    assert "Title" not in prompt("Who?", None, ["One."]).text
    answered, none = asked.schema["anyOf"]
    numbers = answered["properties"]["sentences"]
    assert (numbers["items"]["enum"], numbers["minItems"], numbers["maxItems"]) == ([1, 2], 1, 2)
    assert none["properties"]["sentences"]["maxItems"] == 0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (said("Pierre", 2, 1, 2), ("Pierre", (0, 1))),
        (said(None), (None, ())),
        (said("No answer."), (None, ())),
        (said(" null ", 1), (None, (0,))),
        ('Here it is:\n```json\n{"answer": "a", "sentences": [1]}\n```', ("a", (0,))),
        (said("Pierre", 4), None),
        (said("Pierre", 0), None),
        ('{"answer": "a", "sentences": [true]}', None),
        ('{"answer": "a", "sentences": ["1"]}', None),
        ('{"answer": "a", "sentences": 1}', None),
        ('{"answer": 3, "sentences": [1]}', None),
        ('{"answer": "a"}', None),
        ('{"answer": "cut of', None),
        ("[1]", None),
        ("Pierre [2]", None),
        ("", None),
    ],
)
def test_replies_are_read_or_refused_whole(text: str, read: Any) -> None:
    assert read_reply(text, 3) == read


# ---------------------------------------------------------------------------------------- outcomes


def test_a_good_label_passes_every_look_and_is_a_training_row(tmp_path: Path) -> None:
    model = Scripted(good)
    labels = label([item(), item("Nothing here.")], model, tmp_path / "r", progress=False)
    answered, none = labels.labels
    assert answered.outcome == "answered"
    assert answered.looks == {"supported": True, "sufficient": True, "necessary": True}
    evidence = "With Pierre she found radium in 1898."
    start = CURIE.index(evidence)
    assert answered.row() == {
        "question": QUESTION,
        "title": "Curie",
        "passage": CURIE,
        "answers": ["Pierre"],
        "evidence": [[start, start + len(evidence)]],
        "weight": 1.0,
    }
    assert none.outcome == "no answer"
    assert (none.row()["evidence"], none.row()["weight"]) == ([], NO_ANSWER_WEIGHT)
    # The second look: the cited sentence alone, then all the others.
    assert [sentences_of(asked) for asked in model.asked[2:]] == [
        ["Marie was born in Warsaw.", "She liked cycling."],
        [evidence],
    ]
    labels.save(tmp_path / "rows.jsonl")
    assert labelled_rows(tmp_path / "rows.jsonl") == [answered.row(), none.row()]


def wrong_citation(sentences: list[str]) -> str:
    return said("Pierre", 1) if len(sentences) > 1 else said(None)


def answers_alone(sentences: list[str]) -> str:
    """Cites the right sentence, and without it answers all the same."""
    return good(sentences) if "radium" in " ".join(sentences) else said("Pierre", 1)


def changes_its_mind(sentences: list[str]) -> str:
    return good(sentences) if len(sentences) == 3 else said("in Warsaw", 1)


@pytest.mark.parametrize(
    ("rule", "outcome", "looks"),
    [
        (wrong_citation, "unsupported", {"supported": False}),
        (lambda s: said("Pierre") if len(s) == 3 else said(None), "uncited", {}),
        (lambda _: said(None, 2), "uncited", {}),
        (lambda _: '{"answer": "Pie', "malformed", {}),
        (lambda _: said("Pierre", 4), "malformed", {}),
        (
            answers_alone,
            "unnecessary",
            {"supported": True, "sufficient": True, "necessary": False},
        ),
        (
            changes_its_mind,
            "insufficient",
            {"supported": True, "sufficient": False, "necessary": False},
        ),
        (
            lambda s: good(s) if len(s) == 3 else "garbage",
            "insufficient",
            {"supported": True, "sufficient": False, "necessary": False},
        ),
        (
            lambda s: good(s) if len(s) == 3 else Reply("busy", refused=True),
            "insufficient",
            {"supported": True, "sufficient": False, "necessary": False},
        ),
    ],
)
def test_a_label_that_does_not_hold_is_dropped_with_its_reason(
    tmp_path: Path, rule: Any, outcome: str, looks: dict[str, bool]
) -> None:
    found = run(rule, tmp_path)
    assert (found.outcome, found.looks) == (outcome, looks)
    assert found.outcome in DROPPED


def test_who_cites_everything_says_nothing(tmp_path: Path) -> None:
    model = Scripted(lambda s: said("Pierre", *range(1, len(s) + 1)))
    [found] = label([item()], model, tmp_path, progress=False).labels
    assert found.outcome == "indiscriminate"
    assert len(model.asked) == 1


def test_of_one_sentence_nothing_is_left_to_ask(tmp_path: Path) -> None:
    model = Scripted(good)
    whole = item("Pierre found radium.")
    [found] = label([whole], model, tmp_path, progress=False).labels
    assert found.outcome == "answered"
    assert found.looks == {"supported": True, "sufficient": True}
    assert len(model.asked) == 1  # its second look is the same prompt, which is not asked again


def test_known_answers_overrule_the_model(tmp_path: Path) -> None:
    assert run(good, tmp_path, answers=("Pierre Curie",)).outcome == "answered"
    assert run(good, tmp_path, answers=("Henri Becquerel",)).outcome == "contradicts"
    found = run(lambda _: said(None), tmp_path / "none", answers=("1898",))
    assert found.outcome == "contradicts"
    found = run(lambda _: said(None), tmp_path / "none", answers=("1903",))
    assert found.outcome == "no answer"
    assert found.row()["answers"] == ["1903"]


def test_no_answer_counts_only_beside_an_answer_that_is_known(tmp_path: Path) -> None:
    overlooks = "In 1898 Pierre Curie found it. It glows."
    texts = [CURIE, "Nothing here. Nor here.", overlooks]
    items = [*map(item, texts), item("Nothing here. Nor here.", question="Who cycles?")]
    labels = label(items, Scripted(good), tmp_path, progress=False).labels
    assert [found.outcome for found in labels] == [
        "answered",
        "no answer",
        "contradicts",
        "unconfirmed",
    ]


def test_answers_without_spaces_between_words_and_yes_or_no(tmp_path: Path) -> None:
    def chinese(sentences: list[str]) -> str:
        numbers = [i for i, s in enumerate(sentences, 1) if "镭" in s]
        return said("居里夫人", *numbers) if numbers else said(None)

    text = "华沙是波兰的首都。居里夫人发现了镭。她喜欢骑车。"
    found = run(chinese, tmp_path / "zh", text=text)
    assert found.outcome == "answered"
    assert found.row()["evidence"] == [[9, 18]]
    unsupported = run(
        lambda s: said("爱因斯坦", 2) if len(s) > 1 else said(None), tmp_path / "no", text=text
    )
    assert unsupported.outcome == "unsupported"

    def yes(sentences: list[str]) -> str:
        return said("Yes", 1) if "radium" in sentences[0] else said(None)

    assert run(yes, tmp_path / "yes", text="Pierre found radium. It rained.").row()["answers"] == []


def test_a_model_that_refuses_everything_is_one_error(tmp_path: Path) -> None:
    refusing = Scripted(lambda _: Reply("no model 'x'", refused=True))
    with pytest.raises(InputError, match=r"refused all 1 prompts\. .* said: no model"):
        label([item()], refusing, tmp_path, progress=False)
    # A refusal is not kept, as another setting of the server may help.
    [found] = label([item()], Scripted(good), tmp_path, progress=False).labels
    assert found.outcome == "answered"


# ------------------------------------------------------------------------------ stop, go on, order


def test_order_is_kept_and_a_repeated_prompt_is_asked_once(tmp_path: Path) -> None:
    texts = [f"Pierre found radium {i} times." for i in range(40)]
    model = Scripted(good)
    items = [item(text) for text in [*texts, *texts]]
    labels = label(items, model, tmp_path, progress=False)
    assert [found.item.passage.text for found in labels.labels] == [*texts, *texts]
    assert len(model.asked) == 40
    assert labels.report()["cost"]["prompts"] == 40
    assert labels.report()["cost"]["prompt_tokens"] == 4000


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("the server went away")])
@pytest.mark.parametrize("after", [1, 37, 95])
def test_a_stopped_run_goes_on_without_asking_twice(tmp_path: Path, stop: Any, after: int) -> None:
    items = [
        item(f"Number {i} was born. Pierre found radium {i} times. It rained.") for i in range(40)
    ]
    straight = label(items, Scripted(good), tmp_path / "straight", progress=False)

    def crashing(sentences: list[str]) -> str:
        if len(model.asked) > after:
            raise stop
        return good(sentences)

    model = Scripted(crashing)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        label(items, model, tmp_path / "stopped", progress=False)
    before = model.asked[:-1]  # the last one was never answered

    again = Scripted(good)
    labels = label(items, again, tmp_path / "stopped", progress=False)
    assert labels.labels == straight.labels
    assert len(before) == after
    asked = [p.text for p in before + again.asked]
    assert len(asked) == len(set(asked)) == 120

    more = Scripted(good)
    label([*items, item("Pierre found radium anew.")], more, tmp_path / "stopped", progress=False)
    assert len(more.asked) == 1


def test_replies_of_another_model_are_not_taken_for_its_own(tmp_path: Path) -> None:
    label([item()], Scripted(good), tmp_path, progress=False)
    other = Scripted(good)
    other.name = "other"
    with pytest.raises(InputError, match='\'model\' was "scripted" and is now "other"'):
        label([item()], other, tmp_path, progress=False)


# ------------------------------------------------------------------------------------ what is left


def test_what_a_run_leaves(tmp_path: Path) -> None:
    def rule(sentences: list[str]) -> str:
        return "garbage" if "Nothing" in sentences[0] else good(sentences)

    items = [item(), item("Nothing here."), item("Another day.")]
    labels = label(items, Scripted(rule), tmp_path / "rows.replies", progress=False)
    labels.save(tmp_path / "rows.jsonl", tmp_path / "page.html")
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.replies",
        "rows.jsonl",
        "rows.dropped.jsonl",
        "rows.report.json",
        "page.html",
    }
    assert [row["weight"] for row in labelled_rows(tmp_path / "rows.jsonl")] == [1.0, 0.5]
    dropped = json.loads((tmp_path / "rows.dropped.jsonl").read_text())
    assert dropped["passage"] == "Nothing here."
    assert dropped["reason"] == f"malformed: {DROPPED['malformed']}"
    report = json.loads((tmp_path / "rows.report.json").read_text())["extra"]["report"]
    assert report == labels.report()
    assert (report["items"], report["kept"]) == (3, 2)
    counts = {name: n for name, n in report["outcomes"].items() if n}
    assert counts == {"answered": 1, "no answer": 1, "malformed": 1}
    assert report["looks"]["necessary"] == {"passed": 1, "of": 1}
    assert report["evidence_sentences_an_answer"] == 1
    assert report["cost"]["prompts"] == 5
    assert "2 of 3 kept: 1 answered, 1 no answer, 1 malformed" in labels.summary()
    page = (tmp_path / "page.html").read_text()
    assert "Who found radium? → Pierre" in page
    assert "Another day" not in page


def test_where_nothing_holds_the_reasons_are_left(tmp_path: Path) -> None:
    labels = label([item()], Scripted(lambda _: "garbage"), tmp_path / "r", progress=False)
    with pytest.raises(InputError, match="None of the 1 labels held"):
        labels.save(tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    assert (tmp_path / "rows.dropped.jsonl").exists()


# ----------------------------------------------------------------------------------- what goes in


def test_questions_with_a_passage_or_with_several(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "questions.jsonl",
        [
            {"question": "Q1", "passage": "One.", "title": "T", "answers": ["a"]},
            {"question": "Q2", "passages": ["Two.", {"text": "Three.", "title": "U"}]},
        ],
    )
    items = read_items(file)
    assert [(i.question, i.passage.title, i.passage.text, i.answers) for i in items] == [
        ("Q1", "T", "One.", ("a",)),
        ("Q2", None, "Two.", ()),
        ("Q2", "U", "Three.", ()),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q"}, "either 'passage' or 'passages'"),
        ({"question": "Q", "passage": "p", "passages": []}, "either 'passage' or 'passages'"),
        ({"passage": "p"}, "The question must be a string"),
        ({"question": "Q", "passage": 3}, "Passage 0 must be a string"),
        ({"question": "Q", "passages": "p"}, "must be a list"),
        ({"question": "Q", "passages": ["p", " \n"]}, "passage 1 holds no text"),
        ({"question": "Q", "passage": "p", "answers": "a"}, "'answers' must be a list of texts"),
    ],
)
def test_a_row_that_cannot_be_labelled(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good_row = {"question": "Q", "passage": "p"}
    file = write_rows(tmp_path / "questions.jsonl", [good_row, row])
    with pytest.raises(InputError, match=rf"questions\.jsonl', line 2 .*{message}"):
        read_items(file)
    with pytest.raises(InputError, match="holds nothing to label"):
        read_items(write_rows(tmp_path / "empty.jsonl", []))
