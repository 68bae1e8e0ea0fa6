"""Self-data distillation with a scripted model: what is asked, what is kept, stopping, going on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data_prune.self_distill import KEEP_EVERY, Request, Rewrite, SelfDistill, SelfDistilled
from prune_core.errors import InputError
from prune_core.recipe import parse_recipe
from prune_core.storage import read_jsonl

ROOT = Path(__file__).parents[2]
PLAIN = SelfDistill(template="{prompt}|{reference}")


@dataclass(frozen=True)
class Said:
    text: str
    new_tokens: int = 5
    refused: bool = False


def content(request: Request) -> str:
    [message] = request.messages
    assert message["role"] == "user"
    return message["content"]


class Scripted:
    """A model that answers by rule, last request first, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, rule: Callable[[str, str, Request], str | Said]) -> None:
        self.rule = rule
        self.asked: list[Request] = []

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Said]]:
        for i in reversed(range(len(requests))):
            self.asked.append(requests[i])
            prompt, _, reference = content(requests[i]).partition("|")
            said = self.rule(prompt, reference, requests[i])
            yield i, said if isinstance(said, Said) else Said(said)


def same_number(prompt: str, reference: str, request: Request) -> str:
    """Right for even rows; each reply names the seed that it was drawn with."""
    n = int(reference.split()[-1])
    return f"With {request.seed} it is {n + n % 2}"


def sums(n: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Sum {i}?", "response": f"#### {i}", "kind": ("a", "b", None)[i % 3]}
        for i in range(n)
    ]


def look(found: SelfDistilled[Any]) -> list[tuple[Any, ...]]:
    return [(r.prompt, r.rewrite, r.accepted, r.reason, r.attempts) for r in found.rewrites]


# ------------------------------------------------------------------------------------- row by row


def test_a_rewrite_that_passes_is_the_target_and_else_the_original_is() -> None:
    rows = sums(2)
    ask = Scripted(same_number)
    found = PLAIN.run(rows, ask)
    even, odd = found.rewrites
    assert even == Rewrite(
        id=even.id,
        prompt="Sum 0?",
        reference="#### 0",
        rewrite=f"With {ask.asked[1].seed} it is 0",
        attempts=1,
        accepted=True,
        passed={
            "complete": True,
            "not_empty": True,
            "leakage": True,
            "refusal": True,
            "number": True,
            "length": True,
        },
        reason="It passes not_empty, leakage, refusal, number, length.",
    )
    assert even.target == even.rewrite
    assert (odd.accepted, odd.target) == (False, "#### 1")
    assert odd.reason == "Its final number is 2, and the reference's 1."
    assert odd.rewrite == f"With {ask.asked[0].seed} it is 2"
    assert found.dataset() == [{**rows[0], "response": even.rewrite}, rows[1]]
    assert rows == sums(2)


def test_what_is_asked() -> None:
    ask = Scripted(lambda *_: "x")
    how = SelfDistill(max_new_tokens=7, temperature=0.5, checks=("leakage",))
    how.run([{"q": "Is {x} a set?", "a": "Yes {y}\ud800", "n": 1}], ask, prompt_field="q",
            response_field="a")  # fmt: skip
    [request] = ask.asked
    text = content(request)
    assert "Is {x} a set?" in text
    assert "Yes {y}?" in text  # and no lone surrogate, which no tokenizer takes
    assert (request.max_new_tokens, request.temperature) == (7, 0.5)
    assert 0 <= request.seed < 2**31


@pytest.mark.parametrize(
    ("said", "rewrite", "reason"),
    [
        (Said("It is 4", new_tokens=512), "It is 4", "It was cut off after 512 tokens."),
        (Said("It is 4", new_tokens=511), "It is 4", "It passes not_empty, leakage, refusal, num"),
        (Said("too long", refused=True), None, "The model did not read it: too long"),
        (Said("  \n"), "", "The rewrite is empty."),
        (Said(" It is \ud800 4 \n"), "It is ? 4", "It passes"),
    ],
)
def test_replies_that_are_no_rewrites(said: Said, rewrite: str | None, reason: str) -> None:
    other = {"prompt": "Sum 6?", "response": "#### 6"}  # where all are refused there is an error
    four = {"prompt": "Sum 4?", "response": "#### 4"}
    ask = Scripted(lambda prompt, *_: said if "4" in prompt else "6")
    found = PLAIN.run([four, other], ask).rewrites[0]
    assert found.rewrite == rewrite
    assert found.reason.startswith(reason)
    assert found.accepted == reason.startswith("It passes")


