"""Metrics that read a training log, against their papers' formulas and their authors' code."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from data_prune import select
from data_prune.choose import choose
from data_prune.metric import Given
from data_prune.metrics.aum import AUM
from data_prune.metrics.ccs import CCS
from data_prune.metrics.el2n import EL2N
from data_prune.metrics.entropy import Entropy
from data_prune.metrics.forgetting import Forgetting
from data_prune.metrics.grand import GraNd, gradient_norms
from data_prune.metrics.imported import Imported
from data_prune.metrics.prototypes import Prototypes
from data_prune.metrics.random import Random
from data_prune.rows import Columns, read, rows_of
from data_prune.training_log import TrainingLog, early, recorded, runs
from prune_core.errors import InputError
from prune_core.recipe import parse_recipe

NAN = np.nan


def given_log(log, order=None, **fields):
    """Rows in an order of the input, with the arrays of `log` (of the rows 0, 1, …) as theirs."""
    n = np.asarray(next(iter((log or {"": np.ones(4)}).values()))).shape[-1]
    order = np.arange(n) if order is None else order
    source = read([{"text": f"row {i}"} for i in order])
    rows = rows_of(source, Columns().found(source.names))
    if log is not None:
        log = {name: np.asarray(v)[..., order[rows.positions]] for name, v in log.items()}
    return Given(rows=rows, keep=1, log=log, **fields)


def by_input(given, values):
    """Of values in the rows' order: in the input's."""
    out = np.empty_like(values)
    out[given.rows.positions] = values
    return out


def kept_by(metric, given, keep):
    """(n,) in the rows' order, and the ranking."""
    ranking = metric.rank(metric.score(given), keep)
    return choose(ranking, keep, given.draws("ties")), ranking


def difficulty(metric, log):
    given = given_log(log)
    return by_input(given, metric.difficulty(given))


