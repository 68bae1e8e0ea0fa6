"""Orders in which units go, versions of layers, and how far models made of them are."""

import copy
import itertools

import numpy as np
import pytest
import torch

from model_prune import load_method
from model_prune.core import versions as module
from model_prune.core.calibration import Calibration
from model_prune.core.compensate import least_squares, removal_order
from model_prune.core.decoder import Decoder
from model_prune.core.target import UNITS
from model_prune.core.units import READER, places
from model_prune.core.versions import Divergence, Versions
from model_prune.core.work import Work
from tiny_decoders import LAYERS, dims_of, random_windows, roomy_decoder

WINDOWS = random_windows(8, 12)
TINY = (1e-7,)


@pytest.fixture(scope="module")
def llama():
    return roomy_decoder("llama")


def problem(columns=12, out=5, seed=0):
    """Correlated inputs [200, columns] and weights [out, columns]."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    x = torch.randn(200, columns, generator=draw) @ mixed
    return x, torch.randn(out, columns, generator=draw)


def loss(x, weight, gone):
    """Of the best refit without some columns, by numpy in double precision."""
    kept = [j for j in range(weight.shape[1]) if j not in gone]
    x, weight = x.double().numpy(), weight.double().numpy()
    target = x @ weight.T
    fit = x[:, kept] @ np.linalg.lstsq(x[:, kept], target, rcond=None)[0]
    return float(((target - fit) ** 2).sum())


def slow_order(x, weight, size, at_once):
    """Each step those groups go without which, one at a time, the best refit is least worse."""
    left, gone, order = list(range(weight.shape[1] // size)), set(), []

    def columns(group):
        return set(range(group * size, (group + 1) * size))

    while len(left) > at_once:
        costs = [loss(x, weight, gone | columns(group)) for group in left]
        taken = [left[i] for i in np.argsort(costs, kind="stable")[:at_once]]
        order += taken
        left = [group for group in left if group not in taken]
        gone |= set().union(*map(columns, taken))
    return order + left


# ------------------------------------------------------------------ the order
@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_those_go_without_which_the_best_refit_loses_least(size, at_once, seed):
    x, weight = problem(seed=seed)
    found = removal_order(weight, x.T @ x, 12 // size, at_once=at_once, damping=TINY)
    assert found.tolist() == slow_order(x, weight, size, at_once)


def test_greedy_is_near_the_best_subset_and_the_codes_extra_term_is_not_better():
    """Regression: the authors' code adds W·(HW), which is no part of the rise of the error."""
    times = {False: [], True: []}
    for seed in range(20):
        x, weight = problem(10, seed=seed)
        best = min(loss(x, weight, set(gone)) for gone in itertools.combinations(range(10), 5))
        for gradient, found in times.items():
            order = removal_order(weight, x.T @ x, 10, gradient=gradient, damping=TINY)
            found.append(loss(x, weight, set(order[:5].tolist())) / best)
    assert np.mean(times[False]) < 1.15
    assert np.mean(times[False]) < np.mean(times[True])


