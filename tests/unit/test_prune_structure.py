"""Which weights and units go: exact counts, ties by index, and totals met to one unit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_oracle import tiny_llama
from model_prune import load_method
from model_prune.core.allocate import (
    around,
    bounded,
    check_kept,
    check_share,
    erk,
    everywhere_alike,
    in_one_ranking,
    ranked_together,
    spread_out,
    standardised,
)
from model_prune.core.plan import LayerPlan
from model_prune.core.schedule import linear
from model_prune.core.structure import (
    NM,
    Columns,
    PerMatrix,
    PerRow,
    Rows,
    keep_highest,
    removed_count,
)
from model_prune.core.target import MATRICES, Dims
from prune_core.errors import InputError

# 96 neurons of 144 weights; 3 KV groups, each as much as 32 neurons.
DIMS = Dims(hidden=48, heads=6, kv_groups=3, head_dim=16, neurons=96)
SMOLLM = Dims(hidden=576, heads=9, kv_groups=3, head_dim=64, neurons=1536)


def random_table(dims, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {"kv_group": draw.normal(size=d.kv_groups), "neuron": draw.normal(size=d.neurons)}
        for d in dims
    ]


def removed_weights(kept, dims):
    return sum(
        int((~stays).sum()) * d.cost(family)
        for families, d in zip(kept, dims, strict=True)
        for family, stays in families.items()
    )


# ------------------------------------------------------------------ counts
@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(10, 0.9, 9), (10, 1 - 0.9, 1), (100, 0.29, 29), (100, 0.57, 57), (3, 0.5, 1), (7, 0, 0)],
)
def test_a_share_is_a_whole_number_whatever_floats_make_of_it(total, share, count):
    assert removed_count(total, share) == count


def test_ten_at_nine_tenths_keeps_one():
    assert PerRow().mask(torch.arange(10.0)[None], 0.9).sum() == 1


def test_ties_go_first_to_last_and_never_one_too_many():
    assert keep_highest(torch.zeros(5), 2).tolist() == [False, False, True, True, True]
    scores = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    assert keep_highest(scores, 4).tolist() == [False, False, True, False, False, True]
    assert keep_highest(scores, 0).all()
    assert not keep_highest(scores, 6).any()


@pytest.mark.parametrize("values", [1, 2, 5])
def test_exact_counts_under_ties(values):
    scores = torch.randint(values, (40, 25), generator=torch.Generator().manual_seed(0)).float()
    assert int((~PerMatrix().mask(scores, 0.5)).sum()) == 500
    assert (~PerRow().mask(scores, 0.4)).sum(1).tolist() == [10] * 40


def test_the_lowest_go():
    scores = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    for structure, parts in ((PerMatrix(), [slice(None)]), (PerRow(), range(9))):
        mask = structure.mask(scores, 0.5)
        for part in parts:
            assert scores[part][~mask[part]].max() < scores[part][mask[part]].min()


def test_infinite_scores_rank_and_nan_is_refused():
    scores = torch.tensor([[torch.inf, -torch.inf, 0.0, 1.0]])
    assert PerRow().mask(scores, 0.5).tolist() == [[True, False, False, True]]
    with pytest.raises(InputError, match="NaN"):
        PerRow().mask(torch.tensor([[0.0, torch.nan]]), 0.5)


def test_rows_and_columns_go_whole_by_their_sums():
    scores = torch.tensor([[1.0, 5.0, 3.0], [2.0, 0.0, 0.0], [1.0, 5.0, 3.0], [9.0, 9.0, 9.0]])
    assert Rows().mask(scores, 0.5).tolist() == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]
    assert Columns().mask(scores, 0.4).tolist() == [[False, True, True]] * 4
    Rows().mask(scores, 0.5)[0, 0] = True  # memory of its own, not an expanded view


# ------------------------------------------------------------------ N:M
@pytest.mark.parametrize(
    ("keep", "block"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 2), (2, 3), (2, 200)]
)
def test_nm_keeps_n(keep, block):
    scores = torch.rand(5, 6 * block, generator=torch.Generator().manual_seed(0))
    mask = NM(keep, block).mask(scores, 0)
    groups, kept = scores.view(5, -1, block), mask.view(5, -1, block)
    assert (kept.sum(-1) == keep).all()
    lowest = groups.masked_fill(~kept, torch.inf).amin(-1)
    assert (lowest > groups.masked_fill(kept, -torch.inf).amax(-1)).all()


def test_one_of_four_keeps_one():
    assert NM(1, 4).mask(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), 0).tolist() == [
        [False, True, False, False]
    ]
    assert NM(1, 4).sparsity == 0.75


def test_nm_ties_go_first_to_last():
    mask = NM(2, 4).mask(torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]]), 0)
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 1]]


def test_a_short_group_is_refused():
    with pytest.raises(InputError, match="multiple of 4 weights, and these have 10"):
        NM(2, 4).mask(torch.rand(3, 10), 0)


@pytest.mark.parametrize("text", ["2:5x", "4", "2:4:8", "-2:4", "", "2:4\n"])
def test_what_is_no_pattern(text):
    with pytest.raises(InputError, match="written like 2:4"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4"])
def test_a_pattern_that_keeps_all_or_nothing(text):
    with pytest.raises(InputError, match="0 < N < M"):
        NM.parse(text)


def test_nm_refuses_nan():
    with pytest.raises(InputError, match="NaN"):
        NM(2, 4).mask(torch.tensor([[torch.nan, torch.nan, torch.nan, 1.0]]), 0)


# ------------------------------------------------------------------ packed
@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 15, 16, 17, 250])
@pytest.mark.parametrize("rows", [1, 6])
def test_masks_are_packed_in_bits_and_come_back(rows, columns):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    # A mask that was made by columns is not contiguous.
    for given in (mask, mask.T.contiguous().T):
        tensors = LayerPlan(masks={"mlp.up_proj": given}).tensors()
        packed = tensors["mask.mlp.up_proj"]
        assert packed.dtype == torch.uint8
        assert packed.numel() == rows * (-(-columns // 8) + 1)
        assert torch.equal(LayerPlan.from_tensors(tensors).masks["mlp.up_proj"], mask)


def test_a_layer_plan_comes_back_from_its_tensors():
    plan = LayerPlan(
        weights={"mlp.down_proj": torch.rand(3, 5)},
        biases={"self_attn.o_proj": torch.rand(3)},
        units={"neuron": torch.tensor([0, 4])},
        removed=True,
    )
    again = LayerPlan.from_tensors(plan.tensors())
    assert torch.equal(again.weights["mlp.down_proj"], plan.weights["mlp.down_proj"])
    assert torch.equal(again.biases["self_attn.o_proj"], plan.biases["self_attn.o_proj"])
    assert torch.equal(again.units["neuron"], plan.units["neuron"])
    assert again.removed
    assert again.masks == {}


# ------------------------------------------------------------------ shares
def test_a_share_in_percent_is_told_so():
    with pytest.raises(InputError, match=r"sparsity .* got 50: write 0.5 for 50 %\."):
        check_share("sparsity", 50)
    for value in (-0.1, 1.0, 100.0, float("nan")):
        with pytest.raises(InputError, match=r"\[0, 1\), got"):
            check_share("remove", value)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_erk_is_exact_in_weights(sparsity):
    shapes = {f"layers.{i}.{m}": SMOLLM.shape(m) for i in range(3) for m in MATRICES}
    shares = erk(shapes, sparsity)
    sizes = {name: o * i for name, (o, i) in shapes.items()}
    total = sum(sizes.values())
    assert sum(sizes[n] * shares[n] for n in shapes) == pytest.approx(sparsity * total, rel=1e-9)
    assert all(-1e-9 <= share < 1 for share in shares.values())
    if sparsity >= 0.5:
        # In proportion: density · size / (out + in) is the same of all that are not dense.
        ratio = {(1 - shares[n]) * sizes[n] / sum(shapes[n]) for n in shapes if shares[n] > 1e-9}
        assert max(ratio) == pytest.approx(min(ratio))
        assert shares["layers.0.mlp.up_proj"] > shares["layers.0.self_attn.k_proj"]


def test_erk_leaves_small_matrices_dense_and_the_others_pay():
    shapes = {"small": (2, 2), "large": (100, 100)}
    shares = erk(shapes, 0.5)
    assert shares["small"] == pytest.approx(0)
    assert 4 * shares["small"] + 10_000 * shares["large"] == pytest.approx(0.5 * 10_004)


def test_around_gives_more_to_low_signals_and_the_mean_exactly():
    shares = around([3.0, 1.0, 2.0], 0.5, 0.08)
    np.testing.assert_allclose(shares, [0.42, 0.58, 0.5], atol=1e-12)
    clipped = around([0.0, 0.0, 0.0, 9.0], 0.7, 0.8)
    assert clipped.mean() == pytest.approx(0.7, abs=1e-12)
    assert clipped.min() >= 0
    assert clipped.max() <= 0.99
    np.testing.assert_array_equal(around([2.0] * 3, 0.3, 0.08), [0.3] * 3)


def test_bounded_keeps_shares_that_fit_and_shifts_the_others():
    np.testing.assert_allclose(bounded(np.array([0.2, 0.4]), 0.3), [0.2, 0.4], atol=1e-12)
    shares = bounded(np.array([-0.5, 0.5, 1.5]), 0.5)
    assert shares.mean() == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_allclose(shares[[0, 2]], [0, 0.99])


def test_around_is_exact_for_any_spread():
    assert around([0.0, 1.0, 1.0, 1.0, 1.0], 0.5, 5.0).mean() == pytest.approx(0.5)


def test_around_meets_a_total_above_its_bound():
    assert around([0.0, 1.0], 0.995, 0.001).mean() == pytest.approx(0.995)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.93])
def test_one_ranking_of_all_matrices(sparsity):
    generator = torch.Generator().manual_seed(0)
    # Few values, so that many tie at the bound, and matrices of very different scales.
    parts = {
        str(k): torch.randint(0, 9, (7 + k, 40), generator=generator) * 3.0 ** (2 * k - 1)
        for k in range(3)
    }
    found = in_one_ranking(lambda: parts.items(), sparsity)
    flat = torch.cat([part.flatten() for part in parts.values()])
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[flat.argsort(stable=True)[: removed_count(len(flat), sparsity)]] = True
    for part, mask in zip(parts, gone.split([p.numel() for p in parts.values()]), strict=True):
        assert removed_count(len(mask), found[part]) == int(mask.sum())


def test_shares_of_some_matrices(tmp_path):
    method = load_method("magnitude", sparsities={"layers.1.*": 0.25, "down_proj": 0.75})
    layers = method.plan(tiny_llama(), progress=False).layers
    for i, name, share in [
        (0, "mlp.up_proj", 0.5),
        (1, "mlp.up_proj", 0.25),
        (1, "mlp.down_proj", 0.75),
    ]:
        assert (~layers[i].masks[name]).float().mean() == pytest.approx(share)
    with pytest.raises(InputError, match=r"'layers\.0\.\*' is a share in \[0, 1\), got 1.5"):
        load_method("wanda", sparsities={"layers.0.*": 1.5})
    with pytest.raises(InputError, match="matches none of the model's"):
        load_method("magnitude", sparsities={"layers.9.*": 0.5}).plan(tiny_llama(), progress=False)
    for settings in ({"pattern": "2:4"}, {"allocation": "erk"}):
        with pytest.raises(InputError, match="leave"):
            load_method("magnitude", sparsities={"mlp.*": 0.5}, **settings)


def test_standardised_without_deviation_is_zero():
    assert standardised(np.full((3, 4), 7.0)).tolist() == [[0.0] * 4] * 3
    assert standardised(np.array([3.0])).tolist() == [0.0]
    scores = np.random.default_rng(0).normal(3, 5, (6, 7))
    result = standardised(scores)
    assert result.mean() == pytest.approx(0)
    assert result.std(ddof=1) == pytest.approx(1)


def test_spread_out_rounds_and_gives_remainders_to_the_largest():
    assert spread_out(10, [1, 1, 1]) == [4, 3, 3]
    assert spread_out(7, [4.0, 1.0]) == [6, 1]
    assert spread_out(6.6, [10, 0, 4]) == [5, 0, 2]
    assert spread_out(0, [3, 3]) == [0, 0]
    assert spread_out(6, [3, 3]) == [3, 3]


def test_a_schedule_ends_at_the_total():
    assert linear(0.3, 3) == pytest.approx([0.1, 0.2, 0.3])
    assert linear(0.7, 7)[-1] == 0.7
    with pytest.raises(InputError, match="at least one step, got 0"):
        linear(0.3, 0)


# ------------------------------------------------------------------ units
AWKWARD = [0.0, 0.001, 1 / 7, 0.2, 0.333, 0.37, 0.4567, 0.499]


@pytest.mark.parametrize("remove", AWKWARD)
@pytest.mark.parametrize(("skip", "size"), [((0, 0), 5), ((1, 0), 7), ((2, 1), 11)])
def test_everywhere_alike_meets_the_total_within_a_neuron(remove, skip, size):
    for dims in ([DIMS] * size, [SMOLLM] * size):
        budget = remove * sum(d.weights for d in dims)
        table = random_table(dims)
        inner = range(skip[0], size - skip[1])
        share = budget / sum(dims[i].weights for i in inner)
        kept = everywhere_alike(*skip)(table, dims, budget)
        assert abs(removed_weights(kept, dims) - budget) <= dims[0].cost("neuron") / 2 + 1e-6
        for i, families in enumerate(kept):
            gone = {family: int((~stays).sum()) for family, stays in families.items()}
            if i not in inner:
                assert gone == {"kv_group": 0, "neuron": 0}
                continue
            assert gone["kv_group"] == int(share * 3 + 1e-6)
            for family, stays in families.items():
                if gone[family]:
                    scores = table[i][family]
                    assert scores[~stays].max() < scores[stays].min()
        neurons = [int((~kept[i]["neuron"]).sum()) for i in inner]
        assert max(neurons) - min(neurons) <= 1


@pytest.mark.parametrize("remove", [0.55, 0.6, 0.65])
def test_groups_go_where_neurons_are_too_few(remove):
    dims = [replace(DIMS, neurons=48)] * 3
    budget = remove * sum(d.weights for d in dims)
    kept = everywhere_alike()(random_table(dims), dims, budget)
    assert abs(removed_weights(kept, dims) - budget) <= dims[0].cost("neuron") / 2 + 1e-6
    assert all(stays.any() for families in kept for stays in families.values())


def test_skipping_all_layers_is_refused():
    with pytest.raises(InputError, match="leaves none to prune"):
        everywhere_alike(2, 1)(random_table([DIMS] * 3), [DIMS] * 3, 100.0)


@pytest.mark.parametrize("remove", AWKWARD)
def test_ranked_together_meets_the_total_within_a_unit(remove):
    dims = [DIMS] * 5
    table = random_table(dims, seed=3)
    budget = remove * sum(d.weights for d in dims)
    kept = ranked_together(table, dims, budget)
    assert abs(removed_weights(kept, dims) - budget) <= DIMS.cost("kv_group") / 2
    check_kept(kept)
    best = [{family: scores.argmax() for family, scores in scored.items()} for scored in table]
    assert all(kept[i][f][at] for i, each in enumerate(best) for f, at in each.items())
    gone = [s for i, k in enumerate(kept) for f, stays in k.items() for s in table[i][f][~stays]]
    stay = [
        score
        for i, k in enumerate(kept)
        for f, stays in k.items()
        for at, score in enumerate(table[i][f])
        if stays[at] and at != best[i][f]
    ]
    assert len(gone) + len(stay) == 5 * (3 + 96 - 2)
    if gone:
        assert max(gone) < min(stay)


def test_ranked_together_never_empties_a_layer_of_low_scores():
    table = random_table([DIMS] * 3)
    table[1] = {family: scores - 100 for family, scores in table[1].items()}
    total = 3 * DIMS.weights
    kept = ranked_together(table, [DIMS] * 3, 0.33 * total)
    assert kept[1]["kv_group"].sum() == 1
    assert kept[1]["neuron"].sum() == 1
    with pytest.raises(InputError, match="would empty whole layers"):
        ranked_together(table, [DIMS] * 3, 0.99 * total)


def test_ranked_together_takes_ties_in_order():
    table = [{"neuron": np.zeros(4)}, {"neuron": np.zeros(4)}]
    kept = ranked_together(table, [DIMS] * 2, 2.0 * DIMS.cost("neuron"))
    # The first unit of each layer is its best, by index.
    assert [each["neuron"].tolist() for each in kept] == [[True, False, False, True], [True] * 4]


def test_a_layer_without_units_is_refused_by_its_number():
    with pytest.raises(InputError, match="Layer 1 would lose every neuron"):
        check_kept([{"neuron": np.array([True])}, {"neuron": np.array([False, False])}])
