"""What weights that stay do for those that go, against least squares."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import get_lapack_funcs
from threadpoolctl import threadpool_info

from model_prune.core import compensate
from model_prune.core.compensate import Sweep, inverse_factor, least_squares, mean_bias, rise
from model_prune.core.structure import NM, PerMatrix
from prune_core.errors import InputError


def inputs(tokens, width, seed=0):
    """Correlated, as activations are, float32 [tokens, width]."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=draw) / width**0.5
    x = torch.randn(tokens, width, generator=draw) @ (mixed + torch.eye(width))
    return x * torch.linspace(0.5, 2, width)


def weights(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x, old, new):
    return float((x.double() @ (old - new).double().T).square().sum())


def refit(x, weight, kept):
    """The least-squares fit of x Wᵀ by the kept columns of x, by numpy in double precision."""
    x, weight = x.double().numpy(), weight.double().numpy()
    result = np.zeros_like(weight)
    result[:, kept] = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    return torch.from_numpy(result).float()


# ------------------------------------------------------------------ factor
def test_the_factor_is_that_of_the_damped_inverse():
    x = inputs(200, 12)
    gram = x.T @ x
    factor = inverse_factor(gram, [0.01])
    assert torch.equal(factor, factor.triu())
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(12)
    torch.testing.assert_close(
        factor.double().T @ factor.double(), damped.inverse(), rtol=1e-4, atol=1e-8
    )


def test_the_gram_matrix_stays_as_it_is():
    x = inputs(50, 6)
    gram = x.T @ x
    before = gram.clone()
    inverse_factor(gram)
    least_squares(weights(4, 6), gram, torch.tensor([0, 2]))
    assert torch.equal(gram, before)


def test_damping_grows_until_it_works_and_is_never_the_identity():
    # An eigenvalue of −0.05 of the mean diagonal: 0.01 is too little, 0.1 enough.
    rotation = torch.linalg.qr(weights(6, 6).double())[0]
    values = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.55, -0.05]).double()
    gram = (rotation * values @ rotation.T).float()
    mean = float(gram.diagonal().mean())
    assert mean == pytest.approx(1, abs=1e-5)
    factor = inverse_factor(gram, (0.01, 0.1, 1.0))
    expected = (gram.double() + 0.1 * mean * torch.eye(6)).inverse()
    torch.testing.assert_close(factor.double().T @ factor.double(), expected, rtol=1e-3, atol=1e-3)
    off_diagonal = factor - torch.diag(factor.diagonal())
    assert off_diagonal.abs().max() > 0.1


def test_lapack_has_no_threads_beside_those_of_torch(monkeypatch):
    pools = []

    def watched(names, arrays):
        def call(function, *args, **kwargs):
            pools.extend(pool for pool in threadpool_info() if pool["internal_api"] == "openblas")
            return function(*args, **kwargs)

        return [partial(call, function) for function in get_lapack_funcs(names, arrays)]

    monkeypatch.setattr(compensate, "get_lapack_funcs", watched)
    x = inputs(50, 6)
    inverse_factor(x.T @ x)
    assert {pool["num_threads"] for pool in pools} == {1}


def test_what_cannot_be_inverted_is_refused_by_a_sentence():
    with pytest.raises(InputError, match=r"cannot be inverted, even with 1\.0 of their mean added"):
        inverse_factor(-torch.eye(4) - torch.ones(4, 4))
    with pytest.raises(InputError, match="cannot be inverted, even with 0 of"):
        inverse_factor(torch.ones(4, 4), [0])


