"""What pruning does to a real model, on real text that it was not calibrated on.

The claims are directions with a margin; docs/model-pruning.md has the figures.
"""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model_prune import Calibration, load_method, prune_model
from model_prune.core.target import Dims
from model_prune.evaluate import perplexity

pytestmark = pytest.mark.slow

# Python's reference, which is installed with it: every second topic to calibrate on.
TEXTS = ["\n\n".join(topics[name] for name in sorted(topics)[half::2]) for half in (0, 1)]
WINDOWS, TOKENS = 8, 256


@pytest.fixture(scope="module")
def calibration(tokenizer):
    return Calibration.from_text(TEXTS[0], tokenizer, windows=WINDOWS, tokens=TOKENS)


def measure(model, tokenizer):
    settings = {"tokens": TOKENS, "max_windows": WINDOWS, "progress": False}
    return perplexity(model, tokenizer, TEXTS[1], **settings).value


@pytest.fixture(scope="module")
def pruned(folder, tokenizer, calibration):
    """Perplexity after a method, and the share of the layers' weights that is left."""
    known = {}

    def of(name, **settings):
        key = (name, *settings.items())
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            load_method(name, **settings).plan(model, calibration, progress=False).apply(model)
            layers = range(model.config.num_hidden_layers)
            left = sum(Dims.of(model.config, i).weights for i in layers)
            known[key] = measure(model, tokenizer), left / (30 * 3_538_944)
            print(f"{name} {settings}: perplexity {known[key][0]:.2f}, left {known[key][1]:.4f}")
        return known[key]

    return of


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_cost_less_the_more_a_method_knows(kind, pruned):
    found = {n: pruned(n, **kind)[0] for n in ("random", "magnitude", "wanda", "sparsegpt")}
    assert found["sparsegpt"] < 0.95 * found["wanda"]
    assert found["wanda"] < 0.5 * found["magnitude"]
    assert found["magnitude"] < 0.5 * found["random"]


def test_flips_of_few_weights_improve_wanda(pruned):
    found = pruned("icbs", sparsity=0.5, steps=4, samples=8)[0]
    wanda = pruned("wanda", sparsity=0.5)[0]
    print(f"iCBS {found:.1f}, Wanda {wanda:.1f}: x {found / wanda:.3f}")
    assert found < 0.95 * wanda


def test_a_searched_allocation_beats_a_uniform_one_by_the_same_pruner(pruned):
    """By 64 candidates and a text of 2,048 tokens; more of both do more."""
    settings = {"remove": 0.3, "generations": 4, "offspring": 8}
    settings |= {"survivors": (2, 1), "judged_by": (512, 2048)}
    searched = pruned("tyr", **settings, iterations=2)[0]
    uniform = pruned("tyr", **settings | {"generations": 0}, iterations=1)[0]
    print(f"Týr {searched:.1f}, uniform {uniform:.1f}: x {searched / uniform:.3f}")
    assert searched < uniform


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flap", {}),
        ("cfsp", {}),
        ("amp", {}),
        ("llm_pruner", {}),
        ("spa", {}),
        ("obspa", {}),
        # A step in five, so that the test ends.
        ("adapt_pruner", {"steps": 10}),
    ],
)
def test_informed_cuts_cost_less_than_random_ones(name, settings, pruned):
    found, left = pruned(name, remove=0.2, **settings)
    random = np.median([pruned("random", remove=0.2, seed=seed)[0] for seed in range(3)])
    assert left == pytest.approx(0.8, abs=0.003)
    assert found < 0.5 * random


def test_obspa_costs_less_than_magnitude_and_than_spa(pruned):
    found = {name: pruned(name, remove=0.2)[0] for name in ("obspa", "spa", "magnitude")}
    assert found["obspa"] < 0.9 * found["spa"]
    assert found["obspa"] < 0.1 * found["magnitude"]


def test_what_stays_can_make_up_for_what_goes(pruned):
    none, bias, refitted = (
        pruned("flap", remove=0.2, compensation=kind)[0]
        for kind in ("none", "bias", "least_squares")
    )
    assert bias < 0.98 * none
    # 2,048 tokens for 1,536 columns are few to refit to; with more it does better than the bias.
    assert refitted < none


@pytest.mark.parametrize("name", ["angle", "shortgpt"])
def test_layers_that_turn_little_cost_less_than_the_first_or_last(
    name, folder, tokenizer, calibration, pruned
):
    from model_prune.core.plan import LayerPlan
    from model_prune.decoders import apply_in_place

    found, left = pruned(name, remove=0.1)
    assert left == pytest.approx(0.9)
    for ends in (range(1, 4), range(27, 30)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        apply_in_place(model, [LayerPlan(removed=i in ends) for i in range(30)])
        assert found < 0.8 * measure(model, tokenizer)


def test_a_smaller_model_is_written_and_read(folder, tokenizer, calibration, tmp_path, pruned):
    report = prune_model(
        folder,
        method="flap",
        remove=0.2,
        calibration=calibration,
        out=tmp_path / "smaller",
        progress=False,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype=torch.float32)
    assert measure(model, tokenizer) == pytest.approx(pruned("flap", remove=0.2)[0], rel=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before, after = (
        sum(file.stat().st_size for file in place.glob("*.safetensors"))
        for place in (folder, tmp_path / "smaller")
    )
    assert after == pytest.approx(report.size[1], rel=0.01)
    assert after < 0.85 * before
