"""The calibration pass: what it sees, in which order, and how it stops and goes on."""

import copy
import json
import resource
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_prune import load_method
from model_prune.core import collect, decoder, elementwise
from model_prune.core.calibration import Calibration
from model_prune.core.collect import Step, walk
from model_prune.core.decoder import Decoder
from model_prune.core.elementwise import Elementwise
from model_prune.core.mask import element_masks
from model_prune.core.statistics import (
    AbsoluteMean,
    Cosine,
    Gram,
    LastTokens,
    Moments,
    SquaredNorm,
    angle,
)
from model_prune.core.target import SITES
from model_prune.core.work import Work, trim
from prune_core.errors import InputError
from tiny_decoders import FAMILIES, LAYERS, random_windows, roomy_decoder, tiny_decoder

WINDOWS = random_windows()
# One piece, even pieces, uneven ones, single tokens.
CUTS = [[60], [20] * 3, [1, 40, 2, 17], [1] * 60]


@pytest.fixture(scope="module")
def models():
    return {family: roomy_decoder(family) for family in FAMILIES}


@pytest.fixture
def llama(models):
    return models["llama"]


# ------------------------------------------------------------------ statistics
def activations():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 7)) * [1, 10, 0.01, 1, 1, 0, 5] + [0, 100, 0, -30, 2, 4, 0]
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("cut", CUTS, ids=len)
def test_statistics_are_numpys_of_all_tokens_however_they_are_cut(cut):
    x = activations()
    found = [Moments(), SquaredNorm(), AbsoluteMean(), Gram()]
    for piece in torch.split(x, cut):
        for statistic in found:
            statistic.update(piece)
    moments, squares, size, gram = found
    x = x.double().numpy()
    near = partial(np.testing.assert_allclose, rtol=1e-5)
    near(moments.mean, x.mean(0), atol=1e-7)
    near(moments.variance, x.var(0), atol=1e-7)
    near(moments.total(), x.var(0) * 60, atol=1e-5)
    near(moments.norm, np.linalg.norm(x, axis=0))
    near(squares.norm, np.linalg.norm(x, axis=0))
    near(squares.total(), (x**2).sum(0))
    near(size.mean, np.abs(x).mean(0))
    near(gram.total(), x.T @ x, atol=1e-3)
    assert [statistic.tokens for statistic in found] == [60] * 4


@pytest.mark.parametrize("cut", [[6], [2] * 3, [1, 4, 1]], ids=len)
def test_statistics_of_blocks_are_those_of_all_windows(cut):
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    plain, turned, last = Cosine(), Cosine(angle), LastTokens()
    for piece in torch.split(x, cut):
        for statistic in (plain, turned, last):
            statistic.update(piece)
    before, after = x.double().numpy()[..., :4], x.double().numpy()[..., 4:]
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosines = (before * after).sum(-1) / norms
    assert plain.mean == pytest.approx(cosines.mean(), rel=1e-5)
    assert turned.mean == pytest.approx(np.arccos(cosines).mean() / np.pi, rel=1e-5)
    assert torch.equal(last.total(), x[:, -1])


def test_the_angle_of_what_does_not_turn_is_zero_not_nan():
    same, turned = torch.rand(1, 500, 6), Cosine(angle)
    turned.update(torch.cat([same, same], -1))
    assert turned.mean == pytest.approx(0, abs=1e-3)


# ------------------------------------------------------------------ what is seen
class Seen:
    """A statistic that keeps all that it is given."""

    def __init__(self):
        self.pieces = []

    def update(self, x):
        self.pieces.append(x.clone())

    def total(self):
        return torch.cat(self.pieces)


def pass_over(model, order="dense", windows=WINDOWS, sites=(*SITES, "block"), **settings):
    """What every site of every layer was given, by (layer, site)."""
    found = {}

    def watch(i, layer):
        return {site: {"seen": found.setdefault((i, site), Seen())} for site in sites}

    step = Step(watch, lambda i, layer, site, statistics: {})
    settings = {"work": Work(), "progress": False, **settings}
    walk(Decoder.of(model), Calibration(windows), step, order=order, **settings)
    return {key: seen.total() for key, seen in found.items()}


