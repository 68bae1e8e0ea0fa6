"""Masks beside a model that trains, and pruning that takes turns with training."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from model_prune import load_method
from model_prune.core.calibration import Calibration
from model_prune.core.mask import apply_masks, element_masks, hold, units_masked
from model_prune.core.plan import LayerPlan
from model_prune.methods.adapt_pruner import layer_importance, prune_and_train
from prune_core.errors import InputError
from tiny_decoders import FAMILIES, dims_of, random_windows, roomy_decoder, units

WINDOWS = random_windows()
EMBEDDING = "model.embed_tokens.weight"


def element_plan(model, **settings):
    return load_method("magnitude", **settings).plan(model, progress=False)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        loss = model(input_ids=WINDOWS, labels=WINDOWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizers(model):
    parameters = list(model.parameters())
    return {
        "adam": torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        "momentum": torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        "amsgrad": torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
        "plain": torch.optim.SGD(parameters, lr=1e-2),
    }


# ------------------------------------------------------------------ hold
@pytest.mark.parametrize("name", ["adam", "momentum", "amsgrad", "plain"])
def test_what_is_pruned_stays_zero_through_training(name):
    model = roomy_decoder("llama")
    optimizer = optimizers(model)[name]
    train(model, optimizer)  # so that there are moments of what is pruned now
    masks = element_masks(element_plan(model).layers)
    parameters = dict(model.named_parameters())
    hold(model, masks, optimizer)
    for _ in range(4):
        before = {n: parameters[n].detach().clone() for n in masks}
        train(model, optimizer, steps=1)
        for n, mask in masks.items():
            assert (parameters[n][~mask] == 0).all()
            assert (parameters[n][mask] != before[n][mask]).any()
    shapes = {n: mask.shape for n, mask in masks.items()}
    remembered = [
        value[~masks[n]]
        for n in masks
        for value in optimizer.state[parameters[n]].values()
        if isinstance(value, torch.Tensor) and value.shape == shapes[n]
    ]
    assert (
        len(remembered) == len(masks) * {"adam": 2, "momentum": 1, "amsgrad": 3, "plain": 0}[name]
    )
    assert all((value == 0).all() for value in remembered)


def test_what_is_kept_trains_as_if_nothing_held_it():
    """Gradients stay dense, and a weight of 0 that was not pruned is free to move."""
    held = roomy_decoder("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.ones(96, 48, dtype=torch.bool)
    mask[0] = False
    held.get_parameter(name).data[1] = 0
    free = copy.deepcopy(held)
    apply_masks(free, {name: mask})
    optimizer = torch.optim.Adam(held.parameters(), lr=1e-2)
    hold(held, {name: mask}, optimizer)
    train(held, optimizer, steps=1)
    train(free, torch.optim.Adam(free.parameters(), lr=1e-2), steps=1)
    assert (held.get_parameter(name)[1] != 0).any()
    free.get_parameter(name).data[0] = 0
    for (n, mine), theirs in zip(held.named_parameters(), free.parameters(), strict=True):
        assert torch.equal(mine, theirs), n


def test_the_masks_are_applied_at_once():
    model = roomy_decoder("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    mask = torch.rand(96, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    dense = model.get_parameter(name).detach().clone()
    hold(model, {name: mask}, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.get_parameter(name), dense * mask)


def test_removing_the_handle_ends_it():
    model = roomy_decoder("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    masks = element_masks(element_plan(model).layers)
    handle = hold(model, masks, optimizer)
    train(model, optimizer, steps=1)
    handle.remove()
    train(model, optimizer, steps=1)
    parameters = dict(model.named_parameters())
    assert all((parameters[name][~mask] != 0).any() for name, mask in masks.items())


def test_tied_weights_are_held_by_the_name_that_they_have():
    model = roomy_decoder("llama")
    mask = torch.rand(96, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hold(model, {EMBEDDING: mask}, optimizer)
    train(model, optimizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight[~mask] == 0).all()
    assert (model.lm_head.weight[mask] != 0).all()
    with pytest.raises(InputError, match=r"mask of 'lm_head\.weight', \(96, 48\), fits no"):
        hold(model, {"lm_head.weight": mask}, optimizer)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.mlp.up_proj.weight", (96, 48)),
        ("model.layers.0.mlp.up_proj", (96, 48)),
        ("model.layers.0.mlp.up_proj.weight", (48, 96)),
        ("model.layers.9.mlp.up_proj.weight", (96, 48)),
    ],
)
def test_masks_of_another_model_are_refused(name, shape):
    model = roomy_decoder("llama")
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(InputError, match="fits no parameter of the model: masks go with"):
        apply_masks(model, {name: mask})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="fits no parameter"):
        hold(model, {name: mask}, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_all_masks_fit_or_none_is_applied():
    model = roomy_decoder("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).detach().clone()
    none = torch.zeros(96, 48, dtype=torch.bool)
    with pytest.raises(InputError, match="fits no parameter"):
        apply_masks(model, {name: none, "model.nowhere": none})
    assert torch.equal(model.get_parameter(name), before)


# ------------------------------------------------------------------ units
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_units_give_nothing_and_come_back(family):
    model = roomy_decoder(family)
    dims = dims_of(model)
    plans = [LayerPlan() for _ in dims]
    plans[1] = LayerPlan(units=units(kv_group=[2], neuron=[*range(0, 96, 5)]))
    plans[2] = LayerPlan(units=units(kv_group=[0, 1]))
    with torch.no_grad():
        dense = model(WINDOWS).logits
        with units_masked(model, dims, plans):
            masked = model(WINDOWS).logits
        assert torch.equal(model(WINDOWS).logits, dense)
        plan = element_plan(model, sparsity=0.1)
        cut = dataclasses.replace(plan, layers=plans).apply(model)(WINDOWS).logits
    assert not torch.allclose(masked, dense, atol=1e-2)
    torch.testing.assert_close(masked, cut, rtol=1e-5, atol=1e-5)


def test_masks_of_units_end_with_an_error():
    model = roomy_decoder("llama")
    plans = [LayerPlan(units=units(neuron=[0])) for _ in range(4)]
    with pytest.raises(ZeroDivisionError), units_masked(model, dims_of(model), plans):
        _ = 1 / 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_of_masked_units_are_zero():
    model = roomy_decoder("llama")
    plans = [LayerPlan(units=units(neuron=[*range(4, 96)], kv_group=[0, 2])) for _ in range(4)]
    with units_masked(model, dims_of(model), plans):
        model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    layer = model.model.layers[2]
    assert (layer.mlp.up_proj.weight.grad[:4] == 0).all()
    assert (layer.mlp.up_proj.weight.grad[4:] != 0).any(1).all()
    assert (layer.self_attn.v_proj.weight.grad[16:32] == 0).all()
    assert (layer.self_attn.q_proj.weight.grad[32:64] == 0).all()
    assert (layer.self_attn.q_proj.weight.grad[64:] != 0).any(1).all()


# ------------------------------------------------------------------ in turns with training
def weights_of(model):
    return sum(dims.weights for dims in dims_of(model))


def tuned(model, lr=1e-3):
    train(model, torch.optim.Adam(model.parameters(), lr=lr), steps=1)


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_pruning_takes_turns_with_training_and_reaches_the_total(stages):
    model = roomy_decoder("qwen3")
    total, seen = weights_of(model), []
    method = load_method("adapt_pruner", remove=0.3, steps=10, amplitude=0.05)

    def training(model):
        seen.append(weights_of(model))
        tuned(model)

    given = model
    plans = prune_and_train(
        model, method, Calibration(WINDOWS), training, stages=stages, progress=False
    )
    assert len(plans) == len(seen) == stages
    neuron = dims_of(model)[0].cost("neuron")
    for stage, left in enumerate(seen, start=1):
        assert abs(total * (1 - 0.3 * stage / stages) - left) <= neuron / 2
    assert weights_of(given) == seen[-1]
    # Each plan is for the model as it was left by the one before.
    starts = [sum(dims.weights for dims in plan.dims) for plan in plans]
    assert starts == [total, *seen[:-1]]
    assert model(WINDOWS).logits.isfinite().all()


def test_no_stage_is_refused():
    method = load_method("adapt_pruner", remove=0.3)
    with pytest.raises(InputError, match="at least one step, got 0"):
        prune_and_train(roomy_decoder("llama"), method, Calibration(WINDOWS), tuned, stages=0)


@pytest.mark.parametrize("remove", [0.0, 0.0016, 0.01])
def test_stages_of_less_than_a_neuron(remove):
    """A stage that rounded up leaves nothing to the next."""
    model = roomy_decoder("llama")
    total = weights_of(model)
    method = load_method("adapt_pruner", remove=remove, steps=10)
    prune_and_train(model, method, Calibration(WINDOWS), lambda model: None, progress=False)
    assert abs(total * (1 - remove) - weights_of(model)) <= dims_of(model)[0].cost("neuron") / 2


def test_layers_that_change_less_are_less_important():
    importance = layer_importance(np.array([0.9, 0.5, 0.7]))
    np.testing.assert_allclose(importance, [-1, 1, 0], atol=1e-12)
    assert layer_importance(np.array([0.7, 0.7])).tolist() == [0, 0]
