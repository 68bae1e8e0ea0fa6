"""The log of a training run: its numbers against numpy, its files, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prune.training_log import TrainingLog, mean, runs
from prune_core.errors import InputError


def by_hand(logits, labels):
    """The four entries of a batch, row by row, from their definitions in float64."""
    found = {"el2n": [], "margin": [], "correct": [], "entropy": []}
    for z, y in zip(np.asarray(logits, float), np.asarray(labels), strict=True):
        p = np.exp(z - z.max())
        p /= p.sum()
        others = [z[c] for c in range(len(z)) if c != y]
        found["el2n"].append(np.sqrt(sum((p[c] - (c == y)) ** 2 for c in range(len(z)))))
        found["margin"].append(z[y] - max(others))
        found["correct"].append(float(z.argmax() == y))
        found["entropy"].append(-sum(q * np.log(q) for q in p if q > 0))
    return found


def test_two_even_logits_by_hand():
    log = TrainingLog(3)
    log.record([2, 0], torch.tensor([[0.0, 0.0], [4.0, 1.0]]), torch.tensor([1, 0]))
    log.end_epoch()
    arrays = log.arrays
    assert arrays["el2n"][0, 2] == pytest.approx(0.5**0.5)  # (−½, ½)
    assert arrays["entropy"][0, 2] == pytest.approx(np.log(2))
    assert arrays["margin"][0].tolist()[::2] == [3, 0]
    assert arrays["correct"][0].tolist()[::2] == [1, 0]  # of equal logits the first is taken
    assert all(np.isnan(values[0, 1]) for values in arrays.values())
    assert all(values.dtype == np.float32 for values in arrays.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 12), st.floats(0.1, 30))
def test_entries_are_those_of_the_definitions(seed, n, classes, scale):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, classes)) * scale).astype(np.float32)
    labels, rows = rng.integers(0, classes, n), rng.permutation(n)
    log = TrainingLog(n)
    log.record(rows, torch.tensor(logits), torch.tensor(labels))
    log.end_epoch()
    for name, values in by_hand(logits, labels).items():
        np.testing.assert_allclose(log.arrays[name][0, rows], values, rtol=1e-4, atol=1e-6)


def test_a_sure_model_has_an_error_that_is_not_rounding():
    log = TrainingLog(1)
    log.record([0], torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    log.end_epoch()
    assert log.arrays["el2n"][0, 0] == pytest.approx(2**0.5 * np.exp(-20), rel=1e-4)


def test_tokens_are_averaged_and_ignored_ones_are_not():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(0, 7, (3, 5))
    labels[0, :2] = labels[2, 1:4] = -100
    labels[1] = -100  # a row that was cut before its response: not seen
    log = TrainingLog(4)
    log.record([1, 2, 3], logits, labels)
    log.end_epoch()
    for row, i in ((1, 0), (3, 2)):
        counted = labels[i] != -100
        for name, values in by_hand(logits[i][counted], labels[i][counted]).items():
            assert log.arrays[name][0, row] == pytest.approx(np.mean(values), rel=1e-5)
    assert np.isnan(log.arrays["el2n"][0, [0, 2]]).all()


def test_low_precision_and_gradients_do_not_matter():
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    log = TrainingLog(4)
    log.record(torch.arange(4), logits, torch.zeros(4, dtype=torch.int32))
    log.end_epoch()
    expected = by_hand(logits.detach().float(), [0] * 4)["margin"]
    np.testing.assert_allclose(log.arrays["margin"][0], expected, rtol=1e-5)


def one_epoch(log, value, rows=None):
    rows = list(range(log.n)) if rows is None else rows
    logits = torch.tensor([[float(value), 0.0]] * len(rows))
    log.record(rows, logits, torch.zeros(len(rows), dtype=torch.int64))
    log.end_epoch()


def test_a_row_that_comes_again_counts_as_it_was_last():
    log = TrainingLog(2)
    log.record([0, 1], torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 0]))
    one_epoch(log, 5, rows=[1])
    assert log.arrays["margin"].tolist() == [[1, 5]]


def test_gradient_norms_of_some_epochs_are_nan_in_the_others():
    log = TrainingLog(2)
    one_epoch(log, 1)
    log.record([1, 0], torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([7.0, 3.0]))
    log.end_epoch()
    norms = log.arrays["gradient_norm"]
    assert np.isnan(norms[0]).all()
    assert norms[1].tolist() == [3, 7]


def test_a_folder_holds_the_same_as_memory_and_a_run_goes_on(tmp_path):
    memory, disk = TrainingLog(3), TrainingLog(3, tmp_path / "log")
    for value in (1, 2):
        one_epoch(memory, value)
        one_epoch(disk, value)
    loaded = TrainingLog.load(tmp_path / "log")
    one_epoch(memory, 3, rows=[0, 2])
    one_epoch(loaded, 3, rows=[0, 2])
    assert (len(memory), len(loaded), len(disk), loaded.n) == (3, 3, 3, 3)
    again = TrainingLog.load(tmp_path / "log").arrays
    for name, values in memory.arrays.items():
        np.testing.assert_array_equal(values, again[name])


@pytest.mark.parametrize("folder", [None, "log"])
def test_rewind_forgets_what_came_after_a_checkpoint(tmp_path, folder):
    log = TrainingLog(2, folder and tmp_path / folder)
    for value in (1, 2, 3):
        one_epoch(log, value)
    log.record([0], torch.tensor([[9.0, 0.0]]), torch.tensor([0]))  # of an epoch that broke off
    log.rewind(1)
    one_epoch(log, 4, rows=[1])
    np.testing.assert_array_equal(log.arrays["margin"], [[1, 1], [np.nan, 4]])
    with pytest.raises(InputError, match="has 2 epochs, so it cannot go on after 3"):
        log.rewind(3)


def test_an_epoch_that_has_not_ended_is_not_there(tmp_path):
    log = TrainingLog(2, tmp_path)
    log.record([0], torch.zeros(1, 2), torch.tensor([0]))
    assert log.arrays == {}
    assert list(tmp_path.iterdir()) == []


def test_a_new_log_does_not_touch_the_epochs_of_another(tmp_path):
    one_epoch(TrainingLog(2, tmp_path), 1)
    with pytest.raises(InputError, match=r"holds 1 epochs .*TrainingLog.load"):
        TrainingLog(2, tmp_path)


def test_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match="There is no training log in"):
        TrainingLog.load(tmp_path)
    log = TrainingLog(2, tmp_path)
    one_epoch(log, 1)
    np.savez(tmp_path / "epoch-000001.npz", el2n=np.zeros(5, np.float32))
    with pytest.raises(InputError, match="are not all of 2 rows"):
        _ = log.arrays
    (tmp_path / "epoch-000001.npz").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"Cannot read .*epoch-000001\.npz"):
        _ = log.arrays
    np.savez(tmp_path / "epoch-000001.npz", el2n=np.array([{}, {}], dtype=object))
    with pytest.raises(InputError, match="Cannot read"):  # objects would need pickle
        _ = log.arrays


TWO = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("rows", "logits", "labels", "says"),
    [
        ([0, 1], torch.zeros(2), torch.zeros(2).long(), r"logits must be \(rows, classes\)"),
        ([0, 1], torch.zeros(2, 1), torch.zeros(2).long(), "the two logits 0 and z"),
        ([0, 1], TWO, torch.zeros(3).long(), r"got \(2, 3\) and \(3,\)"),
        ([0], TWO, torch.tensor([0, 1]), "rows must be a whole number for each of the 2 rows"),
        ([0.0, 1.0], TWO, torch.tensor([0, 1]), "got float64"),
        ([0, 5], TWO, torch.tensor([0, 1]), r"rows must be in \[0, 5\).*got 0 to 5"),
        ([-1, 0], TWO, torch.tensor([0, 1]), "got -1 to 0"),
        ([0, 1], TWO, torch.tensor([0, 3]), r"labels must be in \[0, 3\).*got 0 to 3"),
        ([0, 1], TWO, torch.tensor([0, -100]), "got -100 to 0"),
        ([0, 1], TWO + torch.inf, torch.tensor([0, 1]), "training has diverged"),
        ([0, 1], TWO * torch.nan, torch.tensor([0, 1]), "training has diverged"),
    ],
)
def test_what_does_not_fit_is_refused(rows, logits, labels, says):
    log = TrainingLog(5)
    with pytest.raises(InputError, match=says):
        log.record(rows, logits, labels)
    with pytest.raises(InputError, match="Nothing was recorded"):
        log.end_epoch()


def test_gradient_norms_must_fit():
    for norms in ([1.0], [1.0, np.nan]):
        with pytest.raises(InputError, match="a finite number for each of the 2 rows"):
            TrainingLog(5).record([0, 1], TWO, torch.tensor([0, 1]), norms)
    with pytest.raises(InputError, match=r"n must be the number of rows.*got 0"):
        TrainingLog(0)


def test_runs_are_padded_and_keep_what_all_have():
    long, short = TrainingLog(2), TrainingLog(2)
    for value in (1, 2):
        one_epoch(long, value)
    short.record([0, 1], torch.zeros(2, 2), torch.tensor([0, 0]), [1.0, 1.0])
    short.end_epoch()
    stacked = runs([long, short])
    assert set(stacked) == {"el2n", "margin", "correct", "entropy"}
    np.testing.assert_array_equal(stacked["margin"], [[[1, 1], [2, 2]], [[0, 0], [np.nan, np.nan]]])
    for logs in ([], [long, TrainingLog(3)]):
        with pytest.raises(InputError, match="must be of one data set"):
            runs(logs)


def test_mean_skips_nan():
    values = np.array([[1, np.nan, np.nan], [3, 5, np.nan]], np.float32)
    np.testing.assert_array_equal(mean(values, axis=0), [2, 5, np.nan])
