"""PH3 on tiny random models with grouped KV heads, against a re-derivation one head at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prune_core.errors import InputError
from rag_prune import METHODS, ContextPruner
from rag_prune.heads import PH3, Conflict, HeadScores
from tiny import toy_tokenizer

LAYERS, HEADS = 3, 4
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
CONFLICTS = [
    Conflict(
        f"the {a} was in {told} . where is the {a} ? it is in",
        f"the {b} was in {other} . where is the {b} ? it is in",
        f" {known}",
        f" {told}",
    )
    for a, b, known, told, other in (
        ("cat", "dog", "paris", "rome", "oslo"),
        ("bird", "tree", "lima", "cairo", "delhi"),
        ("king", "queen", "oslo", "berlin", "lima"),
    )
]


class Words:
    """The toy tokenizer without the marks that BERT puts around a text."""

    bos_token = None

    def __init__(self):
        self.inner = toy_tokenizer()

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text, add_special_tokens=False)


def build(family="llama", **settings):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(
        config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            # Not hidden_size / heads, except in Qwen2, whose heads have no size of their own.
            **({} if family == "qwen2" else {"head_dim": 12}),
            initializer_range=0.3,
            pad_token_id=0,
            **settings,
        )
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Words()


@pytest.fixture
def model():
    return build()


@pytest.fixture(scope="module")
def scores(tokenizer):
    return PH3.find(build(), tokenizer, CONFLICTS, progress=False)


IDS = torch.tensor([[5, 9, 17, 30, 41], [7, 7, 2, 60, 3]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def head_inputs(model, ids, layer):
    """What `o_proj` of the layer reads, from a plain run."""
    seen = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    model(ids)
    hook.remove()
    return seen[0]


@torch.no_grad()
def patched_logits(model, tokenizer, conflict, layer, head):
    """The last logits when one head's last output is the corrupted one's and others are held.

    One whole forward pass, with hooks on every layer: slow, and plain.
    """
    size = model.model.layers[0].self_attn.head_dim
    ids, other = (
        torch.tensor([tokenizer(text).input_ids]) for text in (conflict.prompt, conflict.corrupted)
    )
    held = [head_inputs(model, ids, i).clone() for i in range(LAYERS)]
    part = slice(head * size, (head + 1) * size)
    held[layer][0, -1, part] = head_inputs(model, other, layer)[0, -1, part]
    hooks = [
        model.model.layers[i].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, i=i: (held[i],)
        )
        for i in range(LAYERS)
    ]
    out = model(ids).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_path_patching_is_one_head_at_a_time(family, tokenizer):
    model = build(family)
    found = PH3.find(model, tokenizer, CONFLICTS, batch_size=2, progress=False)
    for layer in range(LAYERS):
        for head in range(HEADS):
            for answers, scored in (("memory", found.memory), ("context", found.context)):
                changes = []
                for conflict in CONFLICTS:
                    [token] = tokenizer(getattr(conflict, answers)).input_ids
                    ids = torch.tensor([tokenizer(conflict.prompt).input_ids])
                    with torch.no_grad():
                        clean = model(ids).logits[0, -1, token]
                    patched = patched_logits(model, tokenizer, conflict, layer, head)[token]
                    changes.append(float(clean - patched))
                assert scored[layer, head] == pytest.approx(np.mean(changes), abs=1e-5)
    assert found.memory.shape == (LAYERS, HEADS)
    assert found.conflicts == len(CONFLICTS)
    assert abs(found.memory).max() > 0.01


def test_the_direct_path_by_hand(model, tokenizer):
    """Without MLPs a head reaches the logits through the residual stream and the last norm."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    [conflict] = CONFLICTS[:1]
    found = PH3.find(model, tokenizer, [conflict], progress=False)
    ids, other = (
        torch.tensor([tokenizer(t).input_ids]) for t in (conflict.prompt, conflict.corrupted)
    )
    [token] = tokenizer(conflict.memory).input_ids
    with torch.no_grad():
        stream = model.model.embed_tokens(ids)[0, -1]
        for i, layer in enumerate(model.model.layers):
            stream = stream + head_inputs(model, ids, i)[0, -1] @ layer.self_attn.o_proj.weight.T
        was, now = (head_inputs(model, x, 1)[0, -1, 24:36] for x in (ids, other))
        change = model.model.layers[1].self_attn.o_proj.weight[:, 24:36] @ (now - was)

        def logit(state):
            scaled = state / (state.square().mean() + model.config.rms_norm_eps).sqrt()
            return float(scaled * model.model.norm.weight @ model.lm_head.weight[token])

        expected = logit(stream) - logit(stream + change)
    assert found.memory[1, 2] == pytest.approx(expected, abs=1e-5)