@pytest.mark.parametrize("size", [1, 3])
def test_the_codes_score_is_what_its_name_says(size):
    x, weight = problem()
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse, slope = gram.inverse(), gram @ weight.T
    costs = []
    for first in range(0, 12, size):
        own = slice(first, first + size)
        w = weight.T[own]
        costs.append(float((w * (inverse[own, own].inverse() @ w / 2 + slope[own])).sum()))
    found = removal_order(weight, x.T @ x, 12 // size, gradient=True)
    assert found[0] == int(np.argmin(costs))


def test_every_unit_is_in_the_order_once_and_dead_ones_go_first():
    x, weight = problem()
    x[:, [3, 7]] = 0
    for at_once in (1, 2, 5, 12, 20):
        order = removal_order(weight, x.T @ x, 12, at_once=at_once)
        assert sorted(order.tolist()) == list(range(12))
    assert set(removal_order(weight, x.T @ x, 12)[:2].tolist()) == {3, 7}


def test_what_is_given_stays_as_it_is():
    x, weight = problem()
    gram, before = x.T @ x, weight.clone()
    kept = gram.clone()
    removal_order(weight, gram, 6, gradient=True)
    assert torch.equal(weight, before)
    assert torch.equal(gram, kept)


# ------------------------------------------------------------------ versions
def offers(neurons=(0, 24, 48), groups=(0, 1)):
    kinds = {"neuron": neurons, "kv_group": groups}
    return {(i, family): list(kinds[family]) for i in range(LAYERS) for family in UNITS}


def made(model, offered=None, work=None, **settings):
    settings = {"gradient": False, "lasting": False} | settings
    versions = Versions(Decoder.of(model), offered or offers(), work or Work(), **settings)
    versions.make(Calibration(WINDOWS), progress=False)
    return versions


def inputs_of(model, i):
    """Of the readers of layer `i`, by family: [tokens, in]."""
    found = {}
    handles = [
        model.model.layers[i]
        .get_submodule(READER[family])
        .register_forward_pre_hook(
            lambda _, x, family=family: found.update({family: x[0].flatten(0, 1)})
        )
        for family in UNITS
    ]
    with torch.no_grad():
        model(WINDOWS)
    for handle in handles:
        handle.remove()
    return found


def test_a_version_is_the_refit_to_inputs_that_averages_before_it_give(llama):
    versions, model, dims = made(llama), copy.deepcopy(llama), dims_of(llama)
    for i in range(LAYERS):
        inputs, plans = inputs_of(model, i), []
        for count, groups in ((24, 1), (48, 0)):
            removed = {(i, "neuron"): count, (i, "kv_group"): groups}
            plans.append(versions.plan(i, removed))
        assert "kv_group" not in plans[1].units
        expected = {}
        for family in UNITS:
            reader = READER[family]
            linear = model.model.layers[i].get_submodule(reader)
            weight, x = linear.weight.detach(), inputs[family]
            total, mean = 0.0, torch.zeros_like(weight)
            for removed in offers()[i, family]:
                share, version = 1 - removed / dims[i].count(family), weight
                if removed:
                    plan = versions.plan(i, {(i, f): removed if f == family else 0 for f in UNITS})
                    columns = places(family, reader, dims[i], plan.units[family])
                    version = plan.weights[reader]
                    refit = least_squares(weight, x.T @ x, columns)
                    torch.testing.assert_close(version, refit, rtol=1e-3, atol=1e-4)
                mean += share * version
                total += share
            expected[linear] = mean / total
        for linear, weight in expected.items():
            linear.weight.data.copy_(weight)


def test_versions_contain_each_other(llama):
    versions = made(llama)
    for i in range(LAYERS):
        few, many = (
            set(versions.plan(i, {(i, "neuron"): n, (i, "kv_group"): 0}).units["neuron"].tolist())
            for n in (48, 24)
        )
        assert few < many


# ------------------------------------------------------------------ divergence
def drawn(seed=0):
    random = np.random.default_rng(seed)
    return {part: int(random.choice(counts)) for part, counts in offers().items()}


def applied(model, versions, removed):
    from model_prune.decoders import apply_in_place

    plans = [versions.plan(i, removed) for i in range(LAYERS)]
    return apply_in_place(copy.deepcopy(model), plans)


@torch.no_grad()
def direct(dense, model, ids, top):
    expected, found = dense(ids).logits, model(ids).logits
    likely = expected.topk(top)
    p = likely.values.log_softmax(-1)
    q = found.gather(-1, likely.indices).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("top", [96, 10, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_divergence_is_that_of_the_models(family, top):
    model = roomy_decoder(family)
    versions = made(model)
    models = [drawn(seed) for seed in range(4)] + [dict.fromkeys(offers(), 0)]
    judge = Divergence(versions, Calibration(WINDOWS), top)
    found = judge(models, WINDOWS.numel(), np.random.default_rng(0))
    expected = [
        direct(model, applied(model, versions, removed), WINDOWS, min(top, 96))
        for removed in models
    ]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert min(found[:4]) > 10 * abs(found[4])


def test_few_tokens_are_windows_or_a_part_of_one(llama, monkeypatch):
    judge = Divergence(made(llama), Calibration(WINDOWS), 96)
    read = []
    monkeypatch.setattr(
        Divergence,
        "_sum",
        lambda self, models, ids: read.append(ids) or np.zeros(len(models)),
    )
    for tokens, shape in ((5, (1, 5)), (12, (1, 12)), (30, (2, 12)), (10_000, (8, 12))):
        judge([drawn()], tokens, np.random.default_rng(0))
        assert tuple(read[-1].shape) == shape
    assert torch.equal(read[-1], WINDOWS)
    judge([drawn()], 12, np.random.default_rng(1))
    judge([drawn()], 12, np.random.default_rng(2))
    assert not torch.equal(read[-1], read[-2])
    assert judge([], 12, np.random.default_rng(0)) == []


def test_pieces_change_nothing(llama, monkeypatch):
    judge = Divergence(made(llama), Calibration(WINDOWS), 96)
    models = [drawn(0), drawn(1)]
    expected = judge(models, 96, np.random.default_rng(0))
    monkeypatch.setattr(module, "STATES", 1)
    monkeypatch.setattr(module, "HEAD_TOKENS", 5)
    assert judge(models, 96, np.random.default_rng(0)) == pytest.approx(expected, rel=1e-5)


def test_what_begins_alike_is_computed_once(llama, monkeypatch):
    versions = made(llama)
    attended = []
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *a: attended.append(1) or attend(*a))
    judge = Divergence(versions, Calibration(WINDOWS), 96)
    dense = dict.fromkeys(offers(), 0)
    last = dense | {(LAYERS - 1, "neuron"): 24}
    judge([dense, last, last], 12, np.random.default_rng(0))
    assert len(attended) == LAYERS


# ------------------------------------------------------------------ the method
SMALL = {"iterations": 2, "generations": 3, "offspring": 6, "width": 0.2}


def plan(model, **settings):
    return load_method("tyr", **{**SMALL, **settings}).plan(model, WINDOWS, progress=False)


def gone(plan):
    return [{family: len(kept) for family, kept in layer.units.items()} for layer in plan.layers]


def test_the_search_beats_layers_that_lose_alike(llama):
    """By the judge that it searches with, on all of the text."""
    found = plan(llama, remove=0.35, generations=8, survivors=(2, 1), judged_by=(96, 96))
    alike = plan(llama, remove=0.35, generations=0)
    kl = [direct(llama, p.apply(copy.deepcopy(llama)), WINDOWS, 96) for p in (found, alike)]
    assert kl[0] < 0.97 * kl[1]
    assert gone(found) != gone(alike)


def test_a_store_serves_another_budget_without_reading_the_text(llama, tmp_path, monkeypatch):
    store = str(tmp_path / "store")
    first = plan(llama, remove=0.2, store=store)
    monkeypatch.setattr(Versions, "_solve", lambda *_: pytest.fail("gathered again"))
    again = plan(llama, remove=0.2, store=store)
    assert gone(again) == gone(first)
    other = plan(llama, remove=0.35, store=store)
    assert gone(other) != gone(first)
    kept = [folder.name for folder in (tmp_path / "store").iterdir()]
    assert len([name for name in kept if name.startswith("search-")]) == 4


def test_a_store_of_another_model_is_refused(llama, tmp_path):
    from prune_core.errors import InputError

    store = str(tmp_path / "store")
    plan(llama, store=store, generations=0, iterations=1)
    with pytest.raises(InputError):
        plan(roomy_decoder("llama", num_hidden_layers=3), store=store)
