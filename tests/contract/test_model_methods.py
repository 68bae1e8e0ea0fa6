"""What every method of weight pruning in the table promises; a new row needs no line here."""

import copy
import dataclasses
import json
from functools import cache
from itertools import cycle
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_prune import METHODS, Plan, load_method
from model_prune.checkpoint import write_checkpoint
from model_prune.core import decoder
from model_prune.core.mask import apply_masks, element_masks, units_masked
from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, MIXTURES
from model_prune.core.units import kept_weights
from model_prune.method import Depth, Either, Elements, Method, Units
from prune_core.errors import InputError, RecipeError
from prune_core.testing import unregistered
from tiny_decoders import FAMILIES, LAYERS, dims_of, random_windows, roomy_decoder, units
from tiny_mixtures import EXPERTS, tiny_mixture

WINDOWS, IDS = random_windows(), random_windows(2, 20, seed=1)
# Whose units are ranked at their cost, so that a KV group may be what is missing or too much.
RANKED = ("flap", "obspa", "spa")
# Of methods that search or learn for long: as few steps as show what is promised here.
QUICK = {
    "icbs": {"steps": 2, "block": 32},
    "prunenet": {"episodes": 2},
    "tyr": {"iterations": 2, "generations": 2, "offspring": 4, "width": 0.2},
}


def accepts(kind, **settings):
    try:
        kind(**settings)
    except InputError:
        return False
    return True


