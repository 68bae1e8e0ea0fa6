"""The public face: what `prune` promises, and one sentence for each thing that can go wrong."""

import importlib
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from prune_core.errors import InputError
from rag_prune import METHODS, ContextPruner, PrunedContext
from rag_prune.context import windows
from rag_prune.context.both import JOINT
from rag_prune.context.result import Passage, Request, Scores
from tiny import PASSAGES, QUESTION

ROOT = Path(__file__).parents[2]


class Fixed:
    """Scores that a test writes down: {passage: (relevance, [scores of its sentences])}."""

    name = "fixed"

    def __init__(self, table):
        self.table = table

    def score(self, requests):
        return [
            [Scores(self.table[p.text][0], np.array(self.table[p.text][1])) for p in r.passages]
            for r in requests
        ]


class Words:
    """A tokenizer of words."""

    @staticmethod
    def encode(text, add_special_tokens=True):
        return text.split()


A, B, C = "One. Two. Three.", "Four. Five.", "Six."
TABLE = {A: (0.2, [0.9, 0.0, 0.3]), B: (0.8, [0.05, 0.6]), C: (0.5, [0.1])}


@pytest.fixture
def fixed():
    return ContextPruner(Fixed(TABLE))


@pytest.fixture(scope="module")
def bm25():
    return ContextPruner.from_pretrained(method="bm25")


def texts(sentences):
    return [sentence.text for sentence in sentences]


# ---------------------------------------------------------------------------------- what comes out


def test_each_sentence_has_its_score_and_reason(fixed):
    result = fixed.prune(QUESTION, [A, B, C])
    assert texts(result.passages[0].kept) == ["One. ", "Three."]
    assert texts(result.passages[0].dropped) == ["Two. "]
    assert result.passages[0].dropped[0].reason == "score 0 < threshold 0.1"
    [five] = result.passages[1].kept
    assert (five.start, five.end, five.score) == (6, 11, 0.6)
    assert five.reason == "score 0.6 ≥ threshold 0.1"
    assert [p.relevance for p in result.passages] == [0.2, 0.8, 0.5]
    assert [p.rank for p in result.passages] == [2, 0, 1]


def test_text_has_the_best_passage_first_unless_told_otherwise(fixed):
    assert fixed.prune(QUESTION, [A, B, C]).text == "Five.\n\nSix.\n\nOne. Three."
    assert fixed.prune(QUESTION, [A, B, C], reorder=False).text == "One. Three.\n\nFive.\n\nSix."
    titled = fixed.prune(QUESTION, [A, {"title": "Numbers", "text": B}], threshold=0.5)
    assert titled.text == "Numbers\nFive.\n\nOne."
    assert titled.pruned == [{"title": "Numbers", "text": "Five."}, "One. "]
    assert [p.index for p in titled.remaining] == [1, 0]


def test_code_keeps_its_indentation_in_text():
    code = "Like this:\n\n    def f():\n        return 1\n"
    pruner = ContextPruner(Fixed({code: (1.0, [0.0, 1.0])}))
    assert pruner.prune(QUESTION, [code]).text == "    def f():\n        return 1"


def test_keep_ratio_is_the_share_of_all_characters(fixed):
    result = fixed.prune(QUESTION, [A, B, C], keep_ratio=0.5)  # "Three." is the first too much
    assert [p.text for p in result.passages] == ["One. ", "Five.", "Six."]
    assert result.keep_ratio == pytest.approx(14 / 31)
    assert result.passages[0].dropped[1].reason == "over the budget of 15 characters"


def test_max_tokens_holds_for_the_whole_text_titles_included(fixed):
    passages = [A, {"title": "A long title", "text": B}, C]
    result = fixed.prune(QUESTION, passages, max_tokens=5, tokenizer=Words)
    assert result.text == "A long title\nFive.\n\nOne."
    assert result.tokens(Words) == 5
    assert result.passages[0].dropped[1].reason == "over the budget of 5 tokens"
    assert result.recut(max_tokens=4, tokenizer=Words).text == "One."
    assert result.recut(max_tokens=9, tokenizer=Words).passages[0].dropped == []
    assert result.recut(max_tokens=0, tokenizer=Words).text == ""


def test_a_sentence_without_a_token_brings_no_title_over_the_budget():
    pruner = ContextPruner(Fixed({"_": (1.0, [1.0])}))
    tokenizer = type("Dropping", (), {"encode": lambda text: text.replace("_", "").split()})
    result = pruner.prune(
        QUESTION, [{"title": "T", "text": "_"}], max_tokens=0, tokenizer=tokenizer
    )
    assert result.text == ""
    assert result.recut(max_tokens=1, tokenizer=tokenizer).text == "T\n_"


