"""Cutting a layer's tensors: the order of a plan, whole groups, and what is refused."""

import pytest
import torch

from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, Dims
from model_prune.graph.cut import dims_after, prune_state
from prune_core.errors import InputError
from tiny_decoders import units

DIMS = Dims(hidden=5, heads=4, kv_groups=2, head_dim=3, neurons=7)


def state(dtype=torch.float32, biases=()):
    """Weights whose value tells their row and column: row + column / 100."""
    made = {"input_layernorm.weight": torch.ones(5), "self_attn.q_norm.weight": torch.ones(3)}
    for matrix in MATRICES:
        rows, columns = DIMS.shape(matrix)
        made[f"{matrix}.weight"] = (torch.arange(rows)[:, None] + torch.arange(columns) / 100).to(
            dtype
        )
        if matrix in biases:
            made[f"{matrix}.bias"] = torch.arange(rows).to(dtype)
    return made


def test_an_empty_plan_returns_the_tensors_themselves():
    before = state()
    after = prune_state(before, LayerPlan(), DIMS)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert dims_after(DIMS, LayerPlan()) == DIMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_takes_its_query_heads_and_their_columns(dtype):
    before = state(dtype, biases=MATRICES)
    after = prune_state(before, LayerPlan(units=units(kv_group=[1])), DIMS)
    queries, keys = slice(6, 12), slice(3, 6)
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        for part in ("weight", "bias"):
            full = f"self_attn.{name}_proj.{part}"
            assert torch.equal(after[full], before[full][rows])
    assert torch.equal(
        after["self_attn.o_proj.weight"], before["self_attn.o_proj.weight"][:, queries]
    )
    for untouched in ("self_attn.o_proj.bias", "self_attn.q_norm.weight", "mlp.up_proj.weight"):
        assert after[untouched] is before[untouched]
    assert {tensor.dtype for name, tensor in after.items() if "proj" in name} == {dtype}
    assert all(tensor.is_contiguous() for tensor in after.values())


def test_a_neuron_is_a_row_of_two_and_a_column_of_one():
    before = state(biases=MATRICES)
    plan = LayerPlan(units=units(neuron=[0, 3, 6]))
    after = prune_state(before, plan, DIMS)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"][[0, 3, 6]])
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"][[0, 3, 6]])
    assert torch.equal(after["mlp.down_proj.weight"], before["mlp.down_proj.weight"][:, [0, 3, 6]])
    assert after["mlp.down_proj.bias"] is before["mlp.down_proj.bias"]
    cut = dims_after(DIMS, plan)
    assert cut == Dims(hidden=5, heads=4, kv_groups=2, head_dim=3, neurons=3)
    assert all(tuple(after[f"{m}.weight"].shape) == cut.shape(m) for m in MATRICES)


def test_weights_then_masks_then_biases_then_units():
    before = state(torch.bfloat16, biases=["self_attn.o_proj"])
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2, 4] = False
    plan = LayerPlan(
        weights={"mlp.down_proj": torch.full((5, 7), 8.0)},
        masks={"mlp.down_proj": mask},
        biases={"self_attn.o_proj": torch.full((5,), 0.5), "mlp.down_proj": torch.ones(5)},
        units=units(neuron=[1, 4]),
    )
    after = prune_state(before, plan, DIMS)
    down = torch.full((5, 2), 8.0, dtype=torch.bfloat16)
    down[2, 1] = 0
    assert torch.equal(after["mlp.down_proj.weight"], down)
    assert after["mlp.down_proj.bias"].tolist() == [1.0] * 5
    assert after["self_attn.o_proj.bias"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]  # added to 0, 1, …
    assert {tensor.dtype for name, tensor in after.items() if "proj" in name} == {torch.bfloat16}
    assert before["mlp.down_proj.weight"][2, 4] != 0  # the caller's stay as they were


def test_a_masked_weight_is_zero_whatever_it_was():
    before = state()
    before["mlp.up_proj.weight"][0, 0] = float("nan")
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[0, 0] = False
    after = prune_state(before, LayerPlan(masks={"mlp.up_proj": mask}), DIMS)
    assert after["mlp.up_proj.weight"][0, 0] == 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"units": units(neuron=[0, 7])}, r"in \[0, 6\].* up to 7"),
        ({"units": units(neuron=[-1, 2])}, r"in \[0, 6\]"),
        ({"units": units(kv_group=[1, 0])}, "ascending order"),
        ({"units": units(kv_group=[1, 1])}, "ascending order, each once"),
        ({"units": {"neuron": torch.empty(0, dtype=torch.int64)}}, "remove the whole layer"),
        ({"units": {"neuron": torch.ones(7, dtype=torch.bool)}}, "must be one row of int64"),
        ({"units": units(head=[0])}, "'head'.*Known: kv_group, neuron"),
        ({"masks": {"mlp.up": torch.ones(7, 5)}}, "Did you mean 'mlp.up_proj'"),
        ({"masks": {"mlp.up_proj": torch.ones(5, 7)}}, r"mask of 'mlp.up_proj'.*\(7, 5\)"),
        ({"weights": {"mlp.up_proj": torch.ones(7, 4)}}, r"weight of 'mlp.up_proj'.*\(7, 5\)"),
        ({"biases": {"mlp.up_proj": torch.ones(7)}}, "names 'mlp.up_proj'"),
        ({"biases": {"mlp.down_proj": torch.ones(7)}}, r"bias of 'mlp.down_proj'.*\(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(plan, words):
    with pytest.raises(InputError, match=words):
        prune_state(state(), LayerPlan(**plan), DIMS)


def test_a_layer_of_another_model_is_refused():
    wrong = state() | {"mlp.gate_proj.weight": torch.ones(8, 5)}
    with pytest.raises(InputError, match=r"'mlp.gate_proj.weight' must have the shape \(7, 5\)"):
        prune_state(wrong, LayerPlan(), DIMS)
    del wrong["mlp.gate_proj.weight"]
    with pytest.raises(InputError, match="missing"):
        prune_state(wrong, LayerPlan(), DIMS)
    with pytest.raises(InputError, match="remove the whole layer"):
        dims_after(DIMS, LayerPlan(units={"neuron": torch.empty(0, dtype=torch.int64)}))
