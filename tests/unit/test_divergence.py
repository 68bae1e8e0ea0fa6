"""Divergence of two models on responses: against a loop that takes one token at a time."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from data_prune.divergence import ResponseDivergence, jensen_shannon
from data_prune.pairs import encode, worded
from prune_core.errors import InputError
from tiny_decoders import VOCABULARY, tiny_decoder, tiny_model

LN2 = math.log(2)
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def divergence(p, q):
    """The definition, of probabilities, in float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(2 * x / (p + q)), 0).sum(axis=-1) for x in (p, q)]
    return sum(parts) / 2


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------------------------ jensen_shannon
def test_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    # m = (1/2, 1/4, 1/4): each KL is ln 2 / 2.
    assert jensen_shannon(p.log(), q.log()).item() == pytest.approx(LN2 / 2, abs=1e-7)
    apart = jensen_shannon(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]))
    assert apart.item() == pytest.approx(LN2, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.floats(0, 200), st.floats(0, 20), st.sampled_from([1, 2, 3000])
)
def test_of_any_logits(seed, scale, noise, size):
    draw = np.random.default_rng(seed)
    a = scale * draw.standard_normal((3, size))
    b = a + noise * draw.standard_normal((3, size))
    a[:, 1:][draw.random((3, size - 1)) < 0.1] = -np.inf
    expected = divergence(softmax(a), softmax(b))
    x, y = torch.tensor(a), torch.tensor(b)
    np.testing.assert_allclose(jensen_shannon(x, y).numpy(), expected, atol=1e-13)
    x, y = x.float(), y.float()
    found = jensen_shannon(x, y)
    assert found.dtype == torch.float32
    rounded = divergence(softmax(x.double().numpy()), softmax(y.double().numpy()))
    np.testing.assert_allclose(found.numpy(), rounded, atol=1e-6)
    assert ((found >= 0) & (found <= np.float32(LN2))).all()
    assert torch.equal(found, jensen_shannon(y, x))
    assert torch.equal(jensen_shannon(x, x), torch.zeros(3))
    assert torch.equal(jensen_shannon(y.bfloat16(), y.bfloat16()), torch.zeros(3))


def test_where_a_quotient_would_be_nan():
    # The second token's probability underflows in float32; in float64 it is about 1e-87.
    p, q = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, 3.0]])
    expected = divergence(softmax(p.double().numpy()), softmax(q.double().numpy()))
    np.testing.assert_allclose(jensen_shannon(p, q).numpy(), expected, atol=1e-7)


def test_small_divergences_are_not_rounded_away():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    near = logits + 1e-3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))
    expected = divergence(softmax(logits.double().numpy()), softmax(near.double().numpy()))
    assert expected.max() < 1e-6
    np.testing.assert_allclose(jensen_shannon(logits, near).numpy(), expected, rtol=5e-3)


def test_low_precision_is_raised_before_the_softmax():
    logits = 8 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = logits.roll(1, dims=-1)
    found = jensen_shannon(logits, other)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, jensen_shannon(logits.float(), other.float()))


def test_nan_stays_and_shapes_must_be_one():
    assert jensen_shannon(torch.tensor([math.nan, 0.0]), torch.zeros(2)).isnan()
    assert jensen_shannon(torch.full((2,), -torch.inf), torch.zeros(2)).isnan()
    with pytest.raises(InputError, match=r"one shape, got \(2, 5\) and \(2, 6\)"):
        jensen_shannon(torch.zeros(2, 5), torch.zeros(2, 6))