def random_log(seed, epochs=6, n=40, classes=4, count=3):
    """Logits of random runs and the log of them: (runs, epochs, n, classes), labels, arrays."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((count, epochs, n, classes))).astype(np.float32)
    labels = rng.integers(0, classes, n)
    logs = []
    for run in logits:
        log = TrainingLog(n)
        for epoch in run:
            log.record(range(n), torch.tensor(epoch), torch.tensor(labels))
            log.end_epoch()
        logs.append(log)
    return logits.astype(float), labels, runs(logs)


def softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


# -------------------------------------------------------------------------------- reading a log


def test_reading_a_log_says_what_is_wrong():
    def of(log):
        return dataclasses.replace(given_log(None), log=log)

    assert recorded(of({"el2n": np.ones((2, 4))}), "el2n", "m").shape == (1, 2, 4)
    assert recorded(of({"el2n": np.ones((3, 2, 4))}), "el2n", "m").shape == (3, 2, 4)
    with pytest.raises(InputError, match="'m' needs log=, what a TrainingLog recorded"):
        recorded(of(None), "el2n", "m")
    with pytest.raises(InputError, match="needs 'el2n' in the log, which has margin, entropy"):
        recorded(of({"margin": np.ones((1, 4)), "entropy": np.ones((1, 4))}), "el2n", "m")
    for wrong in (np.ones(4), np.ones((2, 3)), np.ones((0, 4))):
        with pytest.raises(InputError, match=r"must be \(epochs, 4\) or \(runs, epochs, 4\)"):
            recorded(of({"el2n": wrong}), "el2n", "m")
    with pytest.raises(InputError, match="holds infinity"):
        recorded(of({"el2n": np.full((1, 4), np.inf)}), "el2n", "m")


def test_early_is_the_twentieth_epoch_or_the_last():
    for epochs, found in ((3, 3), (20, 20), (50, 20)):
        given = given_log({"el2n": np.arange(1, epochs + 1)[:, None] * np.ones(4)})
        assert early(given, "el2n", "m", None).tolist() == [found] * 4
        assert early(given, "el2n", "m", 2).tolist() == [2] * 4
    with pytest.raises(InputError, match="epoch is 4, but the log has 3"):
        early(given_log({"el2n": np.ones((3, 4))}), "el2n", "m", 4)


# ------------------------------------------------------------------------------- the formulas


def test_el2n_is_the_mean_error_norm_of_the_runs_at_one_epoch():
    logits, labels, log = random_log(0)
    for epoch, at in ((2, 1), (None, 5)):
        error = np.linalg.norm(softmax(logits[:, at]) - np.eye(4)[labels], axis=-1).mean(axis=0)
        np.testing.assert_allclose(difficulty(EL2N(epoch=epoch), log), error, rtol=1e-5)
    log["el2n"][0, 1, 0] = log["el2n"][:, 1, 1] = NAN  # not seen in one run, in none
    found = difficulty(EL2N(epoch=2), log)
    assert found[0] == pytest.approx(log["el2n"][1:, 1, 0].mean())
    assert np.isnan(found[1])


def test_aum_is_what_a_running_sum_over_batches_gives():
    logits, labels, log = random_log(1)
    log["margin"][0, 2, 5] = log["margin"][:, :, 7] = NAN
    for epochs in (None, 3):
        means = []
        for run in range(3):
            total, count = np.zeros(40), np.zeros(40)
            for epoch in range(epochs or 6):
                for i in range(40):
                    if np.isnan(log["margin"][run, epoch, i]):
                        continue
                    z = logits[run, epoch, i]
                    total[i] += z[labels[i]] - np.delete(z, labels[i]).max()
                    count[i] += 1
            with np.errstate(invalid="ignore"):
                means.append(total / count)
        found = difficulty(AUM(epochs=epochs), log)
        np.testing.assert_allclose(found, -np.mean(means, axis=0), rtol=1e-5, atol=1e-6)
    given = given_log(log)
    at = given.rows.positions.tolist().index(0)
    assert AUM().describe(AUM().score(given), at) == (
        f"area under the margin {-difficulty(AUM(), log)[0]:.3g}"
    )


def test_forgetting_by_hand():
    correct = np.array(
        [
            # learned once; forgotten twice; never learned; late; not seen in between; never seen
            [0, 1, 0, 0, 1, NAN],
            [1, 0, 0, 0, NAN, NAN],
            [1, 1, 0, 0, 0, NAN],
            [1, 0, 0, 1, 1, NAN],
        ]
    )
    assert difficulty(Forgetting(), {"correct": correct})[:5].tolist() == [0, 2, 4, 0, 1]
    assert np.isnan(difficulty(Forgetting(), {"correct": correct})[5])


def test_forgetting_is_what_the_authors_count():
    """Transitions of −1, the number of epochs where none is right; a shorter run counts its own."""
    rng = np.random.default_rng(0)
    correct = (rng.random((3, 8, 60)) < rng.random(60) ** 2).astype(np.float32)
    correct[2, 5:] = NAN
    total = np.zeros(60)
    for run, epochs in zip(correct, (8, 8, 5), strict=True):
        for i in range(60):
            seen = run[:epochs, i]
            never = not (seen == 1).any()
            total[i] += epochs if never else np.sum(seen[1:] - seen[:-1] == -1)
    np.testing.assert_allclose(difficulty(Forgetting(), {"correct": correct}), total / 3)
    assert (total > 0).any()
    assert (total == 0).any()


def test_forgetting_is_not_of_tokens():
    with pytest.raises(InputError, match="whose 'correct' is 0 or 1"):
        difficulty(Forgetting(), {"correct": np.full((2, 4), 0.5)})


def test_entropy_is_of_the_last_time_a_row_was_seen():
    logits, _, log = random_log(2)
    log["entropy"][:, 4:, 3] = log["entropy"][1, 5, 6] = log["entropy"][:, :, 9] = NAN
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum(axis=-1)
    expected = entropy[:, -1].mean(axis=0)
    expected[3] = entropy[:, 3, 3].mean()
    expected[6] = (entropy[0, 5, 6] + entropy[1, 4, 6] + entropy[2, 5, 6]) / 3
    expected[9] = NAN
    np.testing.assert_allclose(difficulty(Entropy(), log), expected, rtol=1e-4)


class Frozen(nn.Module):
    """Two layers and batch norm; the first layer's bias does not train."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_gradient_norms_are_those_of_a_loop_over_rows():
    torch.manual_seed(0)
    model = Frozen()
    inputs, labels = torch.randn(9, 5), torch.randint(0, 3, (9,))
    model(inputs)  # moves the running statistics
    model.eval()
    expected = []
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
        expected.append(torch.stack(squares).sum().sqrt())
    model.zero_grad()
    for at_once in (None, 2):
        found = gradient_norms(
            model, lambda m, x, y: cross_entropy(m(x), y), inputs, labels, at_once=at_once
        )
        torch.testing.assert_close(found, torch.stack(expected))
        assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match=r"call model\.eval"):
        gradient_norms(model.train(), lambda m, x, y: cross_entropy(m(x), y), inputs, labels)
    with pytest.raises(InputError, match="with 0 of them"):
        gradient_norms(nn.ReLU().eval(), lambda m, x: m(x).sum(), inputs)


