"""Mixtures of experts: what PreMoe scores, keeps and refuses, and what is left of the model."""

import copy
import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from model_prune import METHODS, Calibration, Plan, load_method, prune_model
from model_prune import checkpoint as checkpoints
from model_prune.checkpoint import open_checkpoint, write_checkpoint
from model_prune.core import decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.target import MIXTURES
from model_prune.decoders import pruned_config
from model_prune.methods import premoe
from model_prune.methods.premoe import PreMoe, Selection, ranking
from model_prune.patterns import Nearest, Patterns, distance
from prune_core.errors import CheckpointError, InputError
from tiny_decoders import LAYERS, dims_of, random_windows, tiny_decoder, units
from tiny_mixtures import EXPERTS, tiny_mixture

WINDOWS = random_windows()


def planned(model, **settings):
    return load_method("premoe", **settings).plan(model, WINDOWS, progress=False)


def kept(plan):
    return [layer.units["expert"].tolist() if layer.units else None for layer in plan.layers]


def mixtures_of(model):
    return [i for i, dims in enumerate(dims_of(model)) if dims.experts]


@torch.no_grad()
def logits(model):
    return model(WINDOWS).logits


# ------------------------------------------------------------------ the score
class Router:
    """As transformers' routers: logits, weights and chosen experts of 2 a token."""

    def __init__(self, weight, top=2):
        self.weight, self.num_experts, self.top = weight, len(weight), top

    def __call__(self, x):
        found = x @ self.weight.T
        weights, chosen = found.softmax(-1).topk(self.top, -1)
        return found, weights, chosen


def selection(rows, **settings):
    """Of tokens whose logits are these rows."""
    logits = torch.tensor(rows)
    found = Selection(Router(torch.eye(logits.shape[1])), **settings)
    for part in logits.split(2):  # as batches come
        found.update(part)
    means = found.means()
    return means["probability"], means["frequency"]


def test_the_score_is_the_mean_probability_where_an_expert_is_selected():
    # exp of the logits: 4 2 1 1, 1 1 6 2, 1 3 1 3 (ties go to the first).
    rows = torch.tensor([[4.0, 2, 1, 1], [1, 1, 6, 2], [1, 3, 1, 3]]).log().tolist()
    probability, frequency = selection(rows)
    expected = torch.tensor([4 / 8, 2 / 8 + 3 / 8, 6 / 10, 2 / 10 + 3 / 8], dtype=torch.float64) / 3
    torch.testing.assert_close(probability, expected, rtol=1e-6, atol=0)
    assert (3 * frequency).tolist() == pytest.approx([1, 2, 1, 2])
    one, _ = selection(rows, top=1)
    assert (3 * one).tolist() == pytest.approx([4 / 8, 3 / 8, 6 / 10, 0])
    # Of the two that a token has, shares are 4/6 and 2/6, 6/8 and 2/8, 1/2 and 1/2.
    sure, same = selection(rows, threshold=0.3)
    assert (3 * sure).tolist() == pytest.approx([4 / 8, 5 / 8, 6 / 10, 3 / 8])
    assert torch.equal(same, frequency)  # what the model does is as before
    assert (3 * selection(rows, threshold=0.6)[0]).tolist() == pytest.approx([4 / 8, 0, 6 / 10, 0])


def test_a_used_expert_outranks_an_unused_one_whatever_the_sign_of_its_logits():
    """The published code sums raw logits, so that one that is chosen at −3 comes below 0."""
    rows = [[-3.0, -4.0, -9.0, -9.0], [-3.5, -9.0, -2.0, -9.0]]
    raw = torch.zeros(4)
    for row in torch.tensor(rows):
        raw += torch.zeros(4).scatter(0, row.topk(2).indices, row.topk(2).values)
    assert raw.argmax() == 3  # the only one that no token goes to
    assert ranking(selection(rows))[-1] == 3
    # Nor does it where its probability is less than float32 can say.
    rows = [[0.0, -200.0, -300.0], [0.0, -200.0, -300.0]]
    probability, frequency = selection(rows)
    assert probability[1] == 0
    assert ranking((probability, frequency)).tolist() == [0, 1, 2]