def test_rows_with_nothing_to_rewrite_stay_as_they_are() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "response": None},
        {"prompt": "p", "response": " \n"},
        {"prompt": "", "response": "r"},
        {"prompt": "Sum 2?", "response": "#### 2"},
    ]
    ask = Scripted(same_number)
    found = PLAIN.run(rows, ask)
    assert len(ask.asked) == 1
    assert [r.reason for r in found.rewrites[:3]] == [
        "The row has no answer: there is nothing to rewrite.",
        "The row has no answer: there is nothing to rewrite.",
        "The row has no prompt: there is nothing to rewrite.",
    ]
    assert found.dataset()[:3] == rows[:3]
    assert found.acceptance == 0.25
    nothing = PLAIN.run(rows[:3], ask)
    assert nothing.acceptance == 0
    assert nothing.summary().startswith("0 of 3 answers rewritten (0.0%), 3 without a rewrite")


def test_copies_of_a_row_are_asked_once_and_share_the_rewrite() -> None:
    rows = [sums(4)[2], sums(4)[0], sums(4)[2], {**sums(4)[2], "kind": "other"}]
    ask = Scripted(same_number)
    found = PLAIN.run(rows, ask)
    assert len(ask.asked) == 2
    first, _, second, third = found.rewrites
    assert first == second == third
    assert found.dataset()[3]["kind"] == "other"
    # Of the same prompt with another answer, each is its own.
    other = [{"prompt": "p", "response": "#### 2"}, {"prompt": "p", "response": "#### 4"}]
    one, two = PLAIN.run(other, Scripted(same_number)).rewrites
    assert one.id != two.id
    assert one.rewrite != two.rewrite


def test_only_the_checks_that_are_named() -> None:
    found = replace(PLAIN, checks=("leakage",)).run(sums(2), Scripted(same_number))
    assert found.acceptance == 1
    assert set(found.rewrites[1].passed) == {"complete", "not_empty", "leakage"}
    short = replace(PLAIN, length_ratio=(5.0, 6.0)).run(sums(2), Scripted(same_number))
    assert short.rewrites[0].reason.endswith("less than 5 times the reference's 6.")


# ------------------------------------------------------------------------------------- any order


def test_order_and_company_change_nothing() -> None:
    rows = sums(60)
    straight = {r.prompt: r for r in PLAIN.run(rows, Scripted(same_number)).rewrites}
    mixed = random.Random(0).sample(rows, 45)
    found = PLAIN.run(mixed, Scripted(same_number))
    assert [r.prompt for r in found.rewrites] == [row["prompt"] for row in mixed]
    assert all(r == straight[r.prompt] for r in found.rewrites)
    targets = {row["prompt"]: row["response"] for row in found.dataset()}
    assert all(target == straight[prompt].target for prompt, target in targets.items())


def test_each_row_and_attempt_and_seed_draws_by_itself() -> None:
    how = replace(PLAIN, temperature=1.0, attempts=3, choose="shortest")
    ask = Scripted(same_number)
    how.run(sums(20), ask)
    assert len({request.seed for request in ask.asked}) == 60
    other = Scripted(same_number)
    replace(how, seed=1).run(sums(20), other)
    assert not {r.seed for r in ask.asked} & {r.seed for r in other.asked}


# --------------------------------------------------------------------------------------- attempts


def in_turn(*texts: str | Said) -> Callable[[str, str, Request], str | Said]:
    """What the model says at each attempt, whatever the row."""
    counts: dict[str, int] = {}

    def rule(prompt: str, reference: str, request: Request) -> str | Said:
        counts[prompt] = counts.get(prompt, -1) + 1
        return texts[counts[prompt]]

    return rule


TWO = [{"prompt": "Two?", "response": "#### 2"}]
DRAWN = replace(PLAIN, temperature=1.0, attempts=3)


def test_the_first_that_passes_ends_the_attempts() -> None:
    ask = Scripted(in_turn("It is 3", "Surely it is 2", "2"))
    [found] = DRAWN.run(TWO, ask).rewrites
    assert (found.rewrite, found.attempts, len(ask.asked)) == ("Surely it is 2", 2, 2)


