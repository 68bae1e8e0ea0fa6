"""A real model rewrites worked answers of arithmetic: what is taken has the right result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from data_prune.rewrite_checks import final_number
from data_prune.self_distill import Request, SelfDistill
from pipelines.ask import AskLocal
from pipelines.small_model import small_model

pytestmark = pytest.mark.slow

# In the form of GSM8K's rows.
ROWS = [
    {"question": question, "answer": f"{worked}\n#### {result}"}
    for question, worked, result in (
        (
            "Ann has 5 apples and buys 7 more. How many apples does she have?",
            "Ann has 5 + 7 = 12 apples.",
            12,
        ),
        (
            "A box holds 6 eggs. How many eggs are in 4 boxes?",
            "There are 6 * 4 = 24 eggs in 4 boxes.",
            24,
        ),
        (
            "Tom had 20 marbles and lost 8. How many marbles are left?",
            "Tom has 20 - 8 = 12 marbles left.",
            12,
        ),
        (
            "A train goes 60 miles an hour. How far does it go in 3 hours?",
            "The train goes 60 * 3 = 180 miles.",
            180,
        ),
        (
            "Three friends share 27 sweets evenly. How many does each get?",
            "Each friend gets 27 / 3 = 9 sweets.",
            9,
        ),
        (
            "A book costs $15 and a pen costs $2. What do 2 books and a pen cost?",
            "The books cost 2 * 15 = $30.\nWith the pen that is 30 + 2 = $32.",
            32,
        ),
        (
            "Mia reads 10 pages a day. How many pages does she read in two weeks?",
            "Two weeks are 14 days.\nShe reads 14 * 10 = 140 pages.",
            140,
        ),
        (
            "A farmer has 12 cows and twice as many sheep. How many animals is that?",
            "There are 12 * 2 = 24 sheep.\nThat makes 12 + 24 = 36 animals.",
            36,
        ),
        (
            "Ben earns $9 an hour and works 8 hours. How much does he earn?",
            "Ben earns 9 * 8 = $72.",
            72,
        ),
        (
            "A tank of 50 litres is half full. How many litres must be added to fill it?",
            "It holds 50 / 2 = 25 litres.\nSo 50 - 25 = 25 litres must be added.",
            25,
        ),
        (
            "Eve bakes 30 cakes and sells a third of them. How many are left?",
            "She sells 30 / 3 = 10 cakes.\nThat leaves 30 - 10 = 20 cakes.",
            20,
        ),
        (
            "A rope of 100 cm is cut into pieces of 20 cm. How many pieces are there?",
            "There are 100 / 20 = 5 pieces.",
            5,
        ),
    )
]


class Silent:
    """A model of the same name that must not be asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, requests: Sequence[Request]) -> Iterator[Any]:
        raise AssertionError(f"asked for {len(requests)} replies again")


def test_what_is_taken_has_the_right_result_and_the_rest_stays(tmp_path: Any) -> None:
    ask = AskLocal.from_pretrained(small_model(progress=False), batch=12)
    how = SelfDistill(max_new_tokens=96)
    fields = {"prompt_field": "question", "response_field": "answer"}
    found = how.run(ROWS, ask, tmp_path, **fields)
    for row, out, rewrite in zip(ROWS, found.dataset(), found.rewrites, strict=True):
        result = row["answer"].rpartition("#### ")[2]
        assert out["question"] == row["question"]
        if rewrite.accepted:
            assert out["answer"] == rewrite.rewrite
            assert final_number(out["answer"]) == int(result)
            assert re.search(rf"(?<!\d){result}(?!\d)", out["answer"])
            assert rewrite.passed["number"]
        else:
            assert out == row
    # Both occur, as a model this small often loses the thread.
    assert 0.25 <= found.acceptance < 1

    again = how.run(ROWS[::-1], Silent(ask.name), tmp_path, **fields)
    assert again.rewrites == found.rewrites[::-1]
