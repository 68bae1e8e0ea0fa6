"""Perplexity by its definition, and what may be compared."""

import dataclasses
import hashlib
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_oracle import tiny_llama
from model_prune import evaluate
from model_prune.evaluate import (
    Comparison,
    Perplexity,
    compare,
    evaluate_folder,
    lm_eval_tasks,
    perplexity,
)
from prune_core.errors import CheckpointError, InputError, MissingExtra
from tiny import NOUNS, toy_tokenizer, wordpiece

WORDS = [NOUNS[(7 * i * i + i) % len(NOUNS)] for i in range(45)]
TEXT = " ".join(WORDS[:20]) + "\n" + " ".join(WORDS[20:])  # a token a word


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def measure(model, tokenizer, text=TEXT, tokens=8, **options):
    return perplexity(model, tokenizer, text, tokens=tokens, progress=False, **options)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    return measure(model, tokenizer)


# ------------------------------------------------------------------ the number
def test_it_is_the_definition_word_by_word(model, tokenizer, measured):
    means = []
    for start in range(0, 40, 8):  # 45 tokens: five windows, and five tokens left over
        ids = [tokenizer.vocab[word] for word in WORDS[start : start + 8]]
        losses = []
        for t in range(1, 8):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:t]])).logits[0, -1].double()
            losses.append(float(torch.logsumexp(logits, 0) - logits[ids[t]]))
        means.append(sum(losses) / 7)
    np.testing.assert_allclose(measured.window_nll, means, rtol=1e-5)
    assert measured.value == pytest.approx(math.exp(sum(means) / 5), rel=1e-5)

    # Each window's first word is not scored, and the separator is two bytes where a space is one.
    scored = [WORDS[i] for i in range(40) if i % 8]
    assert measured.scored_bytes == sum(map(len, scored)) + len(scored) + 1
    bits = sum(means) * 7 / math.log(2)
    assert measured.bits_per_byte == pytest.approx(bits / measured.scored_bytes, rel=1e-5)


def test_bytes_are_those_of_the_text_not_its_characters(model, tokenizer):
    plain, accented = (measure(model, tokenizer, word * 8) for word in ("e ", "é "))
    assert (plain.scored_bytes, accented.scored_bytes) == (14, 21)


def test_batches_and_chunks_of_logits_change_nothing(model, tokenizer, measured, monkeypatch):
    whole = measured.window_nll
    for batch in (1, 3, 100):
        one = measure(model, tokenizer, batch=batch).window_nll
        np.testing.assert_allclose(one, whole, rtol=1e-6)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda *given: sizes.append(given[2].numel()))
    monkeypatch.setattr(evaluate, "_LOGIT_BYTES", 5 * 4 * 97)
    chunked = measure(model, tokenizer).window_nll
    hook.remove()
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    assert max(sizes) == 5 * 97


def test_the_first_windows_alone(model, tokenizer, measured):
    some = measure(model, tokenizer, max_windows=2)
    np.testing.assert_allclose(some.window_nll, measured.window_nll[:2], rtol=1e-6)
    assert some.protocol.windows == 2
    assert measure(model, tokenizer, max_windows=5).protocol == measured.protocol


def test_the_protocol_says_how_it_was_measured(measured):
    protocol = measured.protocol
    assert (protocol.tokens, protocol.separator, protocol.bos) == (8, "\n\n", False)
    assert (protocol.dtype, protocol.windows) == ("float32", None)
    assert protocol.text == hashlib.sha256(TEXT.encode()).hexdigest()


def test_the_model_is_left_as_it_was(tokenizer, measured):
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    np.testing.assert_array_equal(measure(model, tokenizer).window_nll, measured.window_nll)
    assert [layer.training for layer in model.model.layers] == [True, False, True]
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_a_stored_perplexity_comes_back(measured):
    back = Perplexity.from_dict(json.loads(json.dumps(measured.to_dict())))
    assert (back.value, back.bits_per_byte) == (measured.value, measured.bits_per_byte)
    assert back.protocol == measured.protocol
    assert compare(measured, back).ratio == 1
    with pytest.raises(InputError, match="no stored perplexity"):
        Perplexity.from_dict({"value": 3.0})


# ------------------------------------------------------------------ refusals
def test_a_text_shorter_than_a_window_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="has 45 tokens, and one window needs 46"):
        measure(model, tokenizer, tokens=46)


