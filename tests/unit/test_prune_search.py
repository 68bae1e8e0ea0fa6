"""Levels that move under an exact total, and a search that never loses what it found."""

import numpy as np
import pytest
import torch

from model_prune.core.search import Evolution, Levels
from model_prune.core.work import Work
from prune_core.errors import InputError

KINDS = ["a", "b", "a", "b", "a", "c"]
SPACE = Levels(KINDS, low=[0] * 6, high=[4, 2, 3, 2, 4, 5])
START = (2, 1, 1, 1, 0, 3)
GOAL = (0, 2, 0, 0, 3, 3)  # of the same total, by kind


def totals(candidate):
    return {k: sum(x for x, kind in zip(candidate, KINDS, strict=True) if kind == k) for k in KINDS}


class Distance:
    """How far candidates are from GOAL, and what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, candidates, tokens, random):
        self.asked.append((len(candidates), tokens))
        return [float(np.abs(np.subtract(c, GOAL)).sum()) for c in candidates]


def evolution(**changes):
    settings = {"generations": 12, "offspring": 8, "survivors": (3, 1), "tokens": (10, 20)}
    return Evolution(**{**settings, **changes})


def test_mutations_keep_every_total_and_bound():
    seen = set()
    for seed in range(300):
        child = SPACE.mutated(START, np.random.default_rng(seed))
        assert totals(child) == totals(START)
        assert all(0 <= x <= high for x, high in zip(child, SPACE.high, strict=True))
        seen.add(child)
    assert len(seen) > 20
    assert all(child[5] == 3 for child in seen)  # which is the only one of its kind


def test_where_nothing_can_move_there_is_no_mutation():
    full = Levels(["a", "a", "b"], low=[0, 0, 0], high=[2, 2, 9])
    assert full.mutated((2, 2, 4), np.random.default_rng(0)) is None
    assert full.mutated((0, 0, 4), np.random.default_rng(0)) is None
    judge = Distance()
    alone = evolution(survivors=(1,), tokens=(5,))
    apart = Levels(list("abcdef"), low=[0] * 6, high=[9] * 6)
    start = (2, 2, 4, 0, 0, 0)
    assert alone.best(start, apart, judge, Work(), progress=False) == start
    assert set(judge.asked) == {(1, 5)}


def test_the_goal_is_found():
    found = evolution(generations=30).best(START, SPACE, Distance(), Work(), progress=False)
    assert found == GOAL


def test_no_generation_is_worse_than_the_one_before():
    work, judge = Work(), Distance()
    evolution().best(START, SPACE, judge, work, progress=False)
    values = [judge([tuple(work[g]["parent"].tolist())], 0, None)[0] for g in range(12)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_a_generation_can_be_worse_by_a_judge_that_is_noisy_but_not_by_the_last_round():
    """The parent is judged beside its offspring's survivors, by the same tokens."""

    def noisy(candidates, tokens, random):
        shift = random.normal()
        return [shift + float(np.abs(np.subtract(c, GOAL)).sum()) for c in candidates]

    work = Work()
    evolution().best(START, SPACE, noisy, work, progress=False)
    before = START
    for g in range(12):
        last = work[g]["tokens"] == 20
        candidates = [tuple(c) for c in work[g]["candidates"][last].tolist()]
        values = work[g]["fitness"][last]
        assert before in candidates
        before = tuple(work[g]["parent"].tolist())
        assert before == candidates[int(values.argmin())]


def test_rounds_narrow_and_every_candidate_is_kept():
    work, judge = Work(), Distance()
    evolution(generations=2).best(START, SPACE, judge, work, progress=False)
    assert judge.asked == [(8, 10), (4, 20)] * 2
    for g in range(2):
        assert work[g]["candidates"].shape == (12, 6)
        assert work[g]["tokens"].tolist() == [10] * 8 + [20] * 4
        first = [tuple(c) for c in work[g]["candidates"][:8].tolist()]
        assert len(set(first)) == 8  # no child twice


def test_a_stopped_search_goes_on_with_the_same_end(tmp_path):
    whole = Work()
    expected = evolution().best(START, SPACE, Distance(), whole, progress=False)

    def breaks(candidates, tokens, random):
        if len(list(tmp_path.glob("layer-*"))) == 5:
            raise KeyboardInterrupt
        return Distance()(candidates, tokens, random)

    with pytest.raises(KeyboardInterrupt):
        evolution().best(START, SPACE, breaks, Work(tmp_path), progress=False)
    judge, work = Distance(), Work(tmp_path)
    assert evolution().best(START, SPACE, judge, work, progress=False) == expected
    assert len(judge.asked) == 2 * (12 - 5)
    for g in range(12):
        assert all(torch.equal(work[g][key], whole[g][key]) for key in whole[g])


def test_seeds_search_elsewhere():
    found = []
    for seed in (0, 0, 1):
        work = Work()
        evolution(seed=seed).best(START, SPACE, Distance(), work, progress=False)
        found.append(work[0]["candidates"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"survivors": (3,)}, "got 1 and 2 numbers"),
        ({"survivors": (), "tokens": ()}, "got 0 and 0 numbers"),
        ({"survivors": (3, 2)}, "end survivors with 1"),
        ({"tokens": (0, 20)}, "must be at least 1"),
        ({"offspring": 0}, "offspring must be at least 1"),
        ({"generations": -1}, "generations must be at least 0"),
    ],
)
def test_bad_settings(bad, words):
    with pytest.raises(InputError, match=words):
        evolution(**bad)