def test_grand_is_the_mean_norm_of_the_runs():
    norms = np.array([[[1, 4], [2, 8]], [[3, 6], [4, NAN]]])
    assert difficulty(GraNd(epoch=1), {"gradient_norm": norms}).tolist() == [2, 5]
    assert difficulty(GraNd(), {"gradient_norm": norms}).tolist() == [3, 8]


# ------------------------------------------------------------------------- what all metrics do

METRICS = [EL2N, GraNd, Forgetting, AUM, Entropy, CCS]


@pytest.mark.parametrize("kind", METRICS)
def test_the_same_rows_stay_whatever_the_order_of_the_input(kind):
    _, _, log = random_log(3)
    log["gradient_norm"] = log["el2n"] * 2
    log["el2n"][:, :, 4] = log["margin"][:, :, 4] = NAN
    kept, told = [], []
    for order in (np.arange(40), np.random.default_rng(0).permutation(40)):
        given, metric = given_log(log, order), kind()
        columns = metric.score(given)
        rows, _ = kept_by(metric, given, 10)
        assert rows.sum() == 10
        kept.append({int(order[i]) for i in given.rows.positions[rows]})
        told.append([metric.describe(columns, i) for i in range(40)])
    assert kept[0] == kept[1]
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", METRICS)
def test_settings_are_checked_and_frozen(kind):
    metric = kind()
    assert pickle.loads(pickle.dumps(metric)) == dataclasses.replace(metric) == metric
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "other"
    if kind is not CCS:
        with pytest.raises(InputError, match="keep must be 'hard' or 'easy'"):
            kind(keep="most")
    for setting in {"epoch", "epochs"} & {f.name for f in dataclasses.fields(kind)}:
        for wrong in (0, 1.5, True):
            with pytest.raises(InputError, match=rf"{setting} must be a whole number >= 1.*got"):
                kind(**{setting: wrong})


@pytest.mark.parametrize("kind", [EL2N, AUM])
def test_hard_and_easy_are_the_two_ends(kind):
    _, _, log = random_log(4)
    given = given_log(log)
    difficulties = kind().difficulty(given)
    hard, easy = (kept_by(kind(keep=keep), given, 8)[0] for keep in ("hard", "easy"))
    assert difficulties[hard].min() > difficulties[~hard].max()
    assert difficulties[easy].max() < difficulties[~easy].min()


def test_imported_scores_are_kept_from_the_highest():
    given = given_log({"x": np.ones((1, 5))}, scores=np.array([3, NAN, 1, 9, 2]))
    assert kept_by(Imported(), given, 2)[0].tolist() == [True, False, False, True, False]
    assert kept_by(Imported(), given, 5)[0].sum() == 4  # NaN is never kept
    assert Imported().describe(Imported().score(given), 3) == "score 9"
    for wrong, says in (
        (None, "needs scores=, a number a row, higher for rows to keep"),
        (np.ones(4), r"for each of the 5 rows.*got float64 of shape \(4,\)"),
        (np.array(["a"] * 5), "got <U1"),
        (np.array([1, -np.inf, 0, 0, 0]), "got -inf for 1 rows"),
    ):
        with pytest.raises(InputError, match=says):
            Imported().score(dataclasses.replace(given, scores=wrong))


def test_select_takes_a_log_of_one_run_or_of_several():
    names = [f"row {i}" for i in range(5)]
    logs = [TrainingLog(5), TrainingLog(5)]
    for log, scale in zip(logs, (1, -3), strict=True):
        logits = torch.tensor([[scale * float(i), 0.0] for i in range(5)])
        log.record(range(5), logits, torch.zeros(5, dtype=torch.int64))
        log.end_epoch()
    for log, kept in ((logs[0], [0, 1]), (runs(logs), [3, 4])):
        assert select(names, metric=AUM(), budget=2, log=log).indices.tolist() == kept
    found = select(names, metric=CCS(cutoff=0.4), budget=3, log=logs[0])
    assert found.indices.tolist() == [2, 3, 4]
    assert found.reasons[0].startswith(
        "dropped: among the hardest 40%; area under the margin 0, lot"
    )
    with pytest.raises(InputError, match=r"\(epochs, rows\) or \(runs, epochs, rows\) for 4 rows"):
        select(names[:4], metric=AUM(), budget=2, log=logs[0])


# ----------------------------------------------------------------------------------------- CCS