@torch.no_grad()
def inputs_of(model, names, windows=WINDOWS):
    """Inputs of some modules when the model itself reads the windows, [tokens, in]."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.__setitem__(name, args[0].flatten(0, 1).clone())
        )
        for name in names
    ]
    model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_sees_what_the_model_computes(family, models):
    model = models[family]
    seen = pass_over(model)
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True, use_cache=False).hidden_states
        for i in range(LAYERS):
            before, after = seen[i, "block"].chunk(2, -1)
            torch.testing.assert_close(before, states[i], rtol=1e-4, atol=1e-4)
            if i == LAYERS - 1:  # the model's last ones are normed
                after = model.model.norm(after)
            torch.testing.assert_close(after, states[i + 1], rtol=1e-4, atol=1e-4)
    names = {(i, s): f"model.layers.{i}.{SITES[s][0]}" for i in range(LAYERS) for s in SITES}
    inputs = inputs_of(model, names.values())
    for key, name in names.items():
        torch.testing.assert_close(seen[key], inputs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["layer", "staged"])
def test_without_pruning_all_orders_see_the_same(order, llama):
    dense = pass_over(llama, sites=SITES)
    for key, seen in pass_over(llama, order, sites=SITES).items():
        torch.testing.assert_close(seen, dense[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["dense", "layer", "staged"])
def test_batches_change_nothing_of_statistics(order, llama):
    sites = SITES if order != "dense" else (*SITES, "block")
    whole = pass_over(llama, order, sites=sites, batch_tokens=10**6)
    for tokens in (1, 12, 40):
        for key, seen in pass_over(llama, order, sites=sites, batch_tokens=tokens).items():
            torch.testing.assert_close(seen, whole[key], rtol=1e-5, atol=1e-5)


def test_inputs_that_are_computed_again_are_the_same(llama, monkeypatch):
    method = load_method("sparsegpt", order="staged")
    expected = method.plan(llama, WINDOWS, progress=False)
    attended = []
    attend = collect.attend
    monkeypatch.setattr(collect, "attend", lambda *a: attended.append(1) or attend(*a))
    monkeypatch.setattr(elementwise, "walk", partial(walk, batch_tokens=24))
    for bound, times in ((collect.KEPT, 1), (0, 2)):
        attended.clear()
        monkeypatch.setattr(collect, "KEPT", bound)
        found = method.plan(llama, WINDOWS, progress=False)
        assert min(found.compare(expected).values()) == 1
        assert len(attended) == times * 4 * LAYERS  # of four batches


@pytest.mark.parametrize("order", ["layer", "staged"])
def test_batches_change_no_mask(order, llama, monkeypatch):
    method = load_method("wanda", order=order)
    expected = method.plan(llama, WINDOWS, progress=False)
    for tokens in (1, 40):
        monkeypatch.setattr(elementwise, "walk", partial(walk, batch_tokens=tokens))
        assert min(method.plan(llama, WINDOWS, progress=False).compare(expected).values()) == 1


# ------------------------------------------------------------------ the orders
def pruned_by_hand(model, groups):
    """Wanda with the model's own forward pass before every group of matrices is pruned."""
    model, masks = copy.deepcopy(model), {}
    for i in range(LAYERS):
        for group in groups:
            names = [f"model.layers.{i}.{matrix}" for matrix in group]
            inputs = inputs_of(model, names)
            for name in names:
                weight = model.get_submodule(name).weight
                scores = weight.detach().abs() * inputs[name].double().norm(dim=0)
                bound = scores.sort(1).values[:, scores.shape[1] // 2, None]
                masks[f"{name}.weight"] = scores >= bound
                weight.data *= scores >= bound
    return masks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["layer", "staged"])
