"""From a folder to a pruned one: what is written, how it goes on, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kv_oracle import tiny_llama
from model_prune import Calibration, Plan, load_method, prune_model
from model_prune.core.collect import Step
from model_prune.prune import local_folder, write_pruned
from prune_core.errors import CheckpointError, InputError, UnknownName
from tiny import PLACES, WORDS, toy_language_model, toy_tokenizer

SENTENCES = [f"where is the {word} now ? it was in {place} ." for word in WORDS for place in PLACES]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy_language_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(SENTENCES), encoding="utf-8")
    return file


def prune(source, out, text, **changes):
    settings = {"method": "wanda", "calibration": text, "windows": 4, "tokens": 32}
    return prune_model(source, out=out, progress=False, **settings | changes)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_is_written(source, text, tmp_path):
    out = tmp_path / "out"
    report = prune(source, out, text, texts={"toy": text.read_text()}, sparsity=0.25)
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "prunekit.json",
        "report.html",
        "report.json",
        "tokenizer.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    about = json.loads((out / "prunekit.json").read_text())
    assert (about["method"], about["settings"]["sparsity"]) == ("wanda", 0.25)
    assert (about["calibration"]["windows"], about["calibration"]["tokens"]) == (4, 32)
    assert about["calibration"]["source"] == "text.txt"
    assert about["provenance"]["versions"]["torch"]
    assert report.sparsity["layers"] == pytest.approx(0.25)
    assert set(report.seconds) == {"plan", "write", "evaluate"}
    assert report.perplexity["toy"].before != report.perplexity["toy"].after
    found = weights(out)["model.layers.1.mlp.down_proj.weight"]
    assert (found == 0).sum() == found.numel() // 4


def test_structure_is_really_cut(source, text, tmp_path):
    report = prune(source, tmp_path / "out", text, method="flap", remove=0.25)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    left = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    dense = tiny_llama()
    was = sum(p.numel() for n, p in dense.named_parameters() if n.endswith("proj.weight"))
    assert left / was == pytest.approx(0.75, abs=0.02)
    assert report.sparsity["layers"] == pytest.approx(1 - left / was)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "flap", "owl", "angle"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_stopped_run_goes_on(method, layer, source, text, tmp_path, monkeypatch):
    prune(source, tmp_path / "whole", text, method=method)
    solve, seen = Step.__init__, []

    def fails(self, watch, solve_, *rest):
        def stop(i, *arguments):
            seen.append(i)
            if i == layer and tmp_path.name not in stopped:
                stopped.add(tmp_path.name)
                raise KeyboardInterrupt
            return solve_(i, *arguments)

        solve(self, watch, stop, *rest)

    stopped = set()
    monkeypatch.setattr(Step, "__init__", fails)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", text, method=method)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work").is_dir()
    seen.clear()
    prune(source, tmp_path / "out", text, method=method)
    first_pass = seen[: seen.index(2)]
    assert min(first_pass, default=2) >= layer  # what was done is not done again
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert not (tmp_path / "out.work").exists()


def test_work_of_other_settings_is_not_mixed_in(source, text, tmp_path, monkeypatch):
    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("model_prune.prune.write_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", text)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"'settings' was .* and is now"):
        prune(source, tmp_path / "out", text, sparsity=0.6)
    with pytest.raises(InputError, match="'calibration' was"):
        prune(source, tmp_path / "out", text, windows=5)


def test_a_saved_plan_is_replayed(source, text, tmp_path):
    prune(source, tmp_path / "once", text, method="sparsegpt", pattern="2:4")
    method = load_method("sparsegpt", pattern="2:4")
    windows = Calibration.read([text], toy_tokenizer(), windows=4, tokens=32)
    method.plan(source, windows, progress=False).save(tmp_path / "plan.json")
    write_pruned(source, tmp_path / "again", Plan.load(tmp_path / "plan.json"), progress=False)
    assert same(weights(tmp_path / "once"), weights(tmp_path / "again"))


def test_a_text_that_is_long_enough_gives_the_windows_asked_for(text):
    tokenizer = toy_tokenizer()
    few = Calibration.read([text], tokenizer, windows=3, tokens=16, seed=1)
    assert few.windows.shape == (3, 16)
    again = Calibration.read([text], tokenizer, windows=3, tokens=16, seed=1)
    assert few.fingerprint == again.fingerprint
    assert few.fingerprint != Calibration.read([text], tokenizer, windows=3, tokens=16).fingerprint
    every = Calibration.read([text], tokenizer, windows=10_000, tokens=16)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert every.windows.flatten().tolist() == ids[: len(ids) // 16 * 16]


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "wandb"}, "Did you mean 'wanda'"),
        ({"sparsity": 50}, r"a share in \[0, 1\), got 50: write 0.5 for 50 %"),
        ({"sparsity": -0.1}, r"a share in \[0, 1\), got -0.1"),
        ({"pattern": "2to4"}, "N:M is written like 2:4, got '2to4'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "leave one out"),
        ({"targets": ["mlp.down"]}, "Did you mean 'mlp.down_proj'"),
        ({"sparsty": 0.5}, "Did you mean 'sparsity'"),
        ({"calibration": None}, "reads calibration text, and none is given"),
        ({"calibration": "no.txt"}, "Cannot read the text 'no.txt'"),
        ({"tokens": 10_000}, r"has \d+ tokens, and one window is 10000"),
        ({"tokens": 1025}, "reads at most 1024 tokens"),
        ({"method": "flap", "remove": 0.99}, "would empty whole layers: remove less"),
        ({"method": "amp", "remove": 0.99}, "would lose every"),
        ({"method": "cfsp", "remove": 0.9}, "cuts neurons only"),
        ({"method": "angle", "remove": 0.9}, "leaves none: remove less"),
        ({"method": "random", "remove": 0.2, "sparsity": 0.5}, "give one or the other"),
    ],
)
def test_bad_settings(changes, said, source, text, tmp_path):
    with pytest.raises(InputError, match=said):
        prune(source, tmp_path / "out", text, **changes)
    assert not (tmp_path / "out").exists()


def test_bad_models(source, text, tmp_path):
    with pytest.raises(InputError, match="is no folder, and cannot be fetched"):
        prune(tmp_path / "nothing", tmp_path / "out", text)
    config = json.loads((source / "config.json").read_text())
    for name, changes, error, said in [
        ("gpt2", {"model_type": "gpt2"}, InputError, "'gpt2' cannot be pruned yet"),
        ("llama4", {"model_type": "llama4_text"}, InputError, "Did you mean 'llama'"),
        ("int4", {"quantization_config": {"bits": 4}}, InputError, "The model is quantised"),
        ("pickle", None, CheckpointError, "are pickles"),
    ]:
        shutil.copytree(source, tmp_path / name)
        if changes is None:
            (tmp_path / name / "model.safetensors").rename(tmp_path / name / "pytorch_model.bin")
        else:
            changed = config | changes
            (tmp_path / name / "config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=said):
            prune(tmp_path / name, tmp_path / "out", text)


def test_an_output_that_is_there_or_does_not_fit(source, text, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="is there already"):
        prune(source, tmp_path / "out", text)
    prune(source, tmp_path / "out", text, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(InputError, match="is the model that is read"):
        prune(source, source, text, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(InputError, match=r"the disk of .* has 0\.0 GiB left"):
        prune(source, tmp_path / "other", text)


def test_nan_names_the_layer(source, text, tmp_path):
    shutil.copytree(source, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for method, changes, said in [
        ("magnitude", {}, r"'mlp.up_proj.weight' of layer 1 has NaN"),
        ("wanda", {}, r"'mlp.up_proj.weight' of layer 1 has NaN"),
        ("flap", {}, r"'mlp.up_proj.weight' of layer 1 has NaN"),
        ("magnitude", {"remove": 0.1}, "Scores of layer 1 are NaN"),
        ("llm_pruner", {}, "The loss on the calibration text is nan"),
    ]:
        out = tmp_path / f"{method} {len(changes)}"
        with pytest.raises(InputError, match=said):
            prune(tmp_path / "broken", out, text, method=method, **changes)


def test_gradients_say_what_they_need(source, text, tmp_path, monkeypatch, capsys):
    settings = {"method": "llm_pruner", "remove": 0.1, "out": tmp_path / "out"}
    read = {"calibration": text, "windows": 2, "tokens": 16}
    prune_model(source, **settings, **read)
    assert "Gradients of 'toy' need the whole model: 0.0 GiB" in capsys.readouterr().err
    monkeypatch.setattr("model_prune.core.gradients.free_memory", lambda device: 1000)
    with pytest.raises(InputError, match="take a method that goes layer by layer"):
        prune(source, tmp_path / "other", text, method="adapt_pruner")


def test_names_of_the_hub(source):
    assert local_folder(source) == source
    with pytest.raises(UnknownName, match="weight-pruning method"):
        load_method("gmp")
