"""What a tiny random Llama says of rows, against a loop over tokens without batch or padding."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_prune.causal import Losses, Representations
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.ifd import IFD
from data_prune.pairs import batches, encode, padded
from data_prune.rows import Columns, read, rows_of
from data_prune.vectors import embed
from kv_oracle import tiny_llama
from prune_core.errors import InputError
from tiny import NOUNS, toy_tokenizer

PAIRS = [
    ("cat dog", "bird tree house"),
    ("cat", "lake"),
    ("house boat train king queen apple", "river stone glass paper horse cloud table chair piano"),
    ("paper", "horse horse horse"),
]
PROMPTS, RESPONSES = (list(part) for part in zip(*PAIRS, strict=True))


def word_tokenizer(first=True):
    """A token a word and a line break; `first` puts <s> before every text, as Llama's does."""
    words = ["<unk>", "<s>", "</s>", "\n", *NOUNS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex("\n"), "isolated"),
        ]
    )
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module", params=[True, False], ids=["begins", "plain"])
def tokenizer(request):
    return word_tokenizer(request.param)


def ids_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(word) for word in text.split(" ")]


def plain_loss(model, before, after):
    """-log p of each token of `after`, one forward pass a token, in float64."""
    losses = []
    for t in range(len(after)):
        with torch.no_grad():
            logits = model(torch.tensor([before + after[:t]])).logits[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[after[t]]))
    return sum(losses) / len(losses)


def start_of(tokenizer):
    return [1] if tokenizer("")["input_ids"] else []


# ------------------------------------------------------------------ tokens
def test_the_cut_between_prompt_and_response_is_exact(tokenizer):
    start, prompt, response = start_of(tokenizer), [4, 5], [6]
    ids, at = encode(tokenizer, "cat dog", "bird", 10)
    assert (ids, at) == (start + prompt + response, len(start) + 2)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_the_response_is_cut_first(tokenizer, most):
    whole, at = encode(tokenizer, "cat dog", "bird tree house", 99)
    ids, cut_at = encode(tokenizer, "cat dog", "bird tree house", most)
    assert ids == whole[:most]
    assert cut_at == min(at, most)


