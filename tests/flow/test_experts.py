"""PreMoe's claims, on a mixture that learns two languages: a language's experts carry it.

Both languages have the same 64 words, so that only the grammar tells them apart. Margins are half
of the least that was measured first; docs/experts.md has figures of a larger mixture.
"""

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from model_prune import load_method
from model_prune.patterns import Patterns

pytestmark = pytest.mark.slow

WORDS, LENGTH, EXPERTS, SEEDS = 64, 24, 16, (0, 1, 2)
CHANCES = torch.tensor([0.7, 0.2, 0.1])  # of the three words that may follow a word


def sentences(language, count, seed):
    """int64 [count, LENGTH]."""
    grammar = torch.Generator().manual_seed(language)
    follow = torch.randint(WORDS, (WORDS, 3), generator=grammar)
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(WORDS, (count,), generator=draw)]
    for _ in range(LENGTH - 1):
        which = torch.multinomial(CHANCES.expand(count, 3), 1, generator=draw)[:, 0]
        words.append(follow[words[-1], which])
    return torch.stack(words, 1)


LANGUAGES = {"A": 1, "B": 2}
HELD = {name: sentences(number, 64, 10 + number) for name, number in LANGUAGES.items()}
TEXTS = {name: sentences(number, 32, 20 + number) for name, number in LANGUAGES.items()}


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    """Of the mixture that is trained."""
    return request.param


@pytest.fixture(scope="module")
def mixture(seed):
    """Two layers of 16 experts, 2 a token, after 300 steps; half a minute."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        router_aux_loss_coef=0.02,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        ids = torch.cat([sentences(n, 16, 1000 * n + step) for n in LANGUAGES.values()])
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss(model, language):
    return model(HELD[language], labels=HELD[language]).loss.item()


def half(mixture, language, **settings):
    return load_method("premoe", **settings).plan(mixture, TEXTS[language], progress=False)


@pytest.fixture(scope="module")
def losses(mixture, seed):
    """Of each language by all experts, and by halves: (half, language)."""
    found = {("all", language): loss(mixture, language) for language in LANGUAGES}
    plans = {name: half(mixture, name) for name in LANGUAGES}
    plans |= {f"frequency {name}": half(mixture, name, score="frequency") for name in LANGUAGES}
    plans |= {f"random {i}": half(mixture, "A", score="random", seed=i) for i in range(5)}
    for name, plan in plans.items():
        model = plan.apply(copy.deepcopy(mixture))
        found |= {(name, language): loss(model, language) for language in LANGUAGES}
    print(f"seed {seed}:", {" on ".join(key): round(value, 3) for key, value in found.items()})
    return found


def test_languages_keep_experts_of_their_own(mixture, seed):
    shares = [
        len(set(a.units["expert"].tolist()) & set(b.units["expert"].tolist())) / (EXPERTS // 2)
        for a, b in zip(half(mixture, "A").layers, half(mixture, "B").layers, strict=True)
    ]
    print(f"seed {seed}: experts in common, by layer: {shares}; less than 0.6 on average")
    assert sum(shares) / len(shares) < 0.6


@pytest.mark.parametrize(("own", "other"), [("A", "B"), ("B", "A")])
def test_a_language_loses_less_with_its_own_half(losses, own, other):
    mine, theirs = losses[own, own], losses[other, own]
    drawn = sum(losses[f"random {i}", own] for i in range(5)) / 5
    often = losses[f"frequency {own}", own]  # near it, now above, now below
    print(f"{own}: {mine:.3f}, {other}'s half {theirs:.3f}, random {drawn:.3f}, often {often:.3f}")
    assert mine < theirs - 0.6
    assert mine < drawn - 0.3


def test_queries_find_their_language(mixture, seed, tmp_path):
    library = Patterns(tmp_path)
    for name, text in TEXTS.items():
        library.add(name, mixture, text, progress=False)
    right = 0
    for name, number in LANGUAGES.items():
        for query in sentences(number, 20, 30 + number).view(10, -1):  # two sentences each
            right += library.nearest(mixture, query)[0].task == name
    print(f"seed {seed}: {right} of 20 queries of {2 * LENGTH} words find their language")
    assert right == 20
