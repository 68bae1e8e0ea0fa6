"""The oracle of weight pruning against what can be worked out without it."""

import math

import numpy as np
import pytest
import torch

from model_oracle import (
    adapt_pruner_step,
    angular_distance,
    cfsp_coarse,
    cfsp_fine,
    cfsp_norm,
    dsnot,
    flap_bias,
    flap_keep,
    flap_scores,
    llm_pruner_taylor,
    magnitude_mask,
    owl_sparsities,
    ria_scores,
    shortgpt_bi,
    sparsegpt,
    wanda_mask,
)
from model_prune.core.target import Dims


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens, columns):
    return normal(tokens, columns) @ normal(columns, columns, seed=1)


def test_counts_are_exact_where_all_scores_tie():
    weight, x = torch.ones(4, 10), torch.ones(3, 10)
    assert wanda_mask(weight, x, 0.9).sum(1).tolist() == [1] * 4
    assert wanda_mask(weight, x, 0.5)[0].tolist() == [False] * 5 + [True] * 5
    assert magnitude_mask(weight, 0.5).sum() == 20
    assert sparsegpt(weight, normal(32, 10), 0.3, blocksize=5)[1].sum() == 28
    assert wanda_mask(weight[:, :8], x[:, :8], nm=(1, 4)).sum(1).tolist() == [2] * 4


def test_wanda_keeps_its_mask_when_a_feature_trades_size_with_its_weights():
    weight, x, factors = normal(6, 16), normal(40, 16, seed=1), normal(16, seed=2).exp()
    expected = wanda_mask(weight, x, 0.5)
    assert torch.equal(wanda_mask(weight / factors, x * factors, 0.5), expected)
    assert not torch.equal(wanda_mask(weight, x * factors, 0.5), expected)


def test_ria_shares_of_a_uniform_matrix_are_one_over_its_sides():
    scores = ria_scores(torch.ones(4, 5), torch.full((1, 5), 9.0))
    assert torch.allclose(scores, torch.tensor((1 / 4 + 1 / 5) * 3, dtype=torch.float64))


def test_owl_spares_the_layer_with_outliers():
    calm, x = torch.ones(4, 25), torch.ones(1, 25)
    wild = calm.clone()
    wild[0, 0] = 1000
    found = owl_sparsities([[(calm, x)], [(wild, x)], [(calm, x)]], 0.5)
    assert found == pytest.approx([0.5 + 0.16 / 3, 0.5 - 0.32 / 3, 0.5 + 0.16 / 3])
    assert owl_sparsities([[(calm, x)]] * 2, 0.5) == [0.5, 0.5]


def test_dsnot_swaps_by_hand():
    """Errors: 3 + 1 removed; 3 has variance 9, 1 has .25, so 1 returns; -2 goes, not -1: Wanda."""
    x = torch.tensor([[4.0, 1.5, 1.0, 4.0, 1.0], [-2.0, 0.5, -3.0, -5.0, 1.0]])
    weight = torch.tensor([[1.5, 0.5, 1.0, 1.0, 7.0]])
    mask = torch.tensor([[False, False, True, True, True]])
    assert dsnot(weight, x, mask, cycles=1).tolist() == [[False, True, False, True, True]]
    assert torch.equal(dsnot(weight, x, mask, threshold=4.1), mask)


def test_sparsegpt_without_leading_columns_is_the_least_squares_refit():
    weight, x = normal(5, 12), correlated(60, 12)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[:, :4] = False
    swept, _ = sparsegpt(weight, x, mask=mask, damp=0)
    refit = np.linalg.lstsq(x[:, 4:].numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(swept[:, 4:].numpy(), refit, atol=1e-8)
    assert not swept[:, :4].any()


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"nm": (2, 4)}])
def test_sparsegpt_beats_its_own_mask_unswept(rule):
    weight, x = normal(16, 32), correlated(200, 32)
    x[:, 3] = 0
    swept, mask = sparsegpt(weight, x, **rule, blocksize=8)
    error = (x @ (swept - weight).T).square().sum()
    assert error < 0.8 * (x @ (weight * mask - weight).T).square().sum()
    assert not swept[:, 3].any()
    assert not swept[~mask].any()