def test_the_shortest_that_passes() -> None:
    how = replace(DRAWN, choose="shortest")
    ask = Scripted(in_turn("1", "Surely it is 2", "It is 2"))
    [found] = how.run(TWO, ask).rewrites
    assert (found.rewrite, found.attempts, found.accepted) == ("It is 2", 3, True)


def test_where_no_attempt_passes_the_first_is_shown() -> None:
    [found] = DRAWN.run(TWO, Scripted(in_turn("It is 3", "4", "5"))).rewrites
    assert (found.rewrite, found.attempts, found.accepted) == ("It is 3", 3, False)
    assert found.target == "#### 2"


def test_what_is_refused_is_not_asked_again() -> None:
    ask = Scripted(lambda prompt, *_: Said("long", refused=True) if "Two" in prompt else "It is 9")
    found = DRAWN.run([*TWO, {"prompt": "Four?", "response": "#### 4"}], ask)
    assert [r.attempts for r in found.rewrites] == [1, 3]
    assert len(ask.asked) == 4


# ----------------------------------------------------------------------------- stopping, going on


class Stops(Scripted):
    """Raises at random calls, about once in `often` replies."""

    def __init__(self, seed: int, often: int) -> None:
        super().__init__(same_number)
        self.random, self.often = random.Random(seed), often

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Said]]:
        for reply in super().__call__(requests):
            if self.random.randrange(self.often) == 0:
                self.asked.pop()  # it was asked and never answered
                raise self.random.choice([RuntimeError, KeyboardInterrupt])("stopped")
            yield reply


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choose", ["first", "shortest"])
def test_stopped_at_random_it_asks_nothing_twice(tmp_path: Path, seed: int, choose: Any) -> None:
    how = replace(DRAWN, choose=choose)
    rows = sums(KEEP_EVERY * 2 + 10)
    plain = Scripted(same_number)
    straight = how.run(rows, plain)
    asked: list[Request] = []
    order = random.Random(seed)
    for _ in range(500):
        ask = Stops(seed=order.randrange(10**6), often=40)
        try:
            found = how.run(order.sample(rows, len(rows)), ask, tmp_path)
        except (RuntimeError, KeyboardInterrupt):
            asked += ask.asked
            continue
        asked += ask.asked
        break
    assert {r.id: r for r in found.rewrites} == {r.id: r for r in straight.rewrites}
    seeds = [request.seed for request in asked]
    assert len(seeds) == len(set(seeds)) == len(plain.asked)

    silent = Scripted(same_number)
    assert look(how.run(rows, silent, tmp_path)) == look(straight)
    assert not silent.asked
    more = Scripted(same_number)
    how.run([*rows, {"prompt": "New?", "response": "#### 1000"}], more, tmp_path)
    assert {content(request) for request in more.asked} == {"New?|#### 1000"}


KILLED = """
    import os, sys, time
    from data_prune.self_distill import SelfDistill
    sys.path.insert(0, os.path.join({root!r}, "tests", "unit"))
    from test_self_distill import PLAIN, Scripted, same_number, sums

    def slowly(*row):
        time.sleep(0.002)
        print("answered", flush=True)
        return same_number(*row)

    PLAIN.run(sums(500), Scripted(slowly), {folder!r})
"""


