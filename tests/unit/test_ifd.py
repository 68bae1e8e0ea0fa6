"""IFD by hand, from losses that are made up; and that a model is asked only once."""

import dataclasses
import random

import numpy as np
import pytest

from data_prune.choose import choose
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.ifd import IFD
from data_prune.rows import Columns, read, rows_of
from prune_core.errors import InputError

LOSSES = {  # after the prompt, alone
    "a": (1.0, 2.0),  # 0.5
    "b": (1.8, 2.0),  # 0.9
    "c": (2.0, 2.0),  # 1: neither helps nor harms, may stay
    "d": (2.2, 2.0),  # 1.1: barred
    "e": (0.0, 3.0),  # 0: wholly foretold
    "f": (np.nan, 2.0),
    "g": (1.0, 0.0),  # nothing to divide by
    "h": (np.inf, 2.0),
}


class Fake:
    """Losses by response; notes what it is asked. With a fingerprint, if told to be known again."""

    def __init__(self, known=None, stop_after=None):
        self.asked, self.stop_after = [], stop_after
        if known:
            self.fingerprint = {"model": known}

    def __call__(self, prompts, responses):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += zip(prompts, responses, strict=True)
        return np.array([LOSSES[response[0]] for response in responses])


def rows(responses):
    source = read([{"prompt": f"say {r}", "completion": r} for r in responses])
    return rows_of(source, Columns().found(source.names))


def given(responses="abcdefgh", losses=None, **fields):
    return Given(rows=rows(responses), keep=2, losses=losses or Fake(), **fields)


def kept(about, keep):
    found = choose(IFD().rank(IFD().score(about), keep), keep, about.draws("ties"))
    return {about.rows.responses[i] for i in np.flatnonzero(found)}


# ------------------------------------------------------------------ the number
def test_it_is_the_ratio_of_the_losses():
    about = given()
    columns = IFD().score(about)
    found = dict(zip(about.rows.responses, columns["ifd"], strict=True))
    assert found["a"] == 0.5
    assert found["b"] == pytest.approx(0.9)  # losses are kept as float32
    assert found["c"] == 1
    assert found["d"] == pytest.approx(1.1)
    assert found["e"] == 0
    assert all(np.isnan(found[r]) for r in "fgh")


def test_the_hardest_are_kept_that_the_prompt_helps():
    assert kept(given(), 1) == {"c"}
    assert kept(given(), 2) == {"b", "c"}
    assert kept(given(), 4) == {"a", "b", "c", "e"}


def test_too_few_are_all_that_may_stay():
    assert kept(given(), 8) == {"a", "b", "c", "e"}
    ranking = IFD().rank(IFD().score(given("ad")), 2)
    assert list(ranking.barred.values()) == ["its prompt does not help: IFD 1.100 is above 1"]


def test_an_array_is_taken_in_the_order_of_the_rows():
    about = given("abd")
    array = np.array([LOSSES[r] for r in about.rows.responses])
    columns = IFD().score(dataclasses.replace(about, losses=array))
    assert (columns["ifd"] == array[:, 0] / array[:, 1]).all()
    assert (columns["after_prompt"] == array[:, 0]).all()
    assert (columns["alone"] == array[:, 1]).all()


def test_every_row_is_described():
    about = given()
    columns = IFD().score(about)
    found = {r: IFD().describe(columns, i) for i, r in enumerate(about.rows.responses)}
    assert found["a"] == "IFD 0.500: loss 1.000 after its prompt, 2.000 alone"
    for row in "fgh":
        assert found[row] == "no IFD: one of its losses is missing or not above 0"


# ------------------------------------------------------------------ the contract
def test_the_same_rows_whatever_the_order_and_the_workers():
    responses = [f"{'abcde'[i % 5]}{i}" for i in range(400)]
    shuffled = random.Random(0).sample(responses, 400)
    for keep in (1, 37, 200):
        one = kept(given(responses, engine=Local(1)), keep)
        assert len(one) == keep
        assert one == kept(given(shuffled, engine=Local(3)), keep)


def test_the_prompt_is_what_the_row_has():
    fake = Fake()
    IFD().score(given("ab", fake))
    assert sorted(fake.asked) == [("say a", "a"), ("say b", "b")]


# ------------------------------------------------------------------ the cache
def test_more_rows_ask_only_for_the_new_ones(tmp_path):
    first, second = Fake("m"), Fake("m")
    before = IFD().score(given("abc", first, cache=tmp_path))
    about = given("abcde", second, cache=tmp_path)
    after = IFD().score(about)
    assert sorted(r for _, r in second.asked) == ["d", "e"]
    again = [about.rows.responses.index(r) for r in rows("abc").responses]
    assert (after["ifd"][again] == before["ifd"]).all()


def test_a_run_that_was_stopped_goes_on(tmp_path):
    responses = [f"a{i}" for i in range(300)]
    first, second = Fake("m", stop_after=128), Fake("m")
    with pytest.raises(KeyboardInterrupt):
        IFD().score(given(responses, first, cache=tmp_path, engine=Local(1)))
    IFD().score(given(responses, second, cache=tmp_path, engine=Local(1)))
    assert sorted(first.asked + second.asked) == sorted((f"say {r}", r) for r in responses)


def test_another_model_is_asked_anew(tmp_path):
    IFD().score(given("ab", Fake("m"), cache=tmp_path))
    other, unknown = Fake("n"), Fake()
    IFD().score(given("ab", other, cache=tmp_path))
    IFD().score(given("ab", unknown, cache=tmp_path))
    assert len(other.asked) == len(unknown.asked) == 2
    assert len(list(tmp_path.iterdir())) == 2  # what has no fingerprint leaves nothing


def test_pairs_that_read_alike_are_two(tmp_path):
    # Joined they are the same text.
    source = read([{"prompt": "x 1", "completion": "a"}, {"prompt": "x", "completion": "b 1a"}])
    both = rows_of(source, Columns().found(source.names))
    fake = Fake("m")
    IFD().score(Given(rows=both, keep=1, losses=fake, cache=tmp_path))
    assert len(fake.asked) == 2


# ------------------------------------------------------------------ bad input
def test_without_losses_it_says_what_to_pass():
    with pytest.raises(InputError, match=r"'ifd' needs losses=, a callable of prompts"):
        IFD().score(dataclasses.replace(given(), losses=None))


def test_rows_of_one_text_are_refused():
    source = read(["a", "b"])
    about = Given(rows=rows_of(source, Columns().found(source.names)), keep=1, losses=Fake())
    with pytest.raises(InputError, match=r"needs rows of prompt and response, but these are of"):
        IFD().score(about)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.ones(2), r"of the shape \(2, 2\), after the prompt and alone .*, got \(2,\) of type"),
        (np.ones((3, 2)), r"got \(3, 2\) of type float64"),
        (np.array([["a", "b"]] * 2), r"got \(2, 2\) of type <U1"),
        (np.array([[1.0, -2.0], [1.0, 2.0]]), r"cannot be below 0, got -2.0: are these log-like"),
    ],
)
@pytest.mark.parametrize("called", [False, True])
def test_losses_that_are_none_are_refused(losses, message, called, tmp_path):
    ask = (lambda prompts, responses: losses) if called else losses
    with pytest.raises(InputError, match=message):
        IFD().score(Given(rows=rows("ab"), keep=1, losses=ask, cache=tmp_path))