def test_layers_are_fed_what_the_pruned_ones_before_give(order, family, models):
    model = models[family]
    groups = SITES.values() if order == "staged" else [[m for site in SITES.values() for m in site]]
    expected = pruned_by_hand(model, groups)
    plan = load_method("wanda", order=order).plan(model, WINDOWS, progress=False)
    found = element_masks(plan.layers)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    # or the case tells nothing
    other = load_method("wanda", order={"layer": "staged", "staged": "layer"}[order])
    assert min(other.plan(model, WINDOWS, progress=False).compare(plan).values()) < 1


def test_one_statistic_serves_all_matrices_of_a_site(llama):
    made = []

    class Counted(SquaredNorm):
        def __init__(self):
            super().__init__()
            made.append(self)

    given = []

    def solve(weights, statistics, sparsities):
        given.append((statistics["inputs"], list(weights)))
        return {name: (None, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}

    names = [f"layers.{i}.{m}" for i in range(LAYERS) for site in SITES.values() for m in site]
    recipe = Elementwise(solve, dict.fromkeys(names, 0.5), {"inputs": Counted})
    recipe.layers(Decoder.of(llama), Calibration(WINDOWS), Work(), False)
    assert len(made) == LAYERS * len(SITES)
    assert [name for _, names in given for name in names] == names
    assert {id(statistic) for statistic, _ in given} == {id(statistic) for statistic in made}
    assert {statistic.tokens for statistic in made} == {WINDOWS.numel()}


def test_sites_without_targets_are_not_watched(llama):
    method = load_method("wanda", targets=["layers.2.mlp.*", "o_proj"])
    watched = method.recipe(Decoder.of(llama))._watch
    assert list(watched(0, None)) == ["attn_out"]
    assert list(watched(2, None)) == ["attn_out", "mlp_in", "mlp_mid"]


# ------------------------------------------------------------------ refusals
METHODS = ["wanda", "sparsegpt", "flap", "cfsp", "angle", "magnitude"]


@pytest.mark.parametrize("matrix", ["self_attn.q_proj", "mlp.down_proj"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_are_told_by_their_layer(method, matrix, llama):
    model = copy.deepcopy(llama)
    model.get_submodule(f"model.layers.2.{matrix}").weight.data[0, 3] = torch.nan
    with pytest.raises(InputError, match=r"layer 2 .*NaN"):
        load_method(method).plan(model, WINDOWS, progress=False)


@pytest.mark.parametrize("order", ["dense", "layer", "staged"])
def test_numbers_that_overflow_are_told_by_their_layer(order, llama):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp.down_proj.weight.data *= 3e38
    with pytest.raises(InputError, match="activations after layer 1 are not finite"):
        pass_over(model, order, sites=SITES)
    model = copy.deepcopy(llama)
    model.model.layers[3].mlp.up_proj.weight.data *= 3e38
    # Where something is solved before the layer is done, by what it is solved from.
    words = {"dense": "activations after layer 3"}.get(
        order, r"inputs of mlp\.down_proj in layer 3"
    )
    with pytest.raises(InputError, match=words):
        pass_over(model, order, sites=SITES)


def test_a_broken_embedding_is_told(llama):
    model = copy.deepcopy(llama)
    model.model.embed_tokens.weight.data[WINDOWS[0, 0]] = torch.inf
    for order in ("dense", "layer", "staged"):
        with pytest.raises(InputError, match="layer 0 are not finite"):
            pass_over(model, order, sites=SITES)


@pytest.mark.parametrize("stored", [False, True])
def test_tokens_of_another_vocabulary_are_refused(stored, llama, tmp_path):
    if stored:
        llama.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenise the text with the model's own"):
        load_method("wanda").plan(tmp_path if stored else llama, WINDOWS + 90, progress=False)


def test_windows_longer_than_the_model_reads_are_refused():
    load_method("wanda").plan(
        roomy_decoder("llama", max_position_embeddings=12), WINDOWS, progress=False
    )
    short = roomy_decoder("llama", max_position_embeddings=11)
    for method in ("wanda", "llm_pruner", "adapt_pruner"):
        with pytest.raises(InputError, match=r"reads at most 11 tokens, and a .+ has 12"):
            load_method(method).plan(short, WINDOWS, progress=False)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_windows_longer_than_a_sliding_one_are_refused(family):
    model = tiny_decoder(family)
    load_method("wanda").plan(model, random_windows(tokens=6), progress=False)
    with pytest.raises(InputError, match=r"attends to 6 tokens at a time, and a .* window has 7"):
        load_method("wanda").plan(model, random_windows(tokens=7), progress=False)


def test_a_sliding_window_that_no_layer_has_does_not_count():
    model = tiny_decoder("qwen3", layer_types=["full_attention"] * 4)
    assert model.config.sliding_window == 6
    load_method("wanda").plan(model, WINDOWS, progress=False)


# ------------------------------------------------------------------ memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_between_blocks_in_use_is_given_back():
    def resident():
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    blocks = [torch.ones(16384) for _ in range(4000)]  # 64 KiB each: of the heap, not mapped
    used = resident()
    blocks = blocks[::10]
    trim()
    assert used - resident() > 150 << 20
    assert len(blocks) == 400


# ------------------------------------------------------------------ stopped and resumed
class Stopped(Exception):
    pass


def stopping(monkeypatch, after=None):
    """Make the pass raise when a site is solved after so many; returns what was solved."""
    solve, solved = collect._solve, []

    def stop(i, layer, step, site, statistics):
        if len(solved) == after:
            raise Stopped
        solved.append((i, site))
        return solve(i, layer, step, site, statistics)

    monkeypatch.setattr(collect, "_solve", stop)
    return solved


RESUMED = {
    "wanda": {},
    "wanda staged": {"order": "staged"},
    "sparsegpt": {"block": 32},
    "sparsegpt staged": {"order": "staged"},
    "sparsegpt pattern": {"pattern": "2:4"},
    "dsnot": {},
    "owl": {},
    "flap": {"remove": 0.35},
    "flap least_squares": {"remove": 0.35, "compensation": "least_squares"},
    "cfsp": {"remove": 0.3},
    "amp": {"remove": 0.35},
    "angle": {"remove": 0.3},
}


def tensors_of(plan):
    return [layer.tensors() for layer in plan.layers]


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("at", [0, 0.45, 0.8])
def test_stopped_and_resumed_is_uninterrupted(case, at, llama, tmp_path, monkeypatch):
    method = load_method(case.split()[0], **RESUMED[case])
    plan = partial(method.plan, llama, WINDOWS, progress=False)
    with monkeypatch.context() as patched:
        solved = stopping(patched)
        expected = tensors_of(plan())
    with monkeypatch.context() as patched:
        first = stopping(patched, after=int(at * len(solved)))
        with pytest.raises(Stopped):
            plan(work=tmp_path)
    with monkeypatch.context() as patched:
        second = stopping(patched)
        assert_same(tensors_of(plan(work=tmp_path)), expected)
    # Whole layers that were done are not done again.
    assert len(solved) <= len(first) + len(second) < len(solved) + len(SITES)
    with monkeypatch.context() as patched:
        third = stopping(patched)
        assert_same(tensors_of(plan(work=tmp_path)), expected)
    assert third == []


def test_a_work_folder_of_other_work_is_refused(models, tmp_path):
    load_method("wanda").plan(models["llama"], WINDOWS, work=tmp_path, progress=False)
    others = {
        "'settings'": (load_method("wanda", sparsity=0.4), models["llama"], WINDOWS),
        "'method'": (load_method("ria"), models["llama"], WINDOWS),
        "'calibration'": (load_method("wanda"), models["llama"], WINDOWS.flip(0)),
        "'model'": (load_method("wanda"), models["qwen2"], WINDOWS),
    }
    trained = copy.deepcopy(models["llama"])
    trained.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    for what, (method, model, windows) in [
        *others.items(),
        ("'model'", (load_method("wanda"), trained, WINDOWS)),
    ]:
        with pytest.raises(InputError, match=f"made by other work: {what}"):
            method.plan(model, windows, work=tmp_path, progress=False)


def test_half_a_result_is_no_result(llama, tmp_path, monkeypatch):
    """A run that dies while it writes leaves no file that a later one would take for whole."""
    from model_prune.core import work as module

    method = load_method("wanda")
    monkeypatch.setattr(module, "save", lambda tensors: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        method.plan(llama, WINDOWS, work=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["fingerprint.json"]
    json.loads((tmp_path / "fingerprint.json").read_text())


# ------------------------------------------------------------------ memory
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "flap", "owl", "angle", "magnitude"])
def test_one_layer_is_in_memory_at_a_time(method, stored, llama, tmp_path, monkeypatch):
    build, built = decoder.build_layer, []

    def watched(config, i):
        assert [layer for layer in built if layer() is not None] == []
        layer = build(config, i)
        built.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(decoder, "build_layer", watched)
    if stored:
        llama.save_pretrained(tmp_path)
    load_method(method).plan(tmp_path if stored else llama, WINDOWS, progress=False)
    assert len(built) % LAYERS == 0
    assert built


def test_a_stored_model_is_never_loaded_whole(llama, tmp_path, monkeypatch):
    import transformers

    llama.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)
    plan = load_method("flap").plan(tmp_path, WINDOWS, progress=False)
    assert plan.model["name"] == tmp_path.name


# ------------------------------------------------------------------ calibration text
def words(text, **_):
    return {"input_ids": [int(word) for word in text.split()]}


def test_windows_are_cut_side_by_side_and_drawn_by_seed():
    text = " ".join(map(str, range(103)))
    cut = partial(Calibration.from_text, text, words, tokens=10)
    assert cut(windows=10).windows.flatten().tolist() == list(range(100))
    assert cut(windows=99).windows.shape == (10, 10)  # all that there are
    drawn = cut(windows=4, seed=1).windows
    starts = drawn[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert len(starts) == 4
    assert (drawn - drawn[:, :1]).tolist() == [list(range(10))] * 4
    assert torch.equal(drawn, cut(windows=4, seed=1).windows)
    others = {tuple(cut(windows=4, seed=seed).windows[:, 0].tolist()) for seed in range(8)}
    assert len(others) > 4


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="has 3 tokens, and one window is 4"):
        Calibration.from_text("1 2 3", words, windows=1, tokens=4)


@pytest.mark.parametrize(
    "windows", [torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), WINDOWS[:0]]
)
def test_what_are_no_windows_is_refused(windows):
    with pytest.raises(InputError, match=r"whole numbers \[windows, tokens\], at least one"):
        Calibration(windows)


def test_files_are_read_in_order_and_named(tmp_path):
    for name, text in (("a.txt", "1 2 3"), ("b.txt", "4 5 6")):
        (tmp_path / name).write_text(text)
    found = Calibration.read([tmp_path / "b.txt", tmp_path / "a.txt"], words, windows=9, tokens=3)
    assert found.windows.tolist() == [[4, 5, 6], [1, 2, 3]]
    assert found.to_dict() == {
        "source": "b.txt, a.txt",
        "windows": 2,
        "tokens": 3,
        "sha256": found.fingerprint,
    }
    assert found.fingerprint != Calibration(found.windows.flip(0)).fingerprint


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"Only causal language models .* got Linear"):
        Decoder.of(torch.nn.Linear(2, 2))
    other = torch.nn.Linear(2, 2)
    other.config, other.model = SimpleNamespace(model_type="gpt2"), SimpleNamespace(layers=[])
    with pytest.raises(InputError, match="Models of type 'gpt2' cannot be pruned yet"):
        Decoder.of(other)