def test_tokens_are_counted_with_any_kind_of_tokenizer(bm25, tiny_pruners):
    text = "Radium \ud800 was found. <|endoftext|> It glows."

    class Tiktoken:
        """Like tiktoken's: `encode` takes no add_special_tokens and refuses their names."""

        def encode(self, text):
            raise ValueError("disallowed special token")

        def encode_ordinary(self, text):
            return text.split()

    transformers = tiny_pruners["provence"].scorer.checkpoint.tokenizer
    for tokenizer in (Words, Tiktoken(), transformers, transformers.backend_tokenizer):
        result = bm25.prune("glows?", [text], max_tokens=4, tokenizer=tokenizer)
        assert 0 <= result.tokens(tokenizer) <= 4
        assert result.recut(max_tokens=60, tokenizer=tokenizer).text == text


def test_top_k_keeps_the_most_relevant_passages_and_survives_a_recut(fixed):
    result = fixed.prune(QUESTION, [A, B, C], top_k=2, threshold=0)
    assert [p.text for p in result.passages] == ["", B, C]
    assert result.passages[0].dropped[0].reason == "relevance rank 3 is beyond top_k 2"
    assert result.recut(keep_ratio=1).text == result.text


def test_a_second_copy_is_dropped_and_takes_no_place_of_top_k(fixed):
    result = fixed.prune(QUESTION, [A, B, B, C], threshold=0, top_k=2)
    assert [p.text for p in result.passages] == ["", B, "", C]
    assert {s.reason for s in result.passages[2].dropped} == {"duplicate of passage 1"}
    same_text_other_title = [{"title": "x", "text": C}, {"title": "y", "text": C}]
    assert fixed.prune(QUESTION, same_text_other_title).text == "x\nSix.\n\ny\nSix."


def test_to_dict_is_plain_json(tiny_pruner):
    result = tiny_pruner.prune(QUESTION, [*PASSAGES, "\ud800 \x00", ""], threshold=0.5)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.to_dict()["text"] == result.text


def test_to_html_writes_a_page(tiny_pruner, tmp_path):
    tiny_pruner.prune(QUESTION, PASSAGES).to_html(tmp_path / "page.html")
    assert "Curie" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_given_is_edited(tiny_pruner):
    passage = dict(PASSAGES[1])
    result = tiny_pruner.prune(QUESTION, [passage], threshold=0.5)
    assert result.passages[0].passage is passage
    assert passage == PASSAGES[1]
    assert result.passages[0].pruned == passage | {"text": result.passages[0].text}


def test_stream_is_lazy_and_in_order(bm25):
    taken = []

    def requests():
        for i in range(10):
            taken.append(i)
            yield f"radium {i}", [f"Radium {i} was found. Cats sleep."]

    results = bm25.stream(requests(), batch_size=3, keep_ratio=0.7)
    assert taken == []
    first = next(results)
    assert taken == [0, 1, 2, 3, 4, 5]  # those of the next batch are read while this one is scored
    assert [r.text for r in [first, *results]] == [f"Radium {i} was found." for i in range(10)]
    with pytest.raises(InputError, match="batch_size must be at least 1 request, got 0"):
        bm25.stream([], batch_size=0)


def test_many_is_empty_for_none(tiny_pruner):
    assert tiny_pruner.prune_many([]) == []


# --------------------------------------------------------------------------------- odd but allowed


def test_no_passages_are_an_empty_result(tiny_pruner):
    result = tiny_pruner.prune(QUESTION, [])
    assert isinstance(result, PrunedContext)
    assert (result.text, result.passages, result.pruned, result.keep_ratio) == ("", (), [], 1.0)
    assert result.recut(max_tokens=5, tokenizer=Words).text == ""


def test_empty_and_blank_passages(tiny_pruner):
    result = tiny_pruner.prune(QUESTION, ["", " \n", "Radium."], threshold=0)
    assert [p.text for p in result.passages] == ["", " \n", "Radium."]
    assert [p.relevance for p in result.passages[:2]] == [0, 0]
    assert result.text == "Radium."
    assert tiny_pruner.prune(QUESTION, ["", " \n"]).text == ""


def test_a_passage_without_a_sentence_end_is_one_sentence(tiny_pruner):
    [passage] = tiny_pruner.prune(QUESTION, ["radium was found"], threshold=0).passages
    assert texts(passage.kept) == ["radium was found"]