def choices(kind):
    """Settings that take another value than the default, one at a time."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, hint in get_type_hints(kind).items():
        if name in defaults and get_origin(hint) is Literal:
            yield from ({name: value} for value in get_args(hint) if value != defaults[name])


def usual(name):
    """The ways to say how much a method removes."""
    kind = METHODS.get(name)
    if issubclass(kind, Elements):
        yield {"sparsity": 0.5}
        if accepts(kind, pattern="2:4"):
            yield {"pattern": "2:4"}
    if issubclass(kind, Units | Either):
        yield {"remove": 0.35}
    if issubclass(kind, Depth):
        yield {"remove": 0.5}
    if kind.mixtures:
        yield {"keep": 5}


def families(name):
    """Of models that a method knows."""
    return MIXTURES if METHODS.get(name).mixtures else FAMILIES


NAMES = [row.name for row in METHODS]
USUAL = [(name, settings) for name in NAMES for settings in usual(name)]
ALL = USUAL + [
    (name, next(usual(name)) | other) for name in NAMES for other in choices(METHODS.get(name))
]
# Every case in one family, in turn.
TURNS = {names: cycle(names) for names in (FAMILIES, MIXTURES)}
CASES = [(*case, next(TURNS[families(case[0])])) for case in ALL]


def label(case):
    name, settings, *family = case
    return "-".join([name, *(f"{k}={v}" for k, v in settings.items()), *family])


def made(name, settings):
    return load_method(name, **(QUICK.get(name, {}) | settings))


def plan_of(name, settings, model, **more):
    return made(name, settings).plan(model, WINDOWS, progress=False, **more)


def fresh(family, **settings):
    return (tiny_mixture if family in MIXTURES else roomy_decoder)(family, **settings)


@cache
def dense(family):
    """To be copied, not changed."""
    return fresh(family)


@cache
def _planned(name, settings, family):
    return plan_of(name, dict(settings), dense(family))


@pytest.fixture(params=CASES, ids=label)
def case(request):
    """(name, settings, family, plan)."""
    name, settings, family = request.param
    return name, settings, family, _planned(name, tuple(settings.items()), family)


def pruned(case):
    return case[3].apply(copy.deepcopy(dense(case[2])))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_same_plan(found, expected):
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert_equal(mine.tensors(), theirs.tensors())


# ------------------------------------------------------------------ the table
def test_no_method_is_missing_from_the_table():
    assert unregistered(METHODS, "model_prune.methods") == []


@pytest.mark.parametrize("name", NAMES)
def test_the_row_is_its_class(name):
    kind = METHODS.get(name)
    assert kind.name == name
    assert issubclass(kind, Method)
    assert ("calibration text" in METHODS.row(name).needs) == bool(kind.windows)
    assert bool(kind.windows) == bool(kind.tokens)
    assert list(usual(name))  # or nothing here tests it


# ------------------------------------------------------------------ the model given
def snapshot(model):
    """All of a model that somebody may rely on."""
    return {
        "bits": bits(model),
        "same": [id(parameter) for parameter in model.parameters()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "modes": [module.training for module in model.modules()],
        "modules": [(id(module), type(module)) for module in model.modules()],
        "hooks": [
            [
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            ]
            for module in model.modules()
        ],
        "config": model.config.to_json_string(),
        "random": torch.get_rng_state(),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert_equal(after.pop("bits"), before.pop("bits"))
    assert torch.equal(after.pop("random"), before.pop("random"))
    grads, were = after.pop("grads"), before.pop("grads")
    assert all(
        torch.equal(grads[n], g) if g is not None else grads[n] is None for n, g in were.items()
    )
    assert after == before


def in_use(family):
    """A model in the middle of training: gradients, a frozen part, a hook."""
    model = copy.deepcopy(dense(family)).train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    for parameter in model.model.layers[2].parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    model.model.layers[3].mlp.register_forward_hook(lambda *_: None)
    return model


def test_a_plan_leaves_the_model_as_it_is(case):
    name, settings, family, expected = case
    model = in_use(family)
    before = snapshot(model)
    plan = plan_of(name, settings, model)
    assert_untouched(model, before)
    assert_same_plan(plan, expected)  # and none of that matters


@pytest.mark.parametrize(("name", "settings"), USUAL, ids=[label(case) for case in USUAL])
def test_nor_does_one_that_breaks_off(name, settings, monkeypatch):
    class Broken(Exception):
        pass

    model, state = in_use(families(name)[0]), decoder._Loaded.state

    def fail(*_):
        raise Broken

    monkeypatch.setattr(
        decoder._Loaded, "state", lambda self, i: state(self, i) if i < 2 else fail()
    )
    model.model.layers[2].self_attn.o_proj.register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(Broken):
        plan_of(name, settings, model)
    assert_untouched(model, before)


def test_the_same_twice(case):
    name, settings, family, plan = case
    assert_same_plan(plan_of(name, settings, dense(family)), plan)


# ------------------------------------------------------------------ how much goes
NOTHING = [
    (name, {key: 0.0})
    for name, settings in USUAL
    for key in ("sparsity", "remove")
    if key in settings
] + [(name, {"keep": EXPERTS}) for name, settings in USUAL if "keep" in settings]


@pytest.mark.parametrize(("name", "settings"), NOTHING, ids=[label(case) for case in NOTHING])
def test_removing_nothing_is_identity_bit_for_bit(name, settings):
    for family in families(name):
        model = copy.deepcopy(dense(family))
        assert plan_of(name, settings, model).apply(model) is model
        assert type(model) is type(dense(family))
        assert_equal(bits(model), bits(dense(family)))


def zeros_of(layer, sizes):
    return sum(int((~kept_weights(layer, sizes, matrix)).sum()) for matrix in MATRICES)


def missed(plan, model):
    """How many weights more than asked for are gone, and what a unit of the method's has."""
    dims, kind = dims_of(model), METHODS.get(plan.method)
    total = sum(each.weights for each in dims)
    gone = sum(zeros_of(layer, sizes) for layer, sizes in zip(plan.layers, dims, strict=True))
    if "keep" in plan.settings:
        fewer = EXPERTS - plan.settings["keep"]
        return gone - sum(fewer * sizes.cost("expert") for sizes in dims if sizes.experts), 0
    if "remove" in plan.settings and plan.settings["remove"] is not None:
        unit = dims[0].cost("kv_group" if plan.method in RANKED else "neuron")
        return gone - plan.settings["remove"] * total, unit / 2
    # A weight of every row, as counts are whole numbers; and never one more than asked for.
    rows = sum(sizes.shape(matrix)[0] for sizes in dims for matrix in MATRICES)
    share = kind(**plan.settings).share
    return gone - share * total, rows


