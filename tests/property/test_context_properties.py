"""What must hold for any text, any passages and any budget."""

import copy
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_prune import METHODS, ContextPruner
from rag_prune.context.sentences import split
from rag_prune.context.windows import Tokens, windows

# Fixed examples, so that a run fails only where it failed before.
fixed = settings(derandomize=True, deadline=None, max_examples=60)
often = settings(fixed, max_examples=400)

MODELS = ["provence", "late", "both"]
BASELINES = [m.name for m in METHODS if m.family == "baseline" and m.name != "embedding"]

pieces = st.sampled_from(
    [
        *("The cat sat. ", "Radium was found by Curie in 1898. ", "Who knows? ", "e.g. ", "3.14 "),
        *("。", "你好。", "\n", "\r\n", "\n\n", "- ", "1. ", "| a | b |\n", "```\n", "    x = 1\n"),
        *("👨‍👩‍👧", "\u0301", "\x00", "\ud800", "[SEP]", " ", "# ", '"', ")", "…", "A. "),
    ]
)
free = st.text(st.characters(codec=None) | st.sampled_from(string.punctuation + "\n\r\t "))
texts = st.lists(pieces | free, max_size=12).map("".join)
questions = st.sampled_from(["Who found radium?", "cat", "你好？", "[SEP] \ud800"])
passages = texts | st.fixed_dictionaries(
    {"text": texts}, optional={"title": texts | st.none(), "id": st.integers()}
)
requests = st.tuples(questions, st.lists(passages, max_size=4))
budgets = st.one_of(
    st.fixed_dictionaries({"threshold": st.floats(0, 1)}),
    st.fixed_dictionaries({"keep_ratio": st.floats(0, 1)}),
    st.fixed_dictionaries({"max_tokens": st.integers(0, 60)}),
)


class Words:
    """A tokenizer that counts as real ones do: a seam may cost or save a token."""

    @staticmethod
    def encode(text):
        return text.replace("\n", " \n ").split(" ")


def with_tokenizer(budget):
    return budget | ({"tokenizer": Words} if "max_tokens" in budget else {})


@pytest.fixture(params=[*MODELS, *BASELINES], scope="module")
def pruner(request, tiny_pruners):
    if request.param in MODELS:
        return tiny_pruners[request.param]
    return ContextPruner.from_pretrained(method=request.param)


def decisions(result):
    return [
        (p.index, p.rank, [(s.start, s.end, s.reason) for s in sentences])
        for p in result.passages
        for sentences in (p.kept, p.dropped)
    ]


def scores(result):
    return [
        number
        for p in result.passages
        for number in (p.relevance, *(s.score for s in [*p.kept, *p.dropped]))
    ]


def text_of(passage):
    return passage if isinstance(passage, str) else passage["text"]


@often
@given(texts)
def test_sentences_tile_the_text(text):
    spans = split(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(text[start:end].strip() for start, end in spans) or text.isspace()
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]


@often
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 70))
def test_windows_tile_the_tokens(lengths, room):
    sentence = np.repeat(np.arange(len(lengths)), lengths) if lengths else np.zeros(0, np.int64)
    cut = windows(Tokens(np.zeros(len(sentence), np.int64), sentence), room)
    assert all(0 < w.end - w.start <= room for w in cut) or not lengths
    assert all(w.start <= w.own[0] <= w.own[1] <= w.end for w in cut)
    owned = [token for w in cut for token in range(*w.own)]
    assert owned == list(range(len(sentence)))


@fixed
@given(requests, budgets)
def test_kept_and_dropped_are_the_passages(pruner, request, budget):
    question, given_passages = request
    result = pruner.prune(question, given_passages, **with_tokenizer(budget))
    assert len(result.passages) == len(given_passages)
    for i, (passage, original) in enumerate(zip(result.passages, given_passages, strict=True)):
        assert passage.passage is original
        assert passage.index == i
        text = text_of(original)
        sentences = sorted([*passage.kept, *passage.dropped], key=lambda s: s.start)
        assert "".join(s.text for s in sentences) == text
        assert all(s.text == text[s.start : s.end] for s in sentences)
        assert passage.text == "".join(s.text for s in passage.kept)
        assert [s.start for s in passage.kept] == sorted(s.start for s in passage.kept)
        assert all(0 <= s.score <= 1 and s.reason for s in sentences)
        assert 0 <= passage.relevance <= 1
    assert sorted(p.rank for p in result.passages) == list(range(len(given_passages)))


@fixed
@given(st.lists(requests, min_size=2, max_size=3), budgets)
def test_alone_and_in_a_batch_are_the_same(pruner, many, budget):
    budget = with_tokenizer(budget)
    together = pruner.prune_many(many, **budget)
    for (question, given_passages), in_batch in zip(many, together, strict=True):
        late = getattr(pruner.scorer, "late", pruner.scorer)
        getattr(late, "_recent", {}).clear()  # or the second answer would be read from the first
        alone = pruner.prune(question, given_passages, **budget)
        np.testing.assert_allclose(scores(in_batch), scores(alone), atol=1e-5)
        assert [d[:2] for d in decisions(in_batch)] == [d[:2] for d in decisions(alone)]
        assert [p.text for p in in_batch.passages] == [p.text for p in alone.passages]
        assert in_batch.text == alone.text


@fixed
@given(requests, budgets, budgets, st.none() | st.integers(1, 4))
def test_recut_is_a_fresh_cut(pruner, request, first, second, top_k):
    first, second = with_tokenizer(first), with_tokenizer(second)
    fresh = pruner.prune(*request, **second, top_k=top_k)
    recut = pruner.prune(*request, **first, top_k=top_k).recut(**second)
    assert decisions(recut) == decisions(fresh)
    assert recut.to_dict() == fresh.to_dict()


@fixed
@given(requests, st.sampled_from([{"threshold": 0}, {"keep_ratio": 1}]))
def test_nothing_but_duplicates_goes_where_all_may_stay(pruner, request, budget):
    result = pruner.prune(*request, **budget)
    seen = set()
    for passage, original in zip(result.passages, request[1], strict=True):
        title = None if isinstance(original, str) else original.get("title") or None
        if (title, text_of(original)) in seen:
            assert passage.kept == []
            assert all(s.reason.startswith("duplicate of passage") for s in passage.dropped)
        else:
            assert passage.dropped == []
        seen.add((title, text_of(original)))


@fixed
@given(requests, st.floats(0, 1), st.integers(0, 60))
def test_never_over_budget(pruner, request, keep_ratio, max_tokens):
    result = pruner.prune(*request, keep_ratio=keep_ratio)
    total = sum(len(text_of(p)) for p in request[1])
    assert sum(len(p.text) for p in result.passages) <= keep_ratio * total
    result = result.recut(max_tokens=max_tokens, tokenizer=Words)
    assert result.text == "" or result.tokens(Words) <= max_tokens


@fixed
@given(requests)
def test_a_budget_of_all_tokens_drops_nothing(pruner, request):
    everything = pruner.prune(*request, threshold=0)
    room = everything.tokens(Words)
    assert everything.recut(max_tokens=room, tokenizer=Words).text == everything.text


@fixed
@given(requests, budgets)
def test_type_in_is_type_out_and_nothing_given_is_edited(pruner, request, budget):
    question, given_passages = request
    before = copy.deepcopy(given_passages)
    result = pruner.prune(question, given_passages, **with_tokenizer(budget))
    for passage in result.passages:
        original = given_passages[passage.index]
        assert type(passage.pruned) is type(original)
        if isinstance(original, dict):
            assert passage.pruned == original | {"text": passage.text}
    assert given_passages == before