def authors_budgets(sizes, total):
    """Rows of each stratum, smallest first: what is left over the strata that are left."""
    order, budgets = np.argsort(sizes, kind="stable"), np.zeros(len(sizes), dtype=int)
    for place, stratum in enumerate(order):
        budgets[stratum] = min(sizes[stratum], total // (len(sizes) - place))
        total -= budgets[stratum]
    return budgets


def ccs(values, keep, **settings):
    """Kept rows (n,) and the ranking, of rows whose difficulty is `values`, by input."""
    given = given_log({"margin": -np.asarray(values)[None]})
    kept, ranking = kept_by(CCS(**settings), given, keep)
    return by_input(given, kept), ranking, given


def test_ccs_by_hand():
    # The hardest two go; of [0, 8) in two strata the upper one has two rows and stays whole.
    values = [0, 1, 1.5, 2, 2.5, 3, 3.5, 3.9, 5, 8, 50, 99]
    kept, ranking, given = ccs(values, 6, strata=2, cutoff=1 / 6)
    assert kept[[8, 9]].all()
    assert not kept[[10, 11]].any()
    assert kept.sum() == 6
    assert set(given.rows.positions[list(ranking.barred)]) == {10, 11}
    assert set(ranking.barred.values()) == {"among the hardest 17%"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 150), st.floats(0.02, 1), st.floats(0, 0.9))
def test_ccs_counts_are_those_of_the_authors_loop(seed, n, share, cutoff):
    values = np.random.default_rng(seed).gamma(1.0, 3.0, n).astype(np.float32)
    keep = max(1, int(share * n))
    kept, ranking, _ = ccs(values, keep, cutoff=cutoff, strata=20)
    out = min(round(cutoff * n), n - keep)
    rest = np.sort(values)[: n - out]
    assert kept.sum() == keep
    assert len(ranking.barred) == out
    assert values[kept].max() <= rest.max()
    edges = np.linspace(float(rest.min()), float(rest.max()), 21)
    if len(rest) == 1 or np.abs(rest[:, None] - edges[1:-1]).min() < 1e-5:
        return  # a row on an edge may be on either side of it
    sizes, counts = np.histogram(rest, edges)[0], np.histogram(values[kept], edges)[0]
    expected = authors_budgets(sizes, keep)
    # Of strata that are equally large it is open which one gets the row that is left over.
    assert sorted(zip(sizes, counts, strict=True)) == sorted(zip(sizes, expected, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.0, NAN]), min_size=4, max_size=30), st.data())
def test_ccs_spends_any_budget_on_rows_that_were_scored(values, data):
    values = np.array(values)
    fit = int(np.isfinite(values).sum())
    keep = data.draw(st.integers(1, max(1, fit)))
    kept, _, _ = ccs(values, keep)
    assert kept.sum() == min(keep, fit)
    assert np.isfinite(values[kept]).all()


@pytest.mark.parametrize(("keep", "out"), [(50, 300), (100, 300), (200, 225), (400, 75), (500, 0)])
def test_the_default_cutoff_falls_as_more_rows_stay(keep, out):
    values = np.random.default_rng(0).random(1000)
    assert len(ccs(values, keep)[1].barred) == out


def test_which_end_the_base_keeps_does_not_matter():
    _, _, log = random_log(5)
    given = given_log(log)
    kept = [
        kept_by(CCS(base=EL2N(keep=keep), cutoff=0.3), given, 12)[0] for keep in ("hard", "easy")
    ]
    np.testing.assert_array_equal(*kept)
    assert EL2N().difficulty(given)[kept[0]].max() < np.sort(EL2N().difficulty(given))[-11]


def test_ccs_looks_at_what_its_base_looks_at():
    assert CCS().embeds is None
    assert CCS(base=Prototypes()).embeds == "text"
    assert CCS(base="prototypes") == CCS(base=Prototypes())
    assert parse_recipe({"base": "prototypes"}, CCS).embeds == "text"
    assert "lot" in CCS(base=Prototypes()).describe(
        {"distance": np.ones(1), "cluster": np.zeros(1, int), "draw": np.ones(1)}, 0
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base": Random()}, "base must be a metric that can keep hard or easy rows"),
        ({"base": 3}, "base must be a metric.*got 3"),
        ({"base": "prototype"}, "Did you mean 'prototypes'"),
        ({"strata": 0}, "strata must be a whole number >= 1, got 0"),
        ({"cutoff": 1.0}, r"cutoff must be in \[0, 1\)"),
    ],
)
def test_ccs_settings_are_checked(settings, says):
    with pytest.raises(InputError, match=says):
        CCS(**settings)