def test_an_input_that_was_always_zero_gets_a_one():
    x = inputs(100, 5)
    x[:, 1] = 0
    factor = inverse_factor(x.T @ x, [0])
    assert factor.isfinite().all()
    assert factor[1].tolist() == [0, 1, 0, 0, 0]
    assert factor[:, 1].tolist() == [0, 1, 0, 0, 0]
    live = [0, 2, 3, 4]
    inverse = (factor.T @ factor)[live][:, live].double()
    expected = (x[:, live].double().T @ x[:, live].double()).inverse()
    torch.testing.assert_close(inverse, expected, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------ sweep
class Given:
    """A pattern of one block, the whole row, whose mask is given."""

    sparsity = 0.0

    def __init__(self, mask):
        self._mask, self.block = mask, mask.shape[1]

    def mask(self, scores, sparsity):
        return self._mask


@pytest.mark.parametrize("width", [8, 33, 70])
def test_a_prefix_of_columns_is_swept_to_the_least_squares_refit(width):
    x, weight = inputs(4 * width, width), weights(5, width)
    mask = torch.ones(5, width, dtype=torch.bool)
    mask[:, : width // 3] = False
    [new], [kept] = Sweep(width, Given(mask))([weight], inverse_factor(x.T @ x, [0]), [0.5])
    assert torch.equal(kept, mask)
    assert (new[~mask] == 0).all()
    expected = refit(x, weight, range(width // 3, width))
    torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [5, 32, 33, 64, 100, 128])
def test_a_prefix_by_blocks_of_any_size(block):
    """Columns whose weights are tiny rank lowest: with them in front, the mask is a prefix."""
    width = 100
    x, weight = inputs(400, width), weights(4, width)
    weight[:, : width // 5] *= 1e-7
    # One block ranks all columns together; smaller ones take their share of each.
    factor = inverse_factor(x.T @ x, [0])
    [new], [kept] = Sweep(block)([weight], factor, [0.2])
    counts = [int(4 * min(block, width - start) * 0.2 + 1e-6) for start in range(0, width, block)]
    found = [int((~kept[:, s : s + block]).sum()) for s in range(0, width, block)]
    assert found == counts
    assert (new[~kept] == 0).all()
    if block >= width:
        assert not kept[:, :20].any()
        torch.testing.assert_close(new, refit(x, weight, range(20, 100)), rtol=1e-3, atol=1e-4)


def by_definition(weight, factor, block, sparsity, pattern=None):
    """The sweep, a column at a time, in double precision."""
    work, upper = weight.double().clone(), factor.double()
    kept = torch.ones_like(work, dtype=torch.bool)
    ranked = pattern.block if pattern else block
    for j in range(work.shape[1]):
        if j % ranked == 0:
            group = slice(j, j + ranked)
            scores = (work[:, group] / upper.diagonal()[group]).square()
            order = scores.argsort(stable=True) if pattern else scores.flatten().argsort()[None]
            count = pattern.block - pattern.keep if pattern else int(scores.numel() * sparsity)
            stays = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :count], False)
            kept[:, group] = stays.view_as(scores)
        gap = torch.where(kept[:, j], 0, work[:, j]) / upper[j, j]
        work[:, j:] -= gap[:, None] * upper[j, j:]
    return work.where(kept, 0), kept


@pytest.mark.parametrize("pattern", [None, NM(2, 4), NM(4, 6), NM(3, 30)])
@pytest.mark.parametrize("block", [7, 32, 40, 128])
def test_any_block_is_the_definition(block, pattern):
    x, weight = inputs(300, 120), weights(6, 120)
    factor = inverse_factor(x.T @ x)
    [new], [kept] = Sweep(block, pattern)([weight], factor, [0.45])
    expected, mask = by_definition(weight, factor, block, 0.45, pattern)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_a_swept_matrix_is_closer_than_a_masked_one(sparsity):
    x, weight = inputs(500, 60), weights(40, 60)
    factor = inverse_factor(x.T @ x)
    [new], [kept] = Sweep(16)([weight], factor, [sparsity])
    assert error(x, weight, new) < 0.95 * error(x, weight, weight * kept)
    magnitude = PerMatrix().mask(weight.abs(), sparsity)
    assert error(x, weight, new) < 0.9 * error(x, weight, weight * magnitude)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_stacked_is_each_by_itself(pattern):
    x = inputs(300, 40)
    factor = inverse_factor(x.T @ x)
    # The second is much smaller: ranked together it would go first.
    matrices = [weights(8, 40), 1e-3 * weights(3, 40, seed=2), weights(5, 40, seed=3)]
    before = [weight.clone() for weight in matrices]
    shares = [0.5, 0.25, 0.1]
    sweep = Sweep(16, pattern)
    new, kept = sweep(matrices, factor, shares)
    for i, weight in enumerate(matrices):
        assert torch.equal(weight, before[i])
        [alone], [mask] = sweep([weight], factor, [shares[i]])
        assert torch.equal(kept[i], mask)
        torch.testing.assert_close(new[i], alone, rtol=1e-5, atol=1e-6 * weight.abs().max().item())


def test_sparsity_0_is_bit_for_bit():
    x, weight = inputs(100, 40), weights(8, 40)
    weight[0, 0] = -0.0
    [new], [kept] = Sweep(16)([weight], inverse_factor(x.T @ x), [0.0])
    assert kept.all()
    assert torch.equal(new.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize(("keep", "block"), [(2, 4), (1, 4), (3, 4), (2, 3), (5, 6), (4, 40)])
@pytest.mark.parametrize("columns", [16, 7, 128])
def test_every_group_of_a_pattern_is_satisfied(keep, block, columns):
    x, weight = inputs(500, 120), weights(9, 120)
    [new], [kept] = Sweep(columns, NM(keep, block))([weight], inverse_factor(x.T @ x), [0.0])
    assert (kept.view(9, -1, block).sum(-1) == keep).all()
    assert torch.equal(new != 0, kept)
    assert error(x, weight, new) < error(x, weight, weight * kept)


def test_a_pattern_refuses_rows_that_do_not_divide():
    x = inputs(100, 10)
    with pytest.raises(InputError, match="multiple of 4"):
        Sweep(128, NM(2, 4))([weights(3, 10)], inverse_factor(x.T @ x), [0.5])


# ------------------------------------------------------------------ refit
def test_least_squares_is_numpys_at_damping_0():
    x, weight = inputs(300, 20), weights(7, 20)
    kept = torch.tensor([0, 3, 4, 9, 15, 19])
    new = least_squares(weight, x.T @ x, kept, damping=0)
    torch.testing.assert_close(new, refit(x, weight, kept.tolist()), rtol=1e-3, atol=1e-4)
    gone = [j for j in range(20) if j not in kept]
    assert (new[:, gone] == 0).all()


def test_damping_pulls_to_the_old_weights():
    x, weight = inputs(300, 20), weights(7, 20)
    kept = torch.tensor([0, 3, 4, 9, 15, 19])
    gram, old = x.T @ x, weight[:, kept]
    near = least_squares(weight, gram, kept, damping=1e4)[:, kept]
    torch.testing.assert_close(near, old, atol=2e-3, rtol=0)
    # In closed form: (W H + λ W)_K (H_KK + λI)⁻¹.
    new = least_squares(weight, gram, kept)[:, kept]
    shift = 0.01 * gram.diagonal().mean().double()
    own = gram.double()[kept][:, kept] + shift * torch.eye(6)
    expected = (weight.double() @ gram.double()[:, kept] + shift * old.double()) @ own.inverse()
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-4)
    everything = least_squares(weight, gram, torch.arange(20))
    torch.testing.assert_close(everything, weight, rtol=1e-3, atol=1e-3)


def test_least_squares_is_closer_than_cutting():
    x, weight = inputs(300, 20), weights(7, 20)
    kept = torch.arange(5, 20)
    cut = weight.clone()
    cut[:, :5] = 0
    assert error(x, weight, least_squares(weight, x.T @ x, kept)) < 0.8 * error(x, weight, cut)


def test_the_bias_keeps_the_output_of_constant_features():
    x, weight = inputs(100, 6), weights(4, 6)
    x[:, [1, 4]] = torch.tensor([3.0, -2.0])
    kept = torch.tensor([0, 2, 3, 5])
    bias = mean_bias(weight, x.mean(0), kept)
    torch.testing.assert_close(x[:, kept] @ weight[:, kept].T + bias, x @ weight.T)
    assert (mean_bias(weight, x.mean(0), torch.arange(6)) == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_heads_cost_is_the_same_on_any_number_of_threads(threads):
    """torch's batched LU took wrong pivots on two, of groups as wide as a head's columns."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 576, generator=draw)
    weight = torch.randn(576, 576, generator=draw)
    factor = inverse_factor(x.T @ x)
    inverse = factor.T @ factor
    groups = torch.arange(576).view(3, 192)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rise(weight, inverse, groups)
    finally:
        torch.set_num_threads(before)
    for group, cost in zip(groups, found, strict=True):
        own, part = inverse[group][:, group].double(), weight[:, group].double()
        expected = (part @ torch.linalg.inv(own) * part).sum() / 2
        assert float(cost) == pytest.approx(float(expected), rel=1e-4)