def test_the_target_is_met_to_one_unit(case):
    name, _, family, plan = case
    over, unit = missed(plan, dense(family))
    if issubclass(METHODS.get(name), Depth):
        assert sum(layer.removed for layer in plan.layers) == LAYERS / 2
        return
    assert abs(over) <= unit + 1e-6
    if not any(layer.units for layer in plan.layers):
        assert over <= 1e-6


@pytest.mark.parametrize("share", [0.01, 0.137, 0.25, 0.4567])
@pytest.mark.parametrize("name", NAMES)
def test_awkward_targets_are_met(name, share):
    kind = METHODS.get(name)
    for key in {"sparsity", "remove"} & {field.name for field in dataclasses.fields(kind)}:
        plan = plan_of(name, {key: share}, dense("llama"))
        if issubclass(kind, Depth):
            assert sum(layer.removed for layer in plan.layers) == round(share * LAYERS)
        else:
            over, unit = missed(plan, dense("llama"))
            assert abs(over) <= unit + 1e-6


@pytest.mark.parametrize("name", [name for name, s in USUAL if "pattern" in s])
def test_a_pattern_holds_in_every_group(name):
    for pattern, keep, block in (("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("2:3", 2, 3)):
        plan = plan_of(name, {"pattern": pattern}, dense("qwen3"))
        model = plan.apply(copy.deepcopy(dense("qwen3")))
        for i, layer in enumerate(plan.layers):
            assert layer.masks.keys() == set(MATRICES)
            for matrix, mask in layer.masks.items():
                assert (mask.view(len(mask), -1, block).sum(-1) == keep).all()
                weight = model.model.layers[i].get_submodule(matrix).weight
                assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("name", [name for name, s in USUAL if "sparsity" in s])
def test_targets_alone_are_pruned(name):
    plan = plan_of(name, {"sparsity": 0.5, "targets": ["layers.[13].mlp.*"]}, dense("llama"))
    pruned_ones = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert [set(layer.masks) for layer in plan.layers] == [set(), pruned_ones] * 2
    with pytest.raises(InputError, match=r"'mlp\.up' matches none .* Did you mean"):
        plan_of(name, {"sparsity": 0.5, "targets": ["mlp.up"]}, dense("llama"))


# ------------------------------------------------------------------ what comes of it
def test_masked_is_cut(case):
    _, _, family, plan = case
    model, dims = copy.deepcopy(dense(family)), dims_of(dense(family))
    if family in MIXTURES:
        with pytest.raises(InputError, match="Experts cannot be masked"):
            units_masked(model, dims, plan.layers).__enter__()
    elif any(layer.units for layer in plan.layers):
        # Without new weights and biases, of which masking units knows nothing.
        bare = [LayerPlan(units=layer.units) for layer in plan.layers]
        with units_masked(model, dims, plan.layers):
            masked = logits(model)
        assert not any(module._forward_pre_hooks for module in model.modules())
        cut = logits(dataclasses.replace(plan, layers=bare).apply(model))
        torch.testing.assert_close(masked, cut, rtol=1e-5, atol=1e-5 * cut.abs().max().item())
    elif any(layer.masks for layer in plan.layers):
        for i, layer in enumerate(plan.layers):
            for matrix, weight in layer.weights.items():
                model.model.layers[i].get_submodule(matrix).weight.data.copy_(weight)
        apply_masks(model, element_masks(plan.layers))
        assert_equal(bits(model), bits(pruned(case)))


def test_embeddings_stay_tied_or_untied(case):
    assert METHODS.row(case[0])
    model = pruned(case)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, dense(case[2]).lm_head.weight)


@pytest.mark.parametrize(("name", "settings"), USUAL, ids=[label(case) for case in USUAL])
def test_what_is_no_matrix_of_a_layer_stays(name, settings):
    model = fresh(families(name)[2], tie_word_embeddings=False)
    before = bits(model)
    after = bits(plan_of(name, settings, model).apply(model))
    outside = [name for name in before if not name.startswith("model.layers.")]
    assert "lm_head.weight" in outside
    assert_equal({n: after[n] for n in outside}, {n: before[n] for n in outside})


EVERYWHERE = [(*case, family) for case in USUAL for family in families(case[0])]


@pytest.mark.parametrize(
    ("name", "settings", "family"), EVERYWHERE, ids=[label(case) for case in EVERYWHERE]
)
def test_saved_and_loaded_gives_the_same_logits(name, settings, family, tmp_path):
    plan = _planned(name, tuple(settings.items()), family)
    model = plan.apply(copy.deepcopy(dense(family)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(dense(family)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_folder_is_planned_and_written_as_the_model_in_memory(case, tmp_path):
    name, settings, family, expected = case
    dense(family).save_pretrained(tmp_path / "dense")
    plan = plan_of(name, settings, tmp_path / "dense", work=tmp_path / "work")
    assert_same_plan(plan, expected)
    about = plan.to_dict()
    write_checkpoint(
        tmp_path / "dense", tmp_path / "out", plan.layers, plan_json=about, progress=False
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    pruned(case).save_pretrained(tmp_path / "saved")
    in_memory = load_file(tmp_path / "saved" / "model.safetensors")
    assert_equal(written, in_memory)


@pytest.mark.parametrize(("name", "settings"), USUAL, ids=[label(case) for case in USUAL])
def test_the_dtype_stays(name, settings):
    model = copy.deepcopy(dense(families(name)[1])).bfloat16()
    plan = plan_of(name, settings, model)
    assert {p.dtype for p in plan.apply(model).parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


AGAIN = [case for case in USUAL if families(case[0]) is FAMILIES]


@pytest.mark.parametrize(("name", "settings"), AGAIN, ids=[label(case) for case in AGAIN])
def test_a_pruned_model_can_be_pruned_again(name, settings):
    first = [LayerPlan() for _ in range(LAYERS)]
    first[1] = LayerPlan(units=units(kv_group=[0, 2], neuron=[*range(20), *range(40, 96)]))
    first[2] = LayerPlan(units=units(neuron=[*range(16, 96)]))
    start = _planned("random", (("remove", 0.35),), "llama")
    model = dataclasses.replace(start, layers=first).apply(copy.deepcopy(dense("llama")))
    if "remove" in settings and not issubclass(METHODS.get(name), Depth):
        settings = {"remove": 0.25}
    plan = plan_of(name, settings, model)
    if not issubclass(METHODS.get(name), Depth):
        over, unit = missed(plan, model)
        assert abs(over) <= unit + 1e-6
    assert logits(plan.apply(model)).isfinite().all()


# ------------------------------------------------------------------ the plan
def test_a_plan_is_saved_and_replayed(case, tmp_path):
    _, _, family, plan = case
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert_same_plan(loaded, plan)
    assert loaded.to_dict() == json.loads((tmp_path / "plan.json").read_text())
    replayed = loaded.apply(copy.deepcopy(dense(family)))
    assert_equal(bits(replayed), bits(pruned(case)))
    assert torch.equal(logits(replayed), logits(pruned(case)))


def test_a_plan_agrees_with_itself_and_with_nothing_else(case):
    plan = case[3]
    itself = plan.compare(plan)
    assert itself.keys() == {f"layers.{i}.{m}" for i in range(LAYERS) for m in MATRICES}
    assert set(itself.values()) == {1.0}
    nothing = dataclasses.replace(plan, layers=[LayerPlan()] * LAYERS)
    agreed = nothing.compare(plan)
    for name, share in agreed.items():
        _, i, matrix = name.split(".", 2)
        full = kept_weights(plan.layers[int(i)], plan.dims[int(i)], matrix).all()
        assert share == (1.0 if full else 0.0)
    assert 0 in agreed.values()


def test_a_plan_says_all_in_json(case):
    name, settings, family, plan = case
    said = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert said == plan.to_dict()
    assert said["method"] == name
    assert {key: said["settings"][key] for key in settings} == settings
    assert load_method(name, **said["settings"]) == made(name, settings)
    assert said["model"]["type"] == family
    assert bool(said["calibration"]) == bool(made(name, settings).reads)
    for i, layer in enumerate(said["layers"]):
        own = plan.layers[i]
        assert layer["zeros"] == {m: int((~mask).sum()) for m, mask in own.masks.items()}
        assert layer["removed"] == own.removed
        assert layer["kept"].keys() == set(plan.dims[i].units)


def test_a_plan_refuses_another_model(case):
    _, _, family, plan = case
    other = fresh(family, num_hidden_layers=3, layer_types=None)
    before = bits(other)
    with pytest.raises(InputError, match=r"made for .*, a model of 4 layers of other sizes"):
        plan.apply(other)
    assert_equal(bits(other), before)


# ------------------------------------------------------------------ refusals
BAD = [
    ({"sparsity": 50.0}, r"sparsity is a share in \[0, 1\), got 50: write 0.5 for 50 %\."),
    ({"sparsity": -0.1}, r"sparsity is a share in \[0, 1\), got -0.1\."),
    ({"sparsity": 1.0}, r"sparsity is a share in \[0, 1\)"),
    ({"sparsity": float("nan")}, r"sparsity is a share in \[0, 1\)"),
    ({"pattern": "2:5x"}, r"N:M is written like 2:4, got '2:5x'\."),
    ({"pattern": "4:4"}, r"0 < N < M"),
    ({"pattern": "2:4", "sparsity": 0.6}, r"2:4 makes a share of 0.5 zero, and sparsity is 0.6"),
    ({"remove": -0.1}, r"remove is a share in \[0, 1\), got -0.1\."),
    ({"remove": 20.0}, r"remove is a share in \[0, 1\), got 20: write 0.2 for 20 %\."),
    ({"remove": 1.0}, r"remove is a share in \[0, 1\)"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[label(("", bad)) for bad, _ in BAD])
@pytest.mark.parametrize("name", NAMES)
def test_settings_out_of_range_are_refused_by_a_sentence(name, bad, words):
    fields = {field.name for field in dataclasses.fields(METHODS.get(name))}
    if not bad.keys() <= fields:
        with pytest.raises(RecipeError, match="|".join(bad.keys() - fields)):
            load_method(name, **bad)
        return
    with pytest.raises(InputError, match=words):
        load_method(name, **bad)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("sparsegpt", {"block": 0}),
        ("sparsegpt", {"damping": -0.01}),
        ("owl", {"spread": -0.1}),
        ("owl", {"outlier": -1.0}),
        ("dsnot", {"cycles": -1}),
        ("tyr", {"levels": 1}),
        ("tyr", {"iterations": 0}),
        ("tyr", {"top": 0}),
    ],
)
def test_settings_of_their_own_are_refused_too(name, bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be at least"):
        load_method(name, **bad)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_settings_and_values_are_refused(name):
    with pytest.raises(RecipeError, match="sparsty"):
        load_method(name, sparsty=0.5)
    for setting in {key for other in choices(METHODS.get(name)) for key in other}:
        with pytest.raises(RecipeError, match=setting):
            load_method(name, **{setting: "nonsense"})


@pytest.mark.parametrize("name", NAMES)
def test_text_that_is_needed_is_asked_for(name):
    method = made(name, {})
    model = dense(families(name)[0])
    if not method.windows:
        plan = method.plan(model, progress=False)
        assert_same_plan(method.plan(model, WINDOWS, progress=False), plan)
        return
    with pytest.raises(InputError, match=f"{name} reads calibration text, and none is given"):
        method.plan(model, progress=False)


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(METHODS.get(n), Units | Depth)])
def test_a_network_is_never_emptied(name):
    with pytest.raises(InputError, match=r"remove less|leaves none"):
        plan_of(name, {"remove": 0.99}, dense("llama"))