def test_alone_as_in_a_batch(model, tokenizer, scores):
    alone = PH3.find(model, tokenizer, CONFLICTS, batch_size=1, progress=False)
    np.testing.assert_allclose(alone.memory, scores.memory, atol=1e-5)
    np.testing.assert_allclose(alone.context, scores.context, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_mask_and_fold_and_zeroed_columns_are_one(tied):
    chosen = ((0, 3), (2, 0), (2, 1))
    ph3 = PH3(heads=chosen)
    model = build(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_hand = build(tie_word_embeddings=tied)
    with torch.no_grad():
        for layer, head in chosen:
            columns = slice(12 * head, 12 * head + 12)
            by_hand.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0
    with ph3.apply(model) as masked:
        assert masked is model
        under_mask = logits(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    torch.testing.assert_close(under_mask, logits(by_hand), atol=1e-6, rtol=0)
    assert abs(under_mask - logits(model)).max() > 1e-3

    assert ph3.fold(model) is model
    torch.testing.assert_close(logits(model), under_mask, atol=1e-6, rtol=0)
    for name, tensor in model.state_dict().items():
        assert name.endswith("o_proj.weight") or torch.equal(tensor, before[name])
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied


def test_a_folded_model_is_saved_and_loaded(model, tmp_path, scores):
    PH3(heads=5, scores=scores).fold(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LlamaForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_no_heads_is_identity(model, scores):
    whole = logits(model)
    ph3 = PH3(heads=0, scores=scores)
    with ph3.apply(model):
        assert torch.equal(logits(model), whole)
    assert torch.equal(logits(ph3.fold(model)), whole)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_no_hook_is_left(model, tokenizer, scores, monkeypatch):
    whole = logits(model)
    ph3 = PH3(heads=6, scores=scores)

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    def use_and_fail():
        with ph3.apply(model):
            assert hooks(model) == len({layer for layer, _ in ph3.pruned})
            fail()

    with pytest.raises(RuntimeError, match="stop"):
        use_and_fail()
    assert hooks(model) == 0
    assert torch.equal(logits(model), whole)

    monkeypatch.setattr(model.model.norm, "forward", fail)
    with pytest.raises(RuntimeError, match="stop"):
        PH3.find(model, tokenizer, CONFLICTS, progress=False)
    assert hooks(model) == 0


def test_masks_nest(model, scores):
    first, second = PH3(heads=((0, 0),)), PH3(heads=((0, 1), (1, 2)))
    with PH3(heads=((0, 0), (0, 1), (1, 2))).apply(model):
        expected = logits(model)
    with first.apply(model), second.apply(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


def test_ranks_are_opposite():
    memory = np.array([[0.5, 0.0], [-1.0, 0.25]])
    context = np.array([[0.0, 0.5], [1.0, 0.25]])
    scores = HeadScores(memory, context, 1)
    # Memory less context: .5, −.5, −2, 0.
    assert scores.ranked("context") == [(0, 0), (1, 1), (0, 1), (1, 0)]
    assert scores.ranked("memory") == [(1, 0), (0, 1), (1, 1), (0, 0)]
    ph3 = PH3(prefer="memory", heads=2, scores=scores)
    assert ph3.pruned == ((1, 0), (0, 1))
    assert dataclasses.replace(ph3, prefer="context", heads=1).pruned == ((0, 0),)


def test_scores_are_saved_and_loaded(scores, tmp_path):
    scores.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert np.array_equal(again.memory, scores.memory)
    assert np.array_equal(again.context, scores.context)
    assert again.conflicts == scores.conflicts


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"memory": [[1]], "context": [[1, 2]], "conflicts": 1}']
)
def test_a_file_that_holds_no_scores(tmp_path, text):
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(InputError, match=r"heads\.json"):
        HeadScores.load(tmp_path / "heads.json")


def test_a_stopped_search_goes_on(model, tokenizer, scores, tmp_path, monkeypatch):
    import rag_prune.heads as module

    effects, calls = module._effects, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return effects(*args)

    monkeypatch.setattr(module, "_effects", stopping)
    settings = {"batch_size": 1, "resume": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        PH3.find(model, tokenizer, CONFLICTS, **settings)
    again = PH3.find(model, tokenizer, CONFLICTS, **settings)
    assert len(calls) == 2 + len(CONFLICTS) - 1
    np.testing.assert_allclose(again.memory, scores.memory, atol=1e-5)
    with pytest.raises(InputError, match="was made by other work: 'conflicts'"):
        PH3.find(model, tokenizer, CONFLICTS[:2], **settings)
    with pytest.raises(InputError, match="was made by other work: 'o_proj'"):
        PH3.find(PH3(heads=((0, 0),)).fold(model), tokenizer, CONFLICTS, **settings)


def test_bad_settings(scores):
    with pytest.raises(InputError, match="prefer must be 'context' or 'memory', got 'both'"):
        PH3(prefer="both", heads=1, scores=scores)
    with pytest.raises(InputError, match="there are no scores to rank by"):
        PH3(heads=4)
    with pytest.raises(InputError, match=r"heads must be in \[0, 12\], .* got 13"):
        PH3(heads=13, scores=scores)
    with pytest.raises(InputError, match=r"names \(0, 1\) twice"):
        PH3(heads=((0, 1), (2, 2), (0, 1)))


def test_bad_models(model, tokenizer, scores):
    for head in ((3, 0), (0, 4), (-1, 0)):
        with (
            pytest.raises(InputError, match="the model has 3 layers of 4 heads"),
            PH3(heads=(head,)).apply(model),
        ):
            pass
    other = HeadScores(np.zeros((2, 2)), np.zeros((2, 2)), 1)
    with pytest.raises(InputError, match="scores are of 2 layers of 2 heads, the model has 3"):
        PH3(heads=1, scores=other).fold(model)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64))
    with pytest.raises(InputError, match="GPT2LMHeadModel has none"):
        PH3.find(gpt2, tokenizer, CONFLICTS)
    # A norm behind the MLP, as in Gemma 2, would make the path another one.
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _, inputs, out: out * (2.0 if inputs[0].shape[1] > 13 else 1))
    with pytest.raises(InputError, match="PH3 cannot follow the path"):
        PH3.find(model, tokenizer, CONFLICTS, progress=False)


def test_bad_conflicts(model, tokenizer):
    with pytest.raises(InputError, match="at least one conflict"):
        PH3.find(model, tokenizer, [])
    [conflict] = CONFLICTS[:1]
    with pytest.raises(InputError, match="' rome' and ' rome' start with the same token"):
        PH3.find(model, tokenizer, [dataclasses.replace(conflict, memory=" rome")])
    for answer in ("", "ner"):
        with pytest.raises(InputError, match="does not go on from"):
            PH3.find(model, tokenizer, [dataclasses.replace(conflict, memory=answer)])


def test_the_row_names_the_class():
    assert METHODS.get("ph3") is PH3
    assert METHODS.row("ph3").family == "heads"
    with pytest.raises(InputError, match="prunes a language model's heads, not a context"):
        ContextPruner.from_pretrained(method="ph3")