def test_flap_puts_back_a_constant_feature_exactly():
    weight, x = normal(6, 8), normal(50, 8, seed=1)
    x[:, 2] = 3.0
    cut = weight.clone()
    cut[:, 2] = 0
    bias = flap_bias(weight, x.mean(0), [2])
    torch.testing.assert_close(x @ cut.T + bias, x @ weight.T)
    units, neurons = flap_scores(weight, x, weight, x, columns=4)
    assert neurons.argmin() == 2
    assert (units.mean(), neurons.mean()) == (pytest.approx(0), pytest.approx(0))


def test_flap_spends_weights_not_units():
    units, neurons = torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, 2.0, 8.0, 9.0]])
    kept, rest = flap_keep(units, neurons, unit_cost=3, neuron_cost=1, remove=0.4)
    assert kept.tolist() == [[False, True]]
    assert rest.tolist() == [[False, True, True, True]]


def test_cfsp_scores_a_neuron_by_its_activation_alone():
    gate, up, down, x = normal(7, 5), normal(7, 5, seed=1), normal(5, 7, seed=2), normal(20, 7)
    torch.testing.assert_close(cfsp_fine(gate, up, down, x, b=0.7, c=1.5), cfsp_norm(x, 5, c=1.5))


def test_cfsp_keeps_more_where_states_turn_and_never_all():
    hidden = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]])
    for sparsity in (0.5, 0.1):
        kept = cfsp_coarse(hidden, sparsity)
        assert kept.mean() == pytest.approx(1 - sparsity)
        assert kept[0] > kept[1] > kept[2]
        assert kept.max() < 1


def test_taylor_sums_a_unit_over_its_matrices():
    """All weights 2, gradients 1 and 3: g 2, f 5; a unit scores its weights' number of them."""
    dims = Dims(hidden=6, heads=4, kv_groups=2, head_dim=3, neurons=5)
    names = ["self_attn." + n + "_proj" for n in "qkvo"]
    names += ["mlp." + n + "_proj" for n in ("gate", "up", "down")]
    weights = {name: torch.full(dims.shape(name), 2.0) for name in names}
    gradients = [{n: torch.full_like(w, g) for n, w in weights.items()} for g in (1.0, 3.0)]
    for order, each in (("first", 4), ("second", 20), ("mixed", 6)):
        groups, neurons = llm_pruner_taylor(weights, gradients, order, dims.kv_groups)
        assert groups.tolist() == [each * dims.cost("kv_group")] * 2
        assert neurons.tolist() == [each * dims.cost("neuron")] * 5
    weights["self_attn.q_proj"][3:6] *= 10  # the second query head reads the first keys
    groups, _ = llm_pruner_taylor(weights, gradients, "first", dims.kv_groups)
    assert groups[0] > groups[1]


def test_adapt_pruner_adds_delta_on_average():
    step = adapt_pruner_step([0.2, 0.2, 0.2], [0.9, 0.5, 0.1], 0.02, 0.01)
    assert step.tolist() == pytest.approx([0.23, 0.22, 0.21])
    assert adapt_pruner_step([0.1, 0.1], [0.4, 0.4], 0.02, 0.01).tolist() == pytest.approx(
        [0.12] * 2
    )


def test_distances_of_turns_by_a_right_angle():
    hidden = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]], [[-1.0, 0.0]]])
    assert angular_distance(hidden, 1).tolist() == pytest.approx([0.5, 0.5, 0])
    assert angular_distance(hidden, 2).tolist() == pytest.approx([1, 0.5])
    assert shortgpt_bi(hidden).tolist() == pytest.approx([1, 1, 0])
    assert math.isclose(float(angular_distance(hidden, 3)), 1)
