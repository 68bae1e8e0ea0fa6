"""Methods against `model_oracle`: the published formulas, written down slowly by someone else."""

import copy
from dataclasses import replace

import pytest
import torch

import model_oracle as oracle
from kv_oracle import tiny_llama
from model_prune import load_method
from model_prune.core.target import SITES, Dims
from model_prune.methods.adapt_pruner import layer_importance

# Not token 0, whose embedding is zero, as padding is: it has no angle.
WINDOWS = torch.randint(1, 97, (6, 40), generator=torch.Generator().manual_seed(3))
READ = {name: site for site, names in SITES.items() for name in names}
LAYERS, GROUPS, SIZE, GROUP = 3, 2, 32, 2


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def inputs(model):
    """Of every matrix of the dense model, [tokens, in], by layer and name."""
    found = [{} for _ in range(LAYERS)]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, x, layer=i, name=name: found[layer].update({name: x[0].flatten(0, 1)})
        )
        for i, layer in enumerate(model.model.layers)
        for name in READ
    ]
    with torch.no_grad():
        model(WINDOWS)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def hidden(model):
    """The states between layers, [layers + 1, windows, tokens, hidden], before the last norm."""
    states = []
    handles = [
        layer.register_forward_hook(lambda module, x, output: states.extend([x[0], output]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(WINDOWS)
    for handle in handles:
        handle.remove()
    return torch.stack([*states[::2], states[-1]])


def plan(model, name, **settings):
    return load_method(name, **settings).plan(model, WINDOWS, progress=False)


def weight(model, layer, name):
    return model.model.layers[layer].get_submodule(name).weight.detach()


PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "1:4"}]


def asked(settings):
    """As the oracle takes them."""
    if "pattern" in settings:
        return {"nm": tuple(map(int, settings["pattern"].split(":")))}
    return settings


@pytest.mark.parametrize("settings", PATTERNS)
@pytest.mark.parametrize("name", READ)
def test_wanda_and_ria(name, settings, model, inputs):
    # The first layer sees what the dense model's does, whatever the order.
    w, x = weight(model, 0, name), inputs[0][name]
    mask = plan(model, "wanda", targets=[name], **settings).layers[0].masks[name]
    assert torch.equal(mask, oracle.wanda_mask(w, x, **asked(settings)))
    mask = plan(model, "ria", targets=[name], **settings).layers[0].masks[name]
    assert torch.equal(mask, oracle.magnitude_mask(oracle.ria_scores(w, x), **asked(settings)))


def test_magnitude(model):
    found = plan(model, "magnitude", sparsity=0.4).layers
    for i, layer in enumerate(found):
        for name, mask in layer.masks.items():
            assert torch.equal(mask, oracle.magnitude_mask(weight(model, i, name), 0.4))


@pytest.mark.parametrize("settings", PATTERNS)
@pytest.mark.parametrize("block", [128, 16])
def test_sparsegpt(block, settings, model, inputs):
    found = plan(model, "sparsegpt", block=block, **settings).layers[0]
    for name in READ:
        w, x = weight(model, 0, name), inputs[0][name]
        swept, mask = oracle.sparsegpt(w, x, blocksize=block, **asked(settings))
        assert (found.masks[name] == mask).float().mean() >= 0.999
        if torch.equal(found.masks[name], mask):
            torch.testing.assert_close(found.weights[name].double(), swept, rtol=1e-3, atol=1e-4)
        ours, theirs = (
            ((w.double() - new) @ x.double().T).norm() for new in (found.weights[name], swept)
        )
        assert ours == pytest.approx(float(theirs), rel=0.005)


@pytest.mark.parametrize("start", ["wanda", "magnitude"])
def test_dsnot(start, model, inputs):
    found = plan(model, "dsnot", start=start, threshold=0.02, repair=["*"]).layers[0]
    moved = 0
    for name in READ:
        w, x = weight(model, 0, name), inputs[0][name]
        first = oracle.wanda_mask(w, x, 0.5) if start == "wanda" else oracle.row_mask(w.abs(), 0.5)
        # The library's threshold is that of windows of 2,048 tokens.
        expected = oracle.dsnot(w, x, first, threshold=0.02, windows=len(x) / 2048)
        moved += int((expected != first).sum())
        assert torch.equal(found.masks[name], expected)
    assert moved > 100


def test_owl(model, inputs):
    pairs = [[(weight(model, i, name), inputs[i][name]) for name in READ] for i in range(LAYERS)]
    expected = oracle.owl_sparsities(pairs, 0.5, M=3, lam=0.08)
    found = plan(model, "owl", outlier=3.0).layers
    for layer, share in zip(found, expected, strict=True):
        for name, mask in layer.masks.items():
            assert int((~mask).sum()) == oracle.count(mask.numel(), float(share)), name
    zeros, weights = (
        sum(count(mask) for layer in found for mask in layer.masks.values())
        for count in (lambda mask: int((~mask).sum()), torch.numel)
    )
    assert abs(zeros - weights / 2) <= len(READ) * LAYERS  # what rounding may cost a matrix


# ----------------------------------------------------------------------------------- units


def kept(layer, family, count):
    stays = torch.zeros(count, dtype=torch.bool)
    stays[layer.units.get(family, torch.arange(count))] = True
    return stays


def test_flap(model, inputs):
    o, down = "self_attn.o_proj", "mlp.down_proj"
    units, neurons = zip(
        *[
            oracle.flap_scores(
                weight(model, i, o), inputs[i][o], weight(model, i, down), inputs[i][down], 64
            )
            for i in range(LAYERS)
        ],
        strict=True,
    )
    dims = Dims.of(model.config, 0)
    costs = (dims.cost("kv_group"), dims.cost("neuron"))
    groups, others = oracle.flap_keep(torch.stack(units), torch.stack(neurons), *costs, 0.2)
    found = plan(model, "flap", remove=0.2).layers
    for i, layer in enumerate(found):
        assert torch.equal(kept(layer, "kv_group", GROUPS), groups[i])
        assert torch.equal(kept(layer, "neuron", 96), others[i])
        bias = oracle.flap_bias(weight(model, i, down), inputs[i][down].mean(0), ~others[i])
        torch.testing.assert_close(layer.biases[down].double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neuron", ["projected", "activation"])
def test_amp(neuron, model, inputs):
    o, down = "self_attn.o_proj", "mlp.down_proj"
    found = plan(model, "amp", remove=0.55, neuron=neuron).layers  # so much that a group goes
    for i, layer in enumerate(found):
        heads = oracle.amp_head(weight(model, i, o), inputs[i][o], SIZE)
        groups = heads.view(GROUPS, GROUP).sum(1)
        assert torch.equal(kept(layer, "kv_group", GROUPS), groups == groups.max())
        weights = weight(model, i, down) if neuron == "projected" else None
        scores = oracle.amp_neuron(inputs[i][down], weights)
        gone = 96 - len(layer.units["neuron"])
        assert gone > 10
        assert set(scores.argsort()[:gone].tolist()).isdisjoint(layer.units["neuron"].tolist())


@pytest.mark.parametrize("score", ["norm", "row"])
@pytest.mark.parametrize("slope", [1.0, 8.0, 0.0])
def test_cfsp(slope, score, model, inputs, hidden):
    found = plan(model, "cfsp", remove=0.2, slope=slope, score=score).layers
    dims = Dims.of(model.config, 0)
    share = 0.2 * dims.weights / (dims.neurons * dims.cost("neuron"))
    keep = oracle.cfsp_coarse(hidden.flatten(1, 2), share, a=slope)
    left = [len(layer.units.get("neuron", range(96))) for layer in found]
    assert sum(left) == round(LAYERS * 96 * (1 - share))
    assert left == pytest.approx((96 * keep).tolist(), abs=1)
    if score == "norm":
        for i, layer in enumerate(found):
            mlp = (weight(model, i, f"mlp.{m}_proj") for m in ("gate", "up", "down"))
            x = inputs[i]["mlp.down_proj"]
            published = oracle.cfsp_fine(*mlp, x)
            torch.testing.assert_close(published, oracle.cfsp_norm(x, 64))
            gone = set(published.argsort()[: 96 - left[i]].tolist())
            assert gone.isdisjoint(layer.units.get("neuron", torch.arange(96)).tolist())


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_llm_pruner(order, model):
    samples = []
    for ids in WINDOWS:
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        samples.append(
            [
                {name: layer.get_submodule(name).weight.grad.clone() for name in READ}
                for layer in model.model.layers
            ]
        )
    model.zero_grad()
    ends = {"skip_first": 0.0, "skip_last": 0.34}
    found = plan(model, "llm_pruner", remove=0.35, order=order, **ends).layers
    assert found[2].units == {}
    for i in range(2):
        weights = {name: weight(model, i, name) for name in READ}
        gradients = [sample[i] for sample in samples]
        groups, neurons = oracle.llm_pruner_taylor(weights, gradients, order, GROUPS)
        assert torch.equal(kept(found[i], "kv_group", GROUPS), groups == groups.max())
        gone = 96 - len(found[i].units["neuron"])
        assert gone > 10
        lowest = set(neurons.argsort()[:gone].tolist())
        assert lowest.isdisjoint(found[i].units["neuron"].tolist())


def test_adapt_pruner():
    cosines = torch.tensor([0.3, 0.9, 0.7, 0.95])
    step = oracle.adapt_pruner_step(torch.full((4,), 0.1), cosines, 0.02, 0.01) - 0.1
    ours = 0.02 - 0.01 * torch.from_numpy(layer_importance(cosines.double().numpy()))
    torch.testing.assert_close(ours, step)
    assert float(ours.mean()) == pytest.approx(0.02)


# ---------------------------------------------------------------------------------- layers


def test_angle_and_shortgpt(model, hidden):
    distances = oracle.angular_distance(hidden[:, :, -1], 1)
    (gone,) = (
        i for i, layer in enumerate(plan(model, "angle", remove=0.34).layers) if layer.removed
    )
    assert gone == 1 + int(distances[1:].argmin())  # the first layer stays
    # Not even where it turns its inputs least.
    still = copy.deepcopy(model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        still.model.layers[0].get_submodule(name).weight.data.zero_()
    assert not plan(still, "angle", remove=0.34).layers[0].removed
    assert plan(still, "shortgpt", remove=0.34).layers[0].removed
    influence = oracle.shortgpt_bi(hidden.flatten(1, 2))
    removed = {i for i, p in enumerate(plan(model, "shortgpt", remove=0.67).layers) if p.removed}
    assert removed == set(influence.argsort()[:2].tolist())


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"remove": 0.2}])
def test_random_draws_by_its_seed(kind, model):
    one, same, other = (plan(model, "random", seed=seed, **kind) for seed in (1, 1, 2))
    assert set(one.compare(same).values()) == {1.0}
    shared = [share for share in one.compare(other).values() if share < 1]
    assert len(shared) > 8
    assert max(shared) < 0.6


def test_a_variant_is_a_replacement():
    wanda = load_method("wanda", sparsity=0.3)
    assert replace(wanda, order="staged").settings() == {**wanda.settings(), "order": "staged"}