def test_killed_it_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle; what was kept is not asked again, and the result is the same."""
    folder = tmp_path / "replies"
    script = textwrap.dedent(KILLED.format(root=str(ROOT), folder=str(folder)))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    with process:
        for _ in range(150):
            assert process.stdout.readline() == "answered\n"
        process.send_signal(signal.SIGKILL)
        seen = 150 + process.stdout.read().count("answered")
    assert process.returncode == -signal.SIGKILL
    assert seen < 500
    ask = Scripted(same_number)
    found = PLAIN.run(sums(500), ask, folder)
    assert look(found) == look(PLAIN.run(sums(500), Scripted(same_number)))
    assert 500 - seen <= len(ask.asked) <= 500 - seen + 2 * KEEP_EVERY
    assert not list(folder.glob(".*"))  # the half-written


def test_other_checks_ask_nothing_and_other_settings_want_another_folder(tmp_path: Path) -> None:
    rows = sums(4)
    PLAIN.run(rows, Scripted(same_number), tmp_path)
    silent = Scripted(same_number)
    found = replace(PLAIN, checks=("leakage",)).run(rows, silent, tmp_path)
    assert not silent.asked
    assert found.acceptance == 1
    other = Scripted(same_number)
    other.name = "other"
    with pytest.raises(InputError, match='\'model\' was "scripted" and is now "other"'):
        PLAIN.run(rows, other, tmp_path)
    for name, value in {"temperature": 0.5, "seed": 3, "max_new_tokens": 9}.items():
        with pytest.raises(InputError, match=f"'{name}' was"):
            replace(PLAIN, **{name: value}).run(rows, silent, tmp_path)


def test_more_attempts_ask_for_those_alone(tmp_path: Path) -> None:
    rows = sums(6)
    replace(DRAWN, attempts=1).run(rows, Scripted(same_number), tmp_path)
    more = Scripted(same_number)
    replace(DRAWN, attempts=2).run(rows, more, tmp_path)
    assert sorted(content(request)[:6] for request in more.asked) == ["Sum 1?", "Sum 3?", "Sum 5?"]


def test_a_refusal_is_not_kept(tmp_path: Path) -> None:
    rows = sums(4)
    PLAIN.run(rows, Scripted(lambda p, *_: Said("no", refused=True) if "2" in p else "x"), tmp_path)
    again = Scripted(same_number)
    found = PLAIN.run(rows, again, tmp_path)
    assert [content(request) for request in again.asked] == ["Sum 2?|#### 2"]
    assert found.rewrites[2].accepted


# ------------------------------------------------------------------------------------ what is left


def test_acceptance_by_group_and_what_a_run_leaves(tmp_path: Path) -> None:
    rows = sums(6)  # even ones pass: a 0 3, b 1 4, None 2 5
    found = PLAIN.run(rows, Scripted(same_number))
    assert found.acceptance == 0.5
    assert found.acceptance_by("kind") == {"None": 0.5, "a": 0.5, "b": 0.5}
    assert found.acceptance_by("response") == {f"#### {i}": float(i % 2 == 0) for i in range(6)}
    with pytest.raises(InputError, match="Did you mean 'kind'"):
        found.acceptance_by("kid")
    report = found.report()
    assert (report["rows"], report["accepted"], report["without_rewrite"]) == (6, 3, 0)
    assert report["checks"]["number"] == {"passed": 3, "of": 6}
    assert "answer" not in report["checks"]
    assert found.summary() == (
        "3 of 6 answers rewritten (50.0%), 0 without a rewrite\npassed: complete 6 of 6, "
        "not_empty 6 of 6, leakage 6 of 6, refusal 6 of 6, number 3 of 6, length 6 of 6"
    )
    found.save(tmp_path / "rows.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows.jsonl",
        "rows.report.json",
        "rows.rewrites.jsonl",
    ]
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == found.dataset()
    _, odd, *_ = read_jsonl(tmp_path / "rows.rewrites.jsonl")
    assert odd == {
        "id": found.rewrites[1].id,
        "prompt": "Sum 1?",
        "reference": "#### 1",
        "rewrite": found.rewrites[1].rewrite,
        "attempts": 1,
        "accepted": False,
        "passed": found.rewrites[1].passed,
        "reason": "Its final number is 2, and the reference's 1.",
        "target": "#### 1",
    }
    record = json.loads((tmp_path / "rows.report.json").read_text())
    assert record["extra"]["report"] == report
    assert record["extra"]["settings"]["template"] == PLAIN.template


def test_lone_surrogates_are_written_as_json_spells_them(tmp_path: Path) -> None:
    rows = [{"prompt": "p\ud800", "response": "#### 1"}]
    PLAIN.run(rows, Scripted(same_number)).save(tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == rows[0]


def test_a_dataset_comes_out_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "response": datasets.Value("large_string"),
            "kind": datasets.ClassLabel(names=["x", "y"]),
            "prompt": datasets.Value("string"),
        }
    )
    columns = {name: [row[name] for row in sums(4)] for name in ("response", "prompt")}
    columns["response"][3] = None  # type: ignore[call-overload]
    rows = datasets.Dataset.from_dict(columns | {"kind": [0, 1, 1, 0]}, features=features)
    rows = rows.select([3, 2, 1, 0])
    found = PLAIN.run(rows, Scripted(same_number))
    out = found.dataset()
    assert isinstance(out, datasets.Dataset)
    assert out.features == features
    assert out.column_names == rows.column_names
    assert out["prompt"][:] == rows["prompt"][:]
    assert out["response"][:] == [None, found.rewrites[1].rewrite, "#### 1",
                                  found.rewrites[3].rewrite]  # fmt: skip
    assert rows["response"][1] == "#### 2"
    assert found.acceptance_by("kind") == {"0": 0.5, "1": 0.5}
    found.save(tmp_path / "rows.jsonl")
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == list(out)
    with pytest.raises(InputError, match=r"no column 'text'\. Known: kind, prompt, response\."):
        PLAIN.run(rows, Scripted(same_number), prompt_field="text")


# ----------------------------------------------------------------------------------- what goes in


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "There are no rows"),
        ({"train": sums(2)}, "must be a list of dicts or a Dataset .* got dict"),
        (iter(sums(2)), "must be a list of dicts or a Dataset"),
        ([*sums(1), {"prompt": "p", "respons": "r"}], "Row 1 must .* 'response'. Did you mean 're"),
        (["text"], "Row 0 must be a dict with the field 'prompt'"),
        ([{"prompt": "p", "response": 3}], "Row 0: 'response' must be text, got int"),
        ([{"prompt": [{"role": "user"}], "response": "r"}], "Row 0: 'prompt' must be text, got li"),
    ],
)
def test_rows_that_cannot_be_read(rows: Any, message: str, tmp_path: Path) -> None:
    ask = Scripted(same_number)
    with pytest.raises(InputError, match=message):
        PLAIN.run(rows, ask, tmp_path / "replies")
    assert not ask.asked
    assert not (tmp_path / "replies").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1), "'wrong' gave 2 replies, and must answer each of 3 requests once"),
        ((0, 1, 1, 2), "gave a reply number 1 twice or unasked"),
        ((0, 1, 2, 3), "gave a reply number 3 twice or unasked"),
        ((-1,), "gave a reply number -1 twice or unasked"),
    ],
)
def test_a_model_that_does_not_answer_each_request_once(
    numbers: Sequence[int], message: str, tmp_path: Path
) -> None:
    class Wrong:
        name = "wrong"

        def __call__(self, requests: Sequence[Request]) -> list[tuple[int, Said]]:
            return [(i, Said("It is 2")) for i in numbers]

    with pytest.raises(InputError, match=message):
        PLAIN.run(sums(3), Wrong(), tmp_path)


def test_a_model_that_refuses_everything_is_one_error() -> None:
    with pytest.raises(InputError, match=r"'scripted' refused all 3 requests\. .* no such model"):
        PLAIN.run(sums(3), Scripted(lambda *_: Said("no such model", refused=True)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{prompt}"}, r"must hold \{prompt\} and \{reference\} .* got \['prompt'\]"),
        ({"template": "{prompt} {reference} {x}"}, "no other name"),
        ({"template": "{prompt.text} {reference}"}, "no other name"),
        ({"template": "{prompt} {reference} {"}, "template is not one"),
        ({"checks": ("numbers",)}, "Unknown check 'numbers'. Did you mean 'number'"),
        ({"length_ratio": (2.0, 1.0)}, "0 <= least < most"),
        ({"length_ratio": (-1.0, 1.0)}, "0 <= least < most"),
        ({"max_new_tokens": 0}, "at least 1, got 0 and 1"),
        ({"attempts": 0}, "at least 1, got 512 and 0"),
        ({"attempts": 2}, "2 attempts at temperature 0 would all be the same"),
        ({"temperature": -0.1}, "0 or more, got -0.1"),
        ({"temperature": float("nan")}, "0 or more, got nan"),
        ({"choose": "longest"}, "'first' or 'shortest', got 'longest'"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SelfDistill(**settings)


def test_a_recipe() -> None:
    read = parse_recipe(
        {"temperature": 1, "checks": ["number"], "length_ratio": [0.5, 2]}, SelfDistill
    )
    assert read == SelfDistill(temperature=1.0, checks=("number",), length_ratio=(0.5, 2.0))
    assert SelfDistill(template="{{}} {prompt} {reference}") != SelfDistill()