@pytest.mark.parametrize("hostile", ["a\ud800b. End.", "\udfff", "a\x00b. \x00", "\x00", "\u200b"])
def test_characters_that_tokenizers_refuse_or_drop(tiny_pruner, bm25, hostile):
    for pruner in (tiny_pruner, bm25):
        for question, passages in ((QUESTION, [hostile]), (hostile, ["Radium."])):
            result = pruner.prune(question, passages, threshold=0)
            assert [p.text for p in result.passages] == passages


@pytest.mark.parametrize("special", ["[SEP]", "[CLS]", "[MASK]", "[PAD]"])
@pytest.mark.parametrize("method", ["provence", "late"])
def test_special_token_strings_are_plain_text(tiny_checkpoint, method, special, monkeypatch):
    text = f"Curie found it. {special} Ignore the rest."
    passage = Passage.read(text, 0)

    def scores():
        scorer = ContextPruner.from_pretrained(tiny_checkpoint, method=method).scorer
        return scorer.score([Request(QUESTION, (passage,))])[0][0].sentences

    plain = scores()
    module = importlib.import_module(METHODS.row(method).module)
    tokenizer = ContextPruner.from_pretrained(tiny_checkpoint).scorer.checkpoint.tokenizer
    [tokens] = module.tokenise(tokenizer, [text], [passage.spans])
    # [UNK] is no separator: it stands for whatever is not in the vocabulary.
    assert not set(tokens.ids.tolist()) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    # Read as a real token, the same string would have given other scores.
    monkeypatch.setattr(module, "tokenise", _tokenise_with_specials)
    assert abs(scores() - plain).max() > 1e-3


def _tokenise_with_specials(tokenizer, texts, spans):
    def encode(tokenizer, texts):
        return tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "encode_plain", encode)
        return windows.tokenise(tokenizer, texts, spans)


def test_a_question_longer_than_the_window_warns_and_works(tiny_pruner):
    with pytest.warns(UserWarning, match="The question has 900 tokens; .* Ask a shorter question"):
        result = tiny_pruner.prune("why " * 300, PASSAGES, threshold=0)
    assert result.keep_ratio == 1


def test_a_long_title_leaves_room_for_the_passage(tiny_pruner):
    titled = {"title": "radium " * 200, "text": "Curie found radium. " * 30}
    [passage] = tiny_pruner.prune(QUESTION, [titled], threshold=0).passages
    assert all(s.score > 0 for s in passage.kept)


def test_a_sentence_longer_than_a_window_is_read_to_its_end(tiny_pruner):
    long = "cat " * 300
    same, other = (
        tiny_pruner.prune(QUESTION, [long + last], threshold=0).passages[0].kept
        for last in ("cat", "radium")
    )
    assert len(same) == len(other) == 1
    assert same[0].score != other[0].score


@pytest.mark.parametrize("title", [None, "Curie"])
def test_each_token_of_a_long_passage_is_scored_once_in_its_place(tiny_checkpoint, title):
    """With a network that answers with the token itself, a sentence's score says what was read."""
    import torch

    text = "the cat found radium. It glows! Curie slept in 1898; then 3.14 went by. " * 20
    passage = Passage.read({"text": text, "title": title}, 0)
    request = Request(QUESTION, (passage,))
    meaning = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))

    cross = ContextPruner.from_pretrained(tiny_checkpoint, method="provence").scorer
    cross.checkpoint.model.joint = lambda ids, mask: ids.unsqueeze(-1).repeat(1, 1, 2).float()
    late = ContextPruner.from_pretrained(tiny_checkpoint, method="late").scorer
    late.checkpoint.model.states = lambda ids, mask: meaning[ids]

    [tokens] = windows.tokenise(cross.checkpoint.tokenizer, [text], [passage.spans])
    of_sentence = [tokens.ids[tokens.sentence == i] for i in range(len(passage.spans))]
    [[(keep, _)]] = cross.logits([request])
    np.testing.assert_allclose(keep, [ids.mean() for ids in of_sentence])
    [vectors] = late._encode([passage])
    sums = np.stack([meaning[ids].double().sum(0).numpy() for ids in of_sentence])
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors.sentences, expected, atol=1e-6)


def test_equal_rows_are_run_once_so_that_equal_sentences_tie(tiny_pruners):
    import torch

    rows = [[2, 9, 9, 3], [2, 7, 3], [2, 9, 9, 3], [2, 8, 9, 3]]
    seen = []

    def noisy(ids, mask):
        seen.extend(ids[i, : mask[i].sum()].tolist() for i in range(len(ids)))
        return torch.rand(*ids.shape, 1)

    out = dict(tiny_pruners["provence"].scorer.run(noisy, rows))
    assert sorted(seen) == [[2, 7, 3], [2, 8, 9, 3], [2, 9, 9, 3]]
    assert [len(out[i]) for i in range(4)] == [4, 3, 4, 4]
    np.testing.assert_array_equal(out[0], out[2])
    assert not np.array_equal(out[0], out[3])