def test_equal_scores_go_by_the_next_and_then_by_position():
    scores = (torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert ranking(scores).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("family", MIXTURES)
def test_scores_are_those_of_the_model_s_own_routers(family):
    model = tiny_mixture(family)
    found = {}
    for i in mixtures_of(model):
        gate = model.model.layers[i].mlp.gate
        gate.register_forward_hook(lambda _, __, out, i=i: found.setdefault(i, out))
    logits(model)
    for score in ("probability", "frequency"):
        chosen = kept(planned(model, keep=3, score=score))
        assert [i for i, own in enumerate(chosen) if own] == mixtures_of(model)
        for i, (raw, _, experts) in found.items():
            often = torch.zeros_like(raw).scatter(1, experts, 1.0)
            counts = often * raw.softmax(-1) if score == "probability" else often
            assert chosen[i] == counts.sum(0).topk(3).indices.sort().values.tolist()


def test_random_choices_differ_by_seed_and_layer():
    model = tiny_mixture("mixtral")
    draws = [kept(planned(model, score="random", seed=seed)) for seed in range(4)]
    assert len({str(draw) for draw in draws}) == 4
    assert len({str(layer) for layer in draws[0]}) > 1


# ------------------------------------------------------------------ what is left
def mask_routers(model, plan):
    """The experts that go get no token, and their weight goes to those that stay."""
    for layer, own in zip(model.model.layers, plan.layers, strict=True):
        if own.units:
            gate = layer.mlp.gate
            bias = torch.full((EXPERTS,), float("-inf"))
            bias[own.units["expert"]] = 0

            def forward(x, gate=gate, bias=bias):
                found = x.reshape(-1, gate.hidden_dim) @ gate.weight.T + bias
                weights, chosen = found.softmax(-1).topk(gate.top_k, -1)
                if getattr(gate, "norm_topk_prob", True):
                    weights = weights / weights.sum(-1, keepdim=True)
                return found, weights, chosen

            gate.forward = forward
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_a_smaller_mixture_is_one_whose_router_knows_fewer(family):
    model = tiny_mixture(family)
    plan = planned(model, keep=3)
    cut = plan.apply(copy.deepcopy(model))
    expected = logits(mask_routers(copy.deepcopy(model), plan))
    torch.testing.assert_close(logits(cut), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    assert type(cut) is type(model)
    assert {dims.experts for dims in dims_of(cut)} - {0} == {3}
    out = cut(WINDOWS, labels=WINDOWS, output_router_logits=True)  # training's balance too
    assert out.aux_loss.isfinite()


def test_what_is_no_routed_expert_stays():
    model = tiny_mixture("qwen2_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = planned(model, keep=2).apply(model).state_dict()
    routed = [name for name in before if ".experts." in name or name.endswith("mlp.gate.weight")]
    assert len(routed) == 3 * len(mixtures_of(model)) == 9
    assert all(len(after[name]) == 2 for name in routed)
    assert any("shared_expert." in name for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in routed)


def test_a_pruned_mixture_can_be_pruned_again():
    for family in MIXTURES:
        model = tiny_mixture(family)
        first = planned(model, keep=5)
        second = planned(first.apply(model), keep=2)
        for once, again in zip(kept(first), kept(second), strict=True):
            assert (once is None) == (again is None)
        assert logits(second.apply(model)).isfinite().all()
        assert {dims.experts for dims in dims_of(model)} - {0} == {2}


@pytest.mark.parametrize("family", MIXTURES)
def test_files_hold_only_what_is_kept_shard_by_shard(family, tmp_path, monkeypatch):
    model = tiny_mixture(family)
    model.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "SHARD", 1 << 15)
    report = prune_model(
        tmp_path / "whole",
        method="premoe",
        keep=4,
        calibration=Calibration(WINDOWS),
        out=tmp_path / "half",
        progress=False,
    )
    shards = sorted((tmp_path / "half").glob("model-*.safetensors"))
    assert len(shards) > 3
    state = {name: x for path in shards for name, x in load_file(path).items()}
    names = set(load_file(tmp_path / "whole" / "model.safetensors"))
    last = {name for name in names if any(f"experts.{e}." in name for e in range(4, EXPERTS))}
    assert set(state) == names - last
    gone = sum(4 * dims.cost("expert") for dims in dims_of(model) if dims.experts)
    assert report.weights[0] - report.weights[1] == gone > 0
    before, after = (open_checkpoint(tmp_path / name).nbytes for name in ("whole", "half"))
    routers = 4 * model.config.hidden_size * len(mixtures_of(model))
    assert before - after == pytest.approx(4 * (gone + routers), abs=2**14)  # of headers
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    expected = planned(model, keep=4).apply(model)
    assert torch.equal(logits(loaded), logits(expected))
    assert loaded.config.to_dict()["num_hidden_layers"] == LAYERS
    assert "experts" in str(report)
    assert "as a mixture of fewer experts" in report.answers["Where does it load?"]


def test_a_token_meets_as_many_experts_as_before():
    dims = dims_of(tiny_mixture("qwen2_moe"))
    assert [each.experts for each in dims] == [8, 0, 8, 8]
    assert dims[0].width == 8 * 24 + 16
    assert dims[0].idle == 6 * 3 * 48 * 24
    assert dims[1].width == 40
    assert dims[1].idle == 0


def test_a_file_that_lacks_an_expert_is_not_whole(tmp_path):
    tiny_mixture("mixtral").save_pretrained(tmp_path)
    from safetensors.torch import save_file

    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.2.block_sparse_moe.experts.7.w3.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2.*experts\.7\.w3"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------ refusals, reports
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 1}, r"sends a token to 2 of 8 experts, so keep must be .*, got 1\."),
        ({"keep": 9}, r"keep must be between these numbers, got 9\."),
        ({"top": 9}, r"top counts 9 experts a token, of 8"),
    ],
)
def test_too_few_and_too_many_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        planned(tiny_mixture("mixtral"), **settings)


