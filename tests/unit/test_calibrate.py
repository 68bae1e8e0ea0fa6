"""Calibration: what the default threshold means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prune_core.errors import InputError
from rag_prune.context.calibrate import calibrate
from rag_prune.context.evaluate import Task
from rag_prune.context.pruner import DEFAULT_THRESHOLD


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