def test_a_megabyte_takes_seconds(bm25, tiny_pruners):
    passage = "The cat sat on the mat. Curie found 3.14 g of radium, e.g. in Paris. " * 14_700
    assert len(passage) > 1_000_000
    for pruner, seconds in ((bm25, 2), (tiny_pruners["provence"], 20)):
        started = time.process_time()
        result = pruner.prune(QUESTION, [passage], keep_ratio=0.3)
        assert time.process_time() - started < seconds
        assert 0.25 < result.keep_ratio <= 0.3


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("question", ["", " \n", None, 7, b"who?"])
def test_a_question_without_text(bm25, question):
    with pytest.raises(InputError) as error:
        bm25.prune(question, PASSAGES)
    assert f"must be a string with some text in it, got {question!r}" in str(error.value)


@pytest.mark.parametrize(
    ("passages", "sentence"),
    [
        (["fine", 7], "Passage 1 must be a string, or a mapping .*, got int"),
        ([None], "Passage 0 must be a string, or a mapping .*, got NoneType"),
        ([b"bytes"], "Passage 0 must be a string, or a mapping .*, got bytes"),
        ([{"title": "x"}], r"Passage 0 must be .* got dict with \['title'\]"),
        ([{"text": "x", "title": 7}], r"Passage 0 must be .* got dict with \['text', 'title'\]"),
        ("a string", "The passages must be a list of strings or mappings, got str"),
        ({"text": "x"}, "The passages must be a list of strings or mappings, got dict"),
        (None, "The passages must be a list of strings or mappings, got NoneType"),
    ],
)
def test_passages_that_are_no_text(bm25, passages, sentence):
    with pytest.raises(InputError, match=sentence):
        bm25.prune(QUESTION, passages)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"threshold": 1.5}, r"threshold must be a number in \[0, 1\], got 1.5"),
        ({"threshold": -0.1}, r"threshold must be a number in \[0, 1\], got -0.1"),
        ({"threshold": math.nan}, r"threshold must be a number in \[0, 1\], got nan"),
        ({"threshold": "0.5"}, r"threshold must be a number in \[0, 1\], got '0.5'"),
        ({"keep_ratio": 70}, r"keep_ratio must be a number in \[0, 1\], got 70"),
        ({"max_tokens": -1, "tokenizer": Words}, "max_tokens must be a whole number >= 0, got -1"),
        ({"max_tokens": 0.5, "tokenizer": Words}, "max_tokens must be a whole number >= 0"),
        ({"max_tokens": 512}, "max_tokens needs tokenizer=…"),
        ({"threshold": 0.1, "keep_ratio": 0.5}, "got threshold and keep_ratio: choose one"),
        ({"keep_ratio": 0.5, "max_tokens": 9}, "got keep_ratio and max_tokens: choose one"),
    ],
)
def test_budgets_are_checked_before_the_model_is_called(budget, sentence):
    pruner = ContextPruner(scorer=None)
    for refuse in (
        lambda: pruner.prune(QUESTION, PASSAGES, **budget),
        lambda: pruner.prune_many([(QUESTION, PASSAGES)], **budget),
        lambda: ContextPruner(Fixed(TABLE)).prune(QUESTION, [A]).recut(**budget),
    ):
        with pytest.raises(InputError, match=sentence):
            refuse()


def test_recut_needs_a_budget(fixed):
    with pytest.raises(InputError, match=r"Give exactly one of threshold, .* got none"):
        fixed.prune(QUESTION, [A]).recut()


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "3"])
def test_top_k_is_a_number_of_passages(bm25, top_k):
    with pytest.raises(InputError, match="top_k must be a whole number of passages >= 1"):
        bm25.prune(QUESTION, PASSAGES, top_k=top_k)


def test_both_is_the_weighted_mean_of_the_engines(tiny_pruners):
    requests = [Request.read(QUESTION, PASSAGES)]
    joint, late, both = (
        tiny_pruners[name].scorer.logits(requests)[0] for name in ("provence", "late", "both")
    )
    for (jk, jr), (lk, lr), (keep, relevance) in zip(joint, late, both, strict=True):
        np.testing.assert_allclose(keep, JOINT * jk + (1 - JOINT) * lk, atol=1e-5)
        assert relevance == pytest.approx(JOINT * jr + (1 - JOINT) * lr, abs=1e-5)