@pytest.mark.parametrize("wrong", [{"tokens": 1}, {"batch": 0}, {"max_windows": 0}])
def test_numbers_out_of_range_are_refused(model, tokenizer, wrong):
    with pytest.raises(InputError, match="must be 1 or more"):
        measure(model, tokenizer, **wrong)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_name_their_window(tokenizer, broken):
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.vocab["paris"]] = broken
    text = " ".join([*WORDS[:26], "paris", *WORDS[26:]])
    with pytest.raises(InputError, match="in window 3 are NaN or infinite"):
        measure(model, tokenizer, text, batch=2)


# ------------------------------------------------------------------ comparing
def changed(measured, nll=None, **protocol):
    return dataclasses.replace(
        measured,
        window_nll=measured.window_nll if nll is None else nll,
        protocol=dataclasses.replace(measured.protocol, **protocol),
    )


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 9},
        {"separator": " "},
        {"bos": True},
        {"dtype": "bfloat16"},
        {"text": "x"},
        {"windows": 2},
    ],
)
def test_other_protocols_refuse_to_be_compared(measured, other):
    with pytest.raises(InputError, match=f"`{next(iter(other))}` of their protocols is"):
        compare(measured, changed(measured, **other))


def test_other_tokenizers_are_compared_by_the_byte(model, measured):
    other = measure(model, wordpiece([*reversed(WORDS)]))
    with pytest.raises(InputError, match="compare bits_per_byte instead"):
        compare(measured, other)
    assert other.scored_bytes == measured.scored_bytes


def test_a_model_is_exactly_as_good_as_itself(measured):
    assert compare(measured, measured) == Comparison(1.0, 1.0, 1.0, 5)
    assert not compare(measured, measured).differs


def test_the_interval_is_that_of_paired_windows(measured):
    """Windows differ far more than the two models do, and the pairs cancel that."""
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 1, size=200)
    gaps = rng.normal(0.1, 0.05, size=200)
    found = compare(changed(measured, hard), changed(measured, hard + gaps))
    assert found.ratio == pytest.approx(math.exp(gaps.mean()))
    half = 1.96 * gaps.std() / math.sqrt(200)
    assert math.log(found.low) == pytest.approx(gaps.mean() - half, abs=0.1 * half)
    assert math.log(found.high) == pytest.approx(gaps.mean() + half, abs=0.1 * half)
    assert found.differs
    back = compare(changed(measured, hard + gaps), changed(measured, hard))
    assert back.ratio == pytest.approx(1 / found.ratio)

    noise = rng.normal(0, 0.05, size=200) + 0.001
    assert "no difference is shown" in str(
        compare(changed(measured, hard), changed(measured, hard + noise))
    )
    with pytest.raises(InputError, match="One window"):
        compare(changed(measured, hard[:1]), changed(measured, hard[:1]))


# ------------------------------------------------------------------ folders and tasks
@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_measured_as_its_model(folder, measured):
    texts = {"one": TEXT, "two": TEXT[:150]}
    found = evaluate_folder(folder, texts, tokens=8, progress=False)
    assert list(found) == ["one", "two"]
    np.testing.assert_array_equal(found["one"].window_nll, measured.window_nll)


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused(folder, fault):
    weights = load_file(folder / "model.safetensors")
    taken = weights.pop("model.layers.1.mlp.up_proj.weight")
    if fault == "unexpected":
        weights |= {
            "model.layers.1.mlp.up_proj.weight": taken,
            "model.layers.9.norm": taken[0].clone(),
        }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 {fault} keys, the first 'model\.layers\."):
        evaluate_folder(folder, {"one": TEXT}, tokens=8, progress=False)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights in safetensors"):
        evaluate_folder(folder, {"one": TEXT}, tokens=8, progress=False)


def test_tasks_are_scored_by_the_harness(monkeypatch):
    calls = []

    def simple_evaluate(**given):
        calls.append(given)
        return {"results": {"piqa": {"acc,none": 0.7}}, "config": {}}

    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    assert lm_eval_tasks("folder", ("piqa",), limit=5) == {"piqa": {"acc,none": 0.7}}
    (call,) = calls
    assert (call["model"], call["tasks"], call["limit"]) == ("hf", ["piqa"], 5)
    arguments = call["model_args"]
    assert (arguments["pretrained"], arguments["dtype"]) == ("folder", "float32")
    assert (arguments["use_safetensors"], arguments["trust_remote_code"]) == (True, False)
    with pytest.raises(InputError, match="at least one task"):
        lm_eval_tasks("folder", [])


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"'lm_eval': pip install 'prunekit\[eval\]'"):
        lm_eval_tasks("folder", ["piqa"])