# ------------------------------------------------------------------------------ the models
def characters(begins=True):
    """A tokenizer of one token a character, with or without a token that begins every text."""
    alphabet = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(97, 123)), *" \n[]0123456789?."]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>")
    )
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def shaken(model, amount=0.1, seed=1):
    """A copy whose weights are a little off."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=draw)
    return other


PROMPTS = ["how many?", "", "a long question about something or other", "why", "say a word", "b"]
RESPONSES = ["seven", "it is so", "no", "because it is in the text", "", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return characters()


@pytest.fixture(scope="module")
def original():
    return tiny_decoder("llama")


@pytest.fixture(scope="module")
def pruned(original):
    return shaken(original)


@torch.no_grad()
def plainly(original, pruned, sequences):
    """One row and one token at a time, from the logits of the last place."""
    means = []
    for ids, start in sequences:
        found = []
        for end in range(start, len(ids)):
            text = torch.tensor([ids[:end]])
            p, q = (softmax(m(text).logits[0, -1].double().numpy()) for m in (original, pruned))
            found.append(divergence(p, q))
        means.append(np.mean(found) if found else np.nan)
    return np.array(means)


def sequences_of(tokenizer, prompts=PROMPTS, responses=RESPONSES):
    """By the tokenizer itself, one token a character."""
    ids = [
        tokenizer.convert_tokens_to_ids(["<s>", *p, "\n", *r])
        for p, r in zip(prompts, responses, strict=True)
    ]
    return [(row, len(p) + 2) for row, p in zip(ids, prompts, strict=True)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "cohere", "granite"])
def test_is_the_plain_loop(family, tokenizer):
    # The last three scale or cap the logits after the head.
    own = {
        "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 3.0},
    }
    if family in own:
        original = tiny_model(family, intermediate_size=40, **own[family])
    else:
        original = tiny_decoder(family)
    pruned = shaken(original, 0.05)
    expected = plainly(original, pruned, sequences_of(tokenizer))
    found = ResponseDivergence(original, pruned, tokenizer)(PROMPTS, RESPONSES)
    assert found.dtype == np.float64
    assert np.isnan(found).tolist() == [False] * 4 + [True, False]
    assert np.nanmin(found) > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_batches_do_not_matter(original, pruned, tokenizer, monkeypatch):
    draw = np.random.default_rng(0)
    letters = list("abcdefghij ")
    prompts, responses = (
        ["".join(draw.choice(letters, draw.integers(low, 40))) for _ in range(25)] for low in (0, 1)
    )
    scorer = ResponseDivergence(original, pruned, tokenizer)
    together = scorer(prompts, responses)
    alone = [scorer([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    order = draw.permutation(25)
    shuffled = scorer([prompts[i] for i in order], [responses[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)
    # Few logits at once: small batches, and responses in several parts.
    monkeypatch.setattr("data_prune.divergence._COMPARED", 3 * VOCABULARY)
    for room in (1, 7, 90):
        scorer._room = room
        np.testing.assert_allclose(scorer(prompts, responses), together, atol=1e-6)


def test_no_more_logits_than_allowed_are_made(original, pruned, tokenizer, monkeypatch):
    import data_prune.divergence as module

    made, logits_of = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: made.append(logits_of(*args)) or made[-1])
    scorer = ResponseDivergence(original, pruned, tokenizer, logits_mb=1)
    assert scorer._room == 2**20 // (2 * 4 * VOCABULARY)
    scorer._room = 20
    scorer(PROMPTS, RESPONSES)
    sizes = [len(logits) for logits in made]
    assert max(sizes) <= 20
    assert len(sizes) > 2 * 4  # the longest response, of 25, takes two parts


def test_prompts_are_read_but_not_scored(original, pruned, tokenizer):
    scorer = ResponseDivergence(original, pruned, tokenizer)
    one, other = scorer(["one thing", "another"], ["same answer"] * 2)
    assert abs(one - other) > 1e-4
    # Models that differ only in what they say of the prompt's last character would not be apart:
    # the first response token is foretold at the newline.
    sequences = sequences_of(tokenizer, ["ab"], ["c"])
    assert scorer(["ab"], ["c"]) == pytest.approx(plainly(original, pruned, sequences), abs=1e-6)


def test_equal_models_and_exchanged_ones(original, pruned, tokenizer):
    same = ResponseDivergence(original, copy.deepcopy(original), tokenizer)(PROMPTS, RESPONSES)
    assert np.nan_to_num(same, nan=-1).tolist() == [0, 0, 0, 0, -1, 0]
    there = ResponseDivergence(original, pruned, tokenizer)(PROMPTS, RESPONSES)
    back = ResponseDivergence(pruned, original, tokenizer)(PROMPTS, RESPONSES)
    assert np.array_equal(there, back, equal_nan=True)


def test_long_responses_count_only_as_far_as_asked(original, pruned, tokenizer):
    prompts, responses = ["tell me"] * 3, ["abcdefghij" * 7, "abcdefghij" * 3, "abc"]
    capped = ResponseDivergence(original, pruned, tokenizer, max_response_tokens=20)
    assert np.array_equal(capped(prompts, responses), capped(prompts, [r[:20] for r in responses]))
    whole = ResponseDivergence(original, pruned, tokenizer, max_response_tokens=None)
    expected = plainly(original, pruned, sequences_of(tokenizer, prompts, responses))
    np.testing.assert_allclose(whole(prompts, responses), expected, atol=2e-6)
    assert abs(whole(prompts, responses)[0] - capped(prompts, responses)[0]) > 1e-4


def test_rows_longer_than_the_window(original, pruned, tokenizer):
    window = original.config.max_position_embeddings
    prompts = ["z" * 30 + "a" * 200, "b" * 200, "c", "y" * 300]
    responses = ["answer", "abcdefghij" * 30, "e", ""]
    scorer = ResponseDivergence(original, pruned, tokenizer, max_response_tokens=None)
    found = scorer(prompts, responses)
    assert scorer.truncated == 2  # the empty response is not scored, so nothing of it is lost
    sequences = sequences_of(
        tokenizer, ["a" * (window - 8), "", "c"], ["answer", ("abcdefghij" * 30)[: window - 1], "e"]
    )
    # The beginning is kept, then what is nearest to the response; of a response that fills the
    # window alone only the beginning is left before it, not the newline.
    first, second, third = sequences
    assert len(first[0]) == window
    second = ([1, *second[0][2:]], 1)
    assert len(second[0]) == window
    expected = plainly(original, pruned, [first, second, third])
    np.testing.assert_allclose(found[:3], expected, atol=2e-6)
    assert np.isnan(found[3])
    scorer(prompts, responses)
    assert scorer.truncated == 4


def test_without_a_token_that_begins_texts(original, pruned):
    tokenizer = characters(begins=False)
    scorer = ResponseDivergence(original, pruned, tokenizer, max_response_tokens=None)
    ids = tokenizer.convert_tokens_to_ids([*"ab", "\n", *"cde"])
    expected = plainly(original, pruned, [(ids, 3)])
    assert scorer(["ab"], ["cde"]) == pytest.approx(expected, abs=1e-6)
    long = scorer(["q" * 200], ["cde"])
    ids = tokenizer.convert_tokens_to_ids([*("q" * 124), "\n", *"cde"])
    assert long == pytest.approx(plainly(original, pruned, [(ids, 125)]), abs=1e-6)


def test_prompts_in_the_models_own_words(original, pruned, tokenizer):
    chat = ResponseDivergence(original, pruned, tokenizer, template="chat")
    text = ["<s>", *"[user]hi there\n[assistant]"]
    ids = tokenizer.convert_tokens_to_ids([*text, *"yes"])
    expected = plainly(original, pruned, [(ids, len(text))])  # the template began the text: one <s>
    assert chat(["hi there"], ["yes"]) == pytest.approx(expected, abs=1e-6)
    assert encode(tokenizer, worded(tokenizer, "hi", "chat"), "yes")[0][:2].count(1) == 1


# ------------------------------------------------------------------------------ errors, identity
def test_what_cannot_be_compared(original, pruned, tokenizer):
    other = tiny_decoder("llama", vocab_size=VOCABULARY + 8)
    with pytest.raises(InputError, match=r"vocabulary of 96 tokens and the pruned one of 104"):
        ResponseDivergence(original, other, tokenizer)
    small = tiny_decoder("llama", vocab_size=20)
    with pytest.raises(InputError, match="The tokenizer has 46 tokens and the models only 20"):
        ResponseDivergence(small, small, tokenizer)
    with pytest.raises(InputError, match="training mode"):
        ResponseDivergence(original, copy.deepcopy(pruned).train(), tokenizer)
    with pytest.raises(InputError, match="max_response_tokens must be a whole number >= 1, got 0"):
        ResponseDivergence(original, pruned, tokenizer, max_response_tokens=0)
    with pytest.raises(InputError, match="logits_mb must be"):
        ResponseDivergence(original, pruned, tokenizer, logits_mb=0)
    with pytest.raises(InputError, match="must be 'plain' or 'chat', got 'alpaca'"):
        ResponseDivergence(original, pruned, tokenizer, template="alpaca")
    bare = characters()
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ResponseDivergence(original, pruned, bare, template="chat")
    with pytest.raises(InputError, match="got 2 prompts and 1 responses"):
        ResponseDivergence(original, pruned, tokenizer)(["a", "b"], ["c"])


def test_no_rows_and_empty_ones(original, pruned, tokenizer):
    scorer = ResponseDivergence(original, pruned, tokenizer)
    assert scorer([], []).shape == (0,)
    assert np.isnan(scorer(["a", "b"], ["", ""])).all()


def test_broken_weights_are_not_taken_for_an_empty_response(original, tokenizer):
    broken = copy.deepcopy(original)
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(InputError, match=r"pruned model's logits are not numbers"):
        ResponseDivergence(original, broken, tokenizer)(["a"], ["b"])
    with pytest.raises(InputError, match=r"original model's logits are not numbers"):
        ResponseDivergence(broken, original, tokenizer)(["a"], ["b"])


def test_a_model_that_gives_all_logits_is_refused(original, pruned, tokenizer):
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.device = model, model.config, model.device

        def forward(self, input_ids, logits_to_keep=None, **others):
            return self.model(input_ids)

    with pytest.raises(InputError, match="Wrapped gives logits of all places"):
        ResponseDivergence(original, Wrapped(pruned).eval(), tokenizer)(["some"], ["thing"])


def test_fingerprint(original, pruned, tokenizer):
    def of(first, second, **settings):
        return json.dumps(ResponseDivergence(first, second, tokenizer, **settings).fingerprint)

    known = of(original, pruned)
    assert known == of(copy.deepcopy(original), copy.deepcopy(pruned), logits_mb=7)
    changed = copy.deepcopy(pruned)
    changed.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-6
    others = [
        of(original, changed),
        of(pruned, original),
        of(original, copy.deepcopy(pruned).bfloat16()),
        of(original, pruned, template="chat"),
        of(original, pruned, max_response_tokens=64),
    ]
    assert len({known, *others}) == 6