@examples(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_batches_hold_every_place_once_and_no_more_than_fits(lengths, tokens):
    found = batches(lengths, tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(lengths)


def test_padding_is_on_the_right():
    inputs = padded([[5, 6, 7], [8]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# ------------------------------------------------------------------ losses
def test_losses_are_those_of_a_plain_loop(model, tokenizer):
    start = start_of(tokenizer)
    expected = [
        [
            plain_loss(model, [*start, *ids_of(tokenizer, prompt), 3], ids_of(tokenizer, response)),
            plain_loss(model, [*start, 3], ids_of(tokenizer, response)),
        ]
        for prompt, response in PAIRS
    ]
    found = Losses(model, tokenizer)(PROMPTS, RESPONSES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found[:, 0] - found[:, 1]).min() > 0.01  # the prompt matters


def test_a_pair_has_the_same_losses_in_any_company(model, tokenizer, monkeypatch):
    ask = Losses(model, tokenizer)
    together = ask(PROMPTS, RESPONSES)
    alone = np.concatenate([ask([p], [r]) for p, r in PAIRS])
    np.testing.assert_allclose(together, alone, rtol=2e-6)
    order = [2, 0, 3, 1]
    shuffled = ask([PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert (shuffled == together[order]).all()
    monkeypatch.setattr("data_prune.causal._LOGITS", 97 * 8)  # a batch for nearly each
    np.testing.assert_allclose(ask(PROMPTS, RESPONSES), together, rtol=2e-6)


def test_a_cut_response_is_the_same_tokens_in_both(model, tokenizer):
    start = start_of(tokenizer)
    most = len(start) + 3 + 2  # the prompt, the line break and two tokens
    found = Losses(model, tokenizer, max_tokens=most)(PROMPTS[:1], RESPONSES[:1])
    shortened = Losses(model, tokenizer)(PROMPTS[:1], ["bird tree"])
    np.testing.assert_allclose(found, shortened, rtol=1e-6)


def test_a_prompt_that_leaves_no_room_is_nan(model, tokenizer):
    most = len(start_of(tokenizer)) + 4
    found = Losses(model, tokenizer, max_tokens=most)(PROMPTS, RESPONSES)
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()


def test_nothing_asked_gives_nothing(model, tokenizer):
    assert Losses(model, tokenizer)([], []).shape == (0, 2)


def test_half_precision_is_near(model, tokenizer):
    half = copy.deepcopy(model).to(torch.bfloat16)
    found, full = (Losses(m, tokenizer)(PROMPTS, RESPONSES) for m in (half, model))
    np.testing.assert_allclose(found, full, rtol=0.1)
    assert Losses(half, tokenizer).fingerprint != Losses(model, tokenizer).fingerprint


def test_ifd_from_a_model_is_the_same_for_any_workers_and_is_kept(model, tokenizer, tmp_path):
    source = read([{"prompt": p, "completion": r} for p, r in PAIRS])
    rows = rows_of(source, Columns().found(source.names))
    ask = Losses(model, tokenizer)
    one, two = (
        IFD().score(Given(rows=rows, keep=2, losses=ask, engine=Local(k), cache=tmp_path / str(k)))
        for k in (1, 2)
    )
    for name, column in one.items():
        assert (column == two[name]).all()

    class Silent(Losses):
        def __call__(self, prompts, responses):
            raise AssertionError("it is known already")

    again = Given(rows=rows, keep=2, losses=Silent(model, tokenizer), cache=tmp_path / "1")
    assert (IFD().score(again)["ifd"] == one["ifd"]).all()


# ------------------------------------------------------------------ representations
def plain_representation(model, ids):
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    total = len(ids) * (len(ids) + 1) / 2
    return sum((i + 1) / total * hidden[i].double() for i in range(len(ids))).numpy()


def test_representations_weigh_states_by_position(model, tokenizer):
    texts = [" ".join([p, "\n", r]).replace(" \n ", "\n") for p, r in PAIRS]
    start = start_of(tokenizer)
    expected = [
        plain_representation(model, start + ids_of(tokenizer, text.replace("\n", " \n ")))
        for text in texts
    ]
    found = Representations(model, tokenizer)(texts)
    assert found.shape == (4, 64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_has_the_same_representation_in_any_company(model, tokenizer, monkeypatch):
    encoder = Representations(model, tokenizer)
    together = encoder(RESPONSES)
    np.testing.assert_allclose(
        together, np.concatenate([encoder([t]) for t in RESPONSES]), atol=1e-5
    )
    monkeypatch.setattr("data_prune.causal._TOKENS", 5)
    np.testing.assert_allclose(encoder(RESPONSES), together, atol=1e-5)


def test_a_text_without_tokens_is_zeros(model):
    found = Representations(model, word_tokenizer(False))([" ", "cat", "  "])
    assert not found[[0, 2]].any()
    assert found[1].any()


def test_long_texts_are_cut(model, tokenizer):
    most = len(start_of(tokenizer)) + 2
    found = Representations(model, tokenizer, max_tokens=most)(["cat dog bird", "cat dog tree"])
    whole = Representations(model, tokenizer)(["cat dog"])
    np.testing.assert_allclose(found, np.repeat(whole, 2, axis=0), atol=1e-5)


def test_it_is_an_encoder_whose_vectors_are_kept(model, tokenizer, tmp_path):
    first = embed(RESPONSES, Representations(model, tokenizer), Local(2), tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("embeddings-")

    class Silent(Representations):
        def __call__(self, texts):
            raise AssertionError("it is known already")

    assert (embed(RESPONSES, Silent(model, tokenizer), Local(1), tmp_path) == first).all()


# ------------------------------------------------------------------ what they are known by
@settings(max_examples=10, deadline=None)
@examples(st.integers(0, 10**6))
def test_any_weight_that_changes_changes_the_fingerprint(which):
    model, tokenizer = tiny_llama(num_hidden_layers=1), word_tokenizer()
    before = Losses(model, tokenizer).fingerprint
    assert before == Losses(tiny_llama(num_hidden_layers=1), word_tokenizer()).fingerprint
    parameters = list(model.parameters())
    flat = parameters[which % len(parameters)].detach().view(-1)
    flat[which % len(flat)] += 1e-3
    assert Losses(model, tokenizer).fingerprint != before


def test_settings_and_vocabulary_are_in_the_fingerprint(model):
    tokenizer = word_tokenizer()
    prints = [
        Losses(model, tokenizer).fingerprint,
        Losses(model, tokenizer, max_tokens=99).fingerprint,
        Losses(model, toy_like(tokenizer)).fingerprint,
        Losses(tiny_llama(rope_theta=500.0), tokenizer).fingerprint,
    ]
    assert len({str(each) for each in prints}) == 4


def toy_like(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    return other


def test_they_can_be_sent_to_other_processes(tokenizer):
    model = tiny_llama()
    for made, arguments in ((Losses, (PROMPTS, RESPONSES)), (Representations, (RESPONSES,))):
        original = made(model, tokenizer)
        sent = pickle.loads(pickle.dumps(original))
        assert (sent(*arguments) == original(*arguments)).all()


# ------------------------------------------------------------------ bad input
def test_a_model_in_training_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"in training mode, where dropout makes .* model.eval"):
        Losses(tiny_llama().train(), tokenizer)


@pytest.mark.parametrize("most", [1, 1025])
@pytest.mark.parametrize("made", [Losses, Representations])
def test_the_window_bounds_the_tokens(model, tokenizer, made, most):
    with pytest.raises(
        InputError, match=rf"from 2 to 1024, which the model reads at once, got {most}: long"
    ):
        made(model, tokenizer, max_tokens=most)


def test_a_tokenizer_that_drops_line_breaks_is_refused(model):
    with pytest.raises(InputError, match=r"makes no token of a line break and begins with none"):
        Losses(model, toy_tokenizer())