@pytest.mark.parametrize("bad", [{"keep": 0}, {"top": 0}, {"threshold": 1.0}, {"threshold": -0.1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        load_method("premoe", **bad)


def test_methods_and_models_that_do_not_go_together_are_told_apart():
    with pytest.raises(InputError, match=r"premoe chooses among experts, and .* has none"):
        planned(tiny_decoder("llama"))
    mixture = tiny_mixture("olmoe")
    for row in METHODS:
        kind = METHODS.get(row.name)
        if not kind.mixtures and dataclasses.is_dataclass(kind):
            with pytest.raises(InputError, match=f"is a mixture of experts, of which {row.name}"):
                load_method(row.name).plan(mixture, WINDOWS, progress=False)


def test_mixtures_with_groups_of_experts_are_not_known(tmp_path):
    AutoConfig.for_model("deepseek_v3", n_group=4, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Models of type 'deepseek_v3' cannot be pruned yet"):
        open_checkpoint(tmp_path)


def test_experts_without_tokens_are_reported_and_rank_last(caplog):
    model = tiny_mixture("mixtral")
    with torch.no_grad():  # of 8 experts the first two take all that layer 2 sees
        gate = model.model.layers[2].mlp.gate.weight
        gate[2:] = gate[:1] - 50 * gate[:1]
        gate[1] = gate[0]
    hidden = []
    model.model.layers[2].mlp.gate.register_forward_hook(lambda _, __, out: hidden.append(out[2]))
    logits(model)
    unused = sorted(set(range(8)) - set(hidden[0].flatten().tolist()))
    with caplog.at_level(logging.WARNING):
        plan = planned(model, keep=2)
    if unused:
        assert f"layer 2: {', '.join(map(str, unused))}" in caplog.text
        assert not set(kept(plan)[2]) & set(unused)
    assert unused


def test_layers_must_keep_alike():
    model = tiny_mixture("mixtral")
    plan = planned(model, keep=4)
    uneven = [*plan.layers[:3], LayerPlan(units=units(expert=[0, 1, 2]))]
    before = model.state_dict()
    with pytest.raises(
        InputError, match=r"must have as many experts, and these would have \[3, 4\]"
    ):
        dataclasses.replace(plan, layers=uneven).apply(model)
    assert all(len(x) == 8 for name, x in before.items() if "experts" in name)
    few = [LayerPlan(units=units(expert=[0])) for _ in range(LAYERS)]
    with pytest.raises(InputError, match="keep as many at least"):
        dataclasses.replace(plan, layers=few).apply(model)
    with pytest.raises(InputError, match="all of its 4 layers must stay"):
        pruned_config(model.config, dims_of(model)[:3], biases=False, kept_layers=[0, 1, 2])
    for wrong, words in (
        (LayerPlan(masks={"mlp.down_proj": torch.ones(48, 192).bool()}), "only whole experts"),
        (LayerPlan(units=units(neuron=[0])), "The plan names 'neuron'"),
        (LayerPlan(units=units(expert=[0, 9])), r"in \[0, 7\]"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(plan, layers=[wrong] * LAYERS).apply(model)


# ------------------------------------------------------------------ stopped runs
class Killed(Exception):
    pass


def killed_at(monkeypatch, layer):
    """Reading a folder's layer from here on ends the run; gives what undoes it."""
    state = decoder._Stored.state

    def read(self, i):
        if i == layer:
            raise Killed
        return state(self, i)

    monkeypatch.setattr(decoder._Stored, "state", read)
    return lambda: monkeypatch.setattr(decoder._Stored, "state", state)


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    tiny_mixture("mixtral").save_pretrained(tmp_path / "model")
    method, library = PreMoe(keep=3), Patterns(tmp_path / "library")
    runs = (
        lambda: method.plan(
            tmp_path / "model", WINDOWS, work=tmp_path / "work", progress=False
        ).save(tmp_path / "plan.json"),
        lambda: library.add("task", tmp_path / "model", WINDOWS, progress=False),
    )
    for run in runs:
        again = killed_at(monkeypatch, 2)
        with pytest.raises(Killed):
            run()
        again()
        with monkeypatch.context() as patch:
            made = []
            patch.setattr(
                premoe, "Selection", lambda *given, made=made: made.append(1) or Selection(*given)
            )
            run()
        assert len(made) == 2  # layers 2 and 3 alone
    straight = kept(method.plan(tmp_path / "model", WINDOWS, progress=False))
    assert kept(Plan.load(tmp_path / "plan.json")) == straight
    assert kept(library.plan("task", tmp_path / "model", method)) == straight
    assert [path.name for path in sorted((tmp_path / "library").iterdir())] == [
        "patterns.json",
        "task.safetensors",
    ]


# ------------------------------------------------------------------ patterns
@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Of two tasks that use different tokens, and the model."""
    model = tiny_mixture("qwen2_moe")
    patterns = Patterns(tmp_path_factory.mktemp("patterns"))
    for task, low in (("low", 3), ("high", 50)):
        patterns.add(task, model, low + WINDOWS % 40, progress=False)
    return patterns, model


def test_a_pattern_gives_the_plan_that_its_text_gives(library):
    patterns, model = library
    assert patterns.tasks == ["low", "high"]
    for score in ("probability", "frequency"):
        method = PreMoe(keep=3, score=score)
        straight = method.plan(model, 3 + WINDOWS % 40, progress=False)
        plan = patterns.plan("low", model, method)
        assert kept(plan) == kept(straight)
        assert plan.settings == straight.settings
        assert plan.calibration["sha256"] == straight.calibration["sha256"]
        assert plan.calibration["source"] == "tokens given, pattern 'low'"
    assert kept(patterns.plan("low", model)) != kept(patterns.plan("high", model))


def test_a_query_finds_its_task_by_the_first_mixture_alone(library, monkeypatch):
    patterns, model = library
    seen = []
    state = decoder._Loaded.state
    monkeypatch.setattr(
        decoder._Loaded, "state", lambda self, i: (seen.append(i), state(self, i))[1]
    )
    for task, low in (("low", 3), ("high", 50)):
        first, second = patterns.nearest(model, low + random_windows(1, 120, seed=5)[0] % 40)
        assert first.task == task
        assert 0 < first.distance < second.distance <= 1
    same = patterns.nearest(model, (3 + WINDOWS % 40).flatten()[:100])[0]
    assert isinstance(same, Nearest)
    assert set(seen) == {0}  # whose experts come first in this model


def test_the_distance_is_of_shares():
    one, other = torch.tensor([1.0, 3, 0, 0]), torch.tensor([0.0, 0, 5, 5])
    assert distance(one, 7 * one) == pytest.approx(0, abs=1e-7)
    assert distance(one, other) == pytest.approx(1)
    # By hand: shares ¼ ¾ and ½ ½; 1 − Σ √(p q) is its square.
    found = distance(torch.tensor([1.0, 3]), torch.tensor([1.0, 1]))
    assert found**2 == pytest.approx(1 - (1 / 8) ** 0.5 - (3 / 8) ** 0.5)


def test_patterns_refuse_what_they_do_not_know(library, tmp_path):
    patterns, model = library
    with pytest.raises(InputError, match=r"knows no task 'lo'\. Did you mean"):
        patterns.plan("lo", model)
    with pytest.raises(InputError, match=r"patterns .* are of .*, a model of other sizes"):
        patterns.nearest(tiny_mixture("mixtral"), WINDOWS[0])
    with pytest.raises(InputError, match=r"named by letters.*got '\.\./x'"):
        patterns.add("../x", model, WINDOWS, progress=False)
    with pytest.raises(InputError, match="knows no task yet"):
        Patterns(tmp_path).nearest(model, WINDOWS[0])
    (tmp_path / "patterns.json").write_text("[]")
    with pytest.raises(InputError, match="is no library of patterns"):
        Patterns(tmp_path).tasks  # noqa: B018


def test_a_plan_from_a_pattern_is_written(library, tmp_path):
    patterns, model = library
    model.save_pretrained(tmp_path / "whole")
    plan = patterns.plan("high", tmp_path / "whole", PreMoe(keep=2))
    write_checkpoint(
        tmp_path / "whole",
        tmp_path / "small",
        plan.layers,
        plan_json=plan.to_dict(),
        progress=False,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(plan.apply(copy.deepcopy(model))))
