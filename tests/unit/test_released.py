"""Released checkpoints: our networks and rules against the owners' arithmetic, done again here.

The references read the tensors by their published names and use the stock encoders and plain tensor
operations; of rag_prune.context.released they share only the reading of a tokenizer.json.
"""

from __future__ import annotations

import json
import pickle
import re
import string
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, linear
from transformers import AutoConfig, AutoModel

import releases
from prune_core.errors import CheckpointError, InputError
from rag_prune import METHODS, ContextPruner
from rag_prune.context.released.base import tokenizer as read_tokenizer
from rag_prune.context.released.provence import share_scores
from rag_prune.context.sentences import split
from tiny import PASSAGES, QUESTION

THRESHOLDS = [*np.linspace(0.005, 0.995, 100).tolist(), 0.1, 0.3, 0.5]
TEXTS = [
    "The cat sat on the mat. Curie found radium in Warsaw. It slept! Nobody saw the cat.",
    "Radium",
    "She was born in 1867. [SEP] keep every sentence </s> now. Radium is rare (very rare).",
    "ふ 日本語。你好。 Radium was found. é é é",
]
WORDS = [
    *("the", "cat", "radium", "curie", "found", "in", "finding", "was", "born", "rare"),
    *("of", "it,", "(very)", "a", "1898", "b2"),
]


def long_text(seed, sentences=14, longest=16):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, size=sentences)
    return " ".join(" ".join(rng.choice(WORDS, n)).capitalize() + "." for n in lengths)


def pieces(text):
    return [text[start:end] for start, end in split(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder("provence", window=64)`: the tiny release that `releases.provence` writes, once."""
    made = {}

    def make(maker, **options):
        key = (maker, *options.items())
        if key not in made:
            made[key] = getattr(releases, maker)(tmp_path_factory.mktemp(maker), **options)
        return made[key]

    return make


@cache
def opened(where):
    """config.json, tensors, tokenizer."""
    config = json.loads((where / "config.json").read_text())
    return config, load_file(where / "model.safetensors"), read_tokenizer(where)


def encoder_of(model_type, fields, tensors, prefix, **options):
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **fields), **options)
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(mine)
    return model.eval()


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def fields_of(config):
    return {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "architectures")}


def provence_reference(where, question, sentences):
    """Softmax keep probabilities of each sentence's tokens, the ranking score, and the ids read."""
    config, tensors, tokenizer = opened(where)
    x = config["model_type"] == "XProvence"
    kept = "".join(c for c in question.lower() if c not in string.punctuation)
    ids = [tokenizer.cls_token_id, *plain(tokenizer, " ".join(kept.split()))]
    ids.append(tokenizer.sep_token_id)
    ranges = []
    for i, sentence in enumerate(sentences):
        tokens = plain(tokenizer, " " * (i > 0) + sentence.strip())
        ranges.append((len(ids), len(ids) + len(tokens)))
        ids += tokens
    ids.append(tokenizer.sep_token_id)
    row = torch.tensor([ids])
    with torch.no_grad():
        if x:
            pooled = any("pooler" in name for name in tensors)
            encoder = encoder_of(
                "xlm-roberta", fields_of(config), tensors, "roberta.", add_pooling_layer=pooled
            )
            states = encoder(row).last_hidden_state[0]
            dense, head = (
                ("roberta.pooler.dense", "classifier")
                if pooled
                else ("classifier.dense", "classifier.out_proj")
            )
            first = torch.tanh(
                linear(states[0], tensors[f"{dense}.weight"], tensors[f"{dense}.bias"])
            )
        else:
            encoder = encoder_of("deberta-v2", fields_of(config), tensors, "deberta.")
            states = encoder(row).last_hidden_state[0]
            first = gelu(
                linear(states[0], tensors["pooler.dense.weight"], tensors["pooler.dense.bias"])
            )
            head = "classifier"
        ranking = linear(first, tensors[f"{head}.weight"], tensors[f"{head}.bias"])[0].item()
        logits = linear(
            states, tensors["token_classifier.weight"], tensors["token_classifier.bias"]
        )
        keep = logits.softmax(-1)[:, 1].double().numpy()
    return [keep[low:high] for low, high in ranges], ranking, ids, logits


def naive_share(probabilities, threshold):
    """Provence's rule as its code has it: token decisions, their mean, the same threshold again."""
    if len(probabilities) == 0:
        return False
    return bool((probabilities > threshold).astype(float).mean() > threshold)


def decided(result, threshold):
    """Whether each sentence of the one passage is kept at a threshold."""
    [found] = result.recut(threshold=threshold).passages
    kept = {s.start for s in found.kept}
    return [s.start in kept for s in in_order(found)]


def in_order(passage):
    return sorted([*passage.kept, *passage.dropped], key=lambda s: s.start)


@given(
    st.lists(st.floats(0, 1) | st.integers(0, 12).map(lambda k: k / 12), max_size=12),
    st.floats(0, 1, exclude_min=True) | st.integers(1, 12).map(lambda k: k / 12),
)
def test_one_number_a_sentence_says_provences_rule_at_every_threshold(probabilities, threshold):
    p = np.array(probabilities)
    [score] = share_scores(p, np.zeros(len(p), dtype=np.int64), 1)
    assert 0 <= score <= 1
    assert (score >= threshold) == naive_share(p, threshold)


@pytest.mark.parametrize(
    ("maker", "options"),
    [("provence", {}), ("xprovence", {}), ("xprovence", {"pooled": False})],
    ids=["provence", "xprovence", "xprovence with the reranker's head"],
)
class TestProvence:
    def test_logits(self, folder, maker, options):
        where = folder(maker, **options)
        engine = ContextPruner.from_pretrained(where, device="cpu").scorer
        for text in TEXTS:
            _, ranking, ids, logits = provence_reference(where, QUESTION, pieces(text))
            row = torch.tensor([ids])
            with torch.no_grad():
                out = engine.checkpoint.model.joint(row, torch.ones_like(row))[0]
            assert torch.allclose(out[:, 0], logits[:, 1] - logits[:, 0], rtol=0, atol=1e-5)
            assert out[0, 1].item() == pytest.approx(ranking, abs=1e-5)

    def test_every_decision(self, folder, maker, options):
        where = folder(maker, **options)
        pruner = ContextPruner.from_pretrained(where, device="cpu")
        for question in (QUESTION, "  WHO, then;\tfound it?!"):
            for text in TEXTS:
                reference, ranking, _, _ = provence_reference(where, question, pieces(text))
                result = pruner.prune(question, [text])
                for threshold in THRESHOLDS:
                    wanted = [naive_share(p, threshold) for p in reference]
                    assert decided(result, threshold) == wanted
                [passage] = result.passages
                assert passage.relevance == pytest.approx(1 / (1 + np.exp(-ranking)), abs=1e-6)

    def test_a_title_is_a_sentence_in_front(self, folder, maker, options):
        where = folder(maker, **options)
        pruner = ContextPruner.from_pretrained(where, device="cpu")
        passage = {"title": " Marie Curie", "text": TEXTS[0]}
        reference, _, _, _ = provence_reference(where, QUESTION, ["Marie Curie", *pieces(TEXTS[0])])
        result = pruner.prune(QUESTION, [passage])
        for threshold in THRESHOLDS:
            wanted = [naive_share(p, threshold) for p in reference[1:]]
            assert decided(result, threshold) == wanted

    def test_long_passages_are_read_to_the_end(self, folder, maker, options):
        """The first window sees what the reference sees of the same tokens, its overlap apart."""
        pruner = ContextPruner.from_pretrained(folder(maker, **options), device="cpu")
        text = long_text(1, sentences=40)
        rows = []
        run = pruner.scorer.run
        pruner.scorer.run = lambda forward, given: run(forward, rows.extend(given) or given)
        result = pruner.prune(QUESTION, [text])
        assert len(rows) > 3
        assert max(map(len, rows)) <= 128
        assert all(0 < s.score < 1 for s in [*result.passages[0].kept, *result.passages[0].dropped])


def open_reference(where, question, sentences, title=""):
    """Each sentence's score and the passage's, with blocks and fragments as in the owners' code.

    One thing is put right: with a title they read each range as many tokens too early as it has.
    """
    config, tensors, tokenizer = opened(where)
    if not any(name.startswith("ranking_model.") for name in tensors):
        old = tensors.items()
        tensors = {k if "pruning_head" in k else f"ranking_model.{k}": v for k, v in old}
    base = dict(config["base_model_config"])
    kind = base.pop("model_type")
    longest, asked = config["max_length"], plain(tokenizer, question)
    texts = [title.strip() + "\n"] * bool(title) + sentences
    step = max(16, longest // 2)
    fragments = [
        (number, tokens[low : low + step])
        for number, text in enumerate(texts)
        for tokens in [plain(tokenizer, text)]
        for low in range(0, len(tokens), step)
    ]
    fragments = [f for f in fragments if tokenizer.decode(f[1], skip_special_tokens=True)]
    filled, current, used = [], [], len(asked) + 1
    for number, tokens in fragments:
        if used + len(tokens) <= longest - 2:
            current.append((number, tokens))
            used += len(tokens)
            continue
        if current:
            filled.append(current)
        tokens = tokens[: max(1, longest - 3 - len(asked))]
        current, used = [(number, tokens)], len(asked) + 1 + len(tokens)
    filled += [current] * bool(current)
    prefix = {"modernbert": "model.", "xlm-roberta": "roberta.", "bert": "bert."}[kind]
    options = {"add_pooling_layer": False} if kind == "xlm-roberta" else {}
    encoder = encoder_of(kind, base, tensors, f"ranking_model.{prefix}", **options)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    means, best, entered = [[] for _ in texts], 0.0, []
    if kind == "modernbert":
        encoder.final_norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    for block in filled:
        front = [cls, *asked, sep] + [sep] * (kind == "xlm-roberta")
        ids = torch.tensor([[*front, *(t for _, tokens in block for t in tokens), sep]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "bert":
            types = [0] * len(front) + [1] * (ids.shape[1] - len(front))
            inputs["token_type_ids"] = torch.tensor([types])
        with torch.no_grad():
            states = encoder(**inputs).last_hidden_state[0]
            before = entered[-1][0] if entered else states
            keep = linear(
                before,
                tensors["pruning_head.classifier.weight"],
                tensors["pruning_head.classifier.bias"],
            )
            probabilities = keep.softmax(-1)[:, 1].numpy()
            score = ranked(kind, encoder, tensors, states)
        best = max(best, 1 / (1 + np.exp(-score)))
        at = len(front)
        for number, tokens in block:
            means[number].append(float(probabilities[at : at + len(tokens)].mean()))
            at += len(tokens)
    scores = [float(np.mean(m)) if m else 0.0 for m in means]
    return scores[bool(title) :], best, len(filled)


def ranked(kind, encoder, tensors, states):
    """The ranking logit from the tensors, by each stock classification head's arithmetic."""

    def head(name, x):
        bias = tensors.get(f"ranking_model.{name}.bias")
        return linear(x, tensors[f"ranking_model.{name}.weight"], bias)

    if kind == "modernbert":
        pooled = gelu(head("head.dense", states.mean(0)))
        gain = tensors["ranking_model.head.norm.weight"]
        pooled = torch.nn.functional.layer_norm(pooled, (len(gain),), gain, None, 1e-5)
        return head("classifier", pooled).item()
    if kind == "bert":
        return head("classifier", torch.tanh(head("bert.pooler.dense", states[0]))).item()
    return head("classifier.out_proj", torch.tanh(head("classifier.dense", states[0]))).item()


@pytest.mark.parametrize("encoder", ["modernbert", "xlm-roberta", "bert"])
class TestOpenProvence:
    def check(self, pruner, where, passage, sentences, title=""):
        scores, best, n_blocks = open_reference(where, QUESTION, sentences, title)
        result = pruner.prune(QUESTION, [passage])
        [found] = result.passages
        ours = [s.score for s in in_order(found)]
        np.testing.assert_allclose(ours, scores, rtol=0, atol=2e-6)
        assert found.relevance == pytest.approx(best, abs=2e-6)
        for threshold in THRESHOLDS:
            wanted = [score > threshold for score in scores]
            assert decided(result, threshold) == wanted
        return n_blocks

    def test_every_score_and_decision(self, folder, encoder):
        where = folder("open_provence", encoder=encoder)
        pruner = ContextPruner.from_pretrained(where, device="cpu")
        for text in TEXTS:
            self.check(pruner, where, text, pieces(text))

    def test_blocks_and_fragments_of_long_passages(self, folder, encoder):
        where = folder("open_provence", encoder=encoder)
        pruner = ContextPruner.from_pretrained(where, device="cpu")
        for seed, longest in ((1, 16), (2, 60)):  # 60 words are more than half a window
            text = long_text(seed, sentences=12, longest=longest)
            assert self.check(pruner, where, text, pieces(text)) > 2

    def test_a_title_stands_in_front_and_is_not_scored(self, folder, encoder):
        where = folder("open_provence", encoder=encoder)
        pruner = ContextPruner.from_pretrained(where, device="cpu")
        for text in (TEXTS[0], long_text(3)):
            passage = {"title": "Marie Curie ", "text": text}
            self.check(pruner, where, passage, pieces(text), "Marie Curie ")

    def test_older_files_without_the_prefix(self, folder, encoder):
        passages = [*TEXTS, *PASSAGES]
        new, old = (
            ContextPruner.from_pretrained(
                folder("open_provence", encoder=encoder, prefixed=prefixed), device="cpu"
            ).prune(QUESTION, passages)
            for prefixed in (True, False)
        )
        assert new.to_dict() == old.to_dict()


def test_the_keep_head_reads_what_enters_the_final_norm(folder):
    """With transformers 5 the last hidden state is behind the norm: reading it would differ."""
    where = folder("open_provence")
    pruner = ContextPruner.from_pretrained(where, device="cpu")
    network = pruner.scorer.checkpoint.model
    ids = torch.tensor([[0, 10, 11, 1, 12, 13, 14, 1]])
    with torch.no_grad():
        ours = network.joint(ids, torch.ones_like(ids))[0, :, 0]
        behind = network.ranking_model.model(ids).last_hidden_state
        keep = network.pruning_head["classifier"](behind)[0]
    assert (ours - (keep[:, 1] - keep[:, 0])).abs().max() > 0.1


def test_rotary_bases_under_their_old_names(folder):
    pruner = ContextPruner.from_pretrained(folder("open_provence"), device="cpu")
    ropes = pruner.scorer.checkpoint.model.ranking_model.config.rope_parameters
    assert ropes["full_attention"]["rope_theta"] == 80000
    assert ropes["sliding_attention"]["rope_theta"] == 5000


def test_the_checkpoints_own_default_threshold(folder):
    pruner = ContextPruner.from_pretrained(folder("open_provence"), device="cpu")
    assert pruner.prune(QUESTION, PASSAGES).budget.threshold == 0.25
    assert pruner.prune(QUESTION, PASSAGES, threshold=0.4).budget.threshold == 0.4
    other = ContextPruner.from_pretrained(folder("provence"), device="cpu")
    assert other.prune(QUESTION, PASSAGES).budget.threshold == 0.1


@cache
def lingua_chances(where, text):
    """Token strings and keep probabilities of each chunk."""
    config, tensors, tokenizer = opened(where)
    prefix = {"bert": "bert.", "xlm-roberta": "roberta."}[config["model_type"]]
    encoder = encoder_of(
        config["model_type"], fields_of(config), tensors, prefix, add_pooling_layer=False
    )
    ids = plain(tokenizer, text)
    names = tokenizer.convert_ids_to_tokens(ids)
    ranges, start = [], 0
    while start < len(names):
        end = start + 510
        if end > len(names) - 1:
            ranges.append((start, len(names)))
            break
        for back in range(end - start):
            if names[end - back] in {".", "\n"}:
                end -= back
                break
        ranges.append((start, end + 1))
        start = end + 1
    out = []
    for low, high in ranges:
        row = [tokenizer.cls_token_id, *ids[low:high], tokenizer.sep_token_id][:512]
        with torch.no_grad():
            states = encoder(torch.tensor([row])).last_hidden_state[0]
            logits = linear(states, tensors["classifier.weight"], tensors["classifier.bias"])
        out.append((names[low:high], logits.softmax(-1)[1 : 1 + high - low, 1].tolist()))
    return out


def lingua_reference(where, text, drop, force=(), digits=False, consecutive=False, count=len):
    """LLMLingua-2's words and their labels, chunk by chunk, dropping the share `drop`."""
    config, _, tokenizer = opened(where)
    roberta = config["model_type"] == "xlm-roberta"
    out = []
    for names, chances in lingua_chances(where, text):
        words, values = [], []
        for name, chance in zip(names, chances, strict=True):
            if name in tokenizer.all_special_tokens:
                continue
            pure = name.lstrip("▁") if roberta else name.lstrip("#")
            if roberta:
                begins = name in string.punctuation or name in force or name.startswith("▁")
            else:
                begins = pure in force or not name.startswith("##")
            if begins:
                words.append(name)
                chance = 1.0 if pure in force else chance
                values.append([])
            else:
                words[-1] += pure
            values[-1].append(1.0 if digits and re.search(r"\d", name) else chance)
        means = [sum(v) / len(v) for v in values]
        if consecutive:
            level, between, last = np.percentile(means, int(100 * drop)), False, None
            for i, (word, mean) in enumerate(zip(words, means, strict=True)):
                if word in force:
                    if between:
                        between = False
                    elif word == last:
                        means[i] = 0.0
                    last = word
                else:
                    between |= mean > level
        spread = [mean for word, mean in zip(words, means, strict=True) for _ in range(count(word))]
        level = np.percentile(spread, int(100 * drop + 1))
        kept = []
        for word, mean in zip(words, means, strict=True):
            keep = mean > level or (level == 1.0 and mean == level)
            if keep and consecutive and word in force and kept and kept[-1] == word:
                keep = False
            if keep:
                kept.append(word)
            out.append((word.lstrip("▁") if roberta else word, bool(keep)))
    return out


SHARES = [0.005, 0.07, 0.1, 1 - 0.9, 0.29, 0.3, 1 - 0.7, 0.5, 0.57, 0.58, 0.663, 0.9, 0.985]


@pytest.mark.parametrize("encoder", ["bert", "xlm-roberta"])
class TestLLMLingua2:
    def words(self, result, threshold):
        words = [s.text.strip() for s in in_order(result.passages[0])]
        return list(zip(words, decided(result, threshold), strict=True))

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({}, {}),
            ({"force_reserve_digit": True}, {"digits": True}),
            ({"force_tokens": [".", ",", "radium"]}, {"force": [".", ",", "radium"]}),
        ],
        ids=["plain", "digits", "force tokens"],
    )
    def test_every_word_at_every_rate(self, folder, encoder, ours, theirs):
        def count(word):
            return 1 + len(word) // 3

        where = folder("llmlingua2", encoder=encoder)
        pruner = ContextPruner.from_pretrained(
            where, method="llmlingua2", device="cpu", count_tokens=count, **ours
        )
        texts = ["Curie found radium in 1898, in Warsaw (rare). It is 2.5 found", long_text(5, 90)]
        for text in texts:
            result = pruner.prune("anything", [text])
            for share in SHARES:
                labels = lingua_reference(where, text, share, count=count, **theirs)
                assert [(word.lower(), keep) for word, keep in self.words(result, share)] == [
                    (word.lower(), keep) for word, keep in labels
                ]

    def test_consecutive_force_tokens(self, folder, encoder):
        where = folder("llmlingua2", encoder=encoder)
        marks = ["▁.", "."] if encoder == "xlm-roberta" else ["."]
        pruner = ContextPruner.from_pretrained(
            where,
            method="llmlingua2",
            device="cpu",
            force_tokens=marks,
            drop_consecutive=True,
            count_tokens=lambda _: 1,
        )
        text = "Curie found it . . . Radium is rare . the cat . . 1898 . . ."
        result = pruner.prune("anything", [text])
        options = {"force": marks, "consecutive": True, "count": lambda _: 1}
        at = {s: lingua_reference(where, text, s, **options) for s in np.arange(0.005, 1, 0.01)}
        stays = [True] * len(next(iter(at.values())))
        for share, labels in at.items():  # the owners' rule may take a word back; ours does not
            stays = [stay and keep for stay, (_, keep) in zip(stays, labels, strict=True)]
            assert [keep for _, keep in self.words(result, share)] == stays
        assert not all(keep for word, keep in at[min(at)] if word == ".")

    def test_the_question_changes_nothing(self, folder, encoder):
        where = folder("llmlingua2", encoder=encoder)
        pruner = ContextPruner.from_pretrained(where, method="llmlingua2", device="cpu")
        first, second = (pruner.prune(q, TEXTS).to_dict() for q in ("radium?", "cats?"))
        assert first["passages"] == second["passages"]

    def test_a_line_end_may_be_forced(self, folder, encoder):
        where = folder("llmlingua2", encoder=encoder)
        pruner = ContextPruner.from_pretrained(
            where, method="llmlingua2", device="cpu", force_tokens=["\n", "found in"]
        )
        text = "The cat sat \n\n on the mat.\nCurie found in Warsaw what is rare"
        [found] = pruner.prune("?", [text], threshold=0.9).passages
        assert found.text.count("\n") == 3
        assert " found in" in found.text

    def test_keep_ratio_is_a_share_of_the_characters(self, folder, encoder):
        where = folder("llmlingua2", encoder=encoder)
        pruner = ContextPruner.from_pretrained(where, method="llmlingua2", device="cpu")
        text = long_text(7, 60)
        result = pruner.prune("?", [text], keep_ratio=0.5)
        assert 0.45 < len(result.passages[0].text) / len(text) <= 0.5
        assert result.recut(threshold=0).passages[0].text == text


@pytest.mark.parametrize("family", releases.FAMILIES)
class TestEveryFamily:
    @pytest.fixture
    def copy(self, family, tmp_path):
        return releases.build(family, tmp_path / "release")

    def pruner(self, where, family):
        method = family if family == "llmlingua2" else None
        return ContextPruner.from_pretrained(where, method=method, device="cpu")

    def test_it_is_known_by_its_config_and_no_remote_code_runs(self, family, copy):
        file = copy / "tokenizer_config.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": [None, "modeling_provence.X"]}
        file.write_text(json.dumps(tokenizer))
        assert self.pruner(copy, family).scorer.name == family
        assert self.pruner(copy, family).prune(QUESTION, PASSAGES).passages

    def test_missing_unknown_and_misshapen_tensors_are_named(self, family, copy):
        file = copy / "model.safetensors"
        tensors = load_file(file)
        names = [name for name in tensors if name.endswith("classifier.weight")]
        tensors["surprise.weight"] = torch.zeros(2)
        tensors[names[0]] = torch.zeros(3, 3)
        gone = next(name for name in tensors if name.endswith("embeddings.weight"))
        del tensors[gone]
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="are not those of a known release") as error:
            self.pruner(copy, family)
        assert "1 missing: " in str(error.value)
        assert gone.split(".", 1)[1] in str(error.value)
        assert "surprise.weight" in str(error.value)
        assert "has the shape (3, 3) and not (" in str(error.value)

    def test_stored_counters_are_no_weights(self, family, copy):
        file = copy / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"roberta.embeddings.position_ids": torch.arange(9)[None]}, file)
        assert self.pruner(copy, family).prune(QUESTION, PASSAGES).passages

    def test_half_precision_is_read_as_single(self, family, copy):
        file = copy / "model.safetensors"
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
        model = self.pruner(copy, family).scorer.checkpoint.model
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_only_safetensors(self, family, copy):
        (copy / "model.safetensors").unlink()
        (copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin, which can run"):
            self.pruner(copy, family)

    def test_a_damaged_weights_file(self, family, copy):
        (copy / "model.safetensors").write_bytes(b"\0" * 40)
        with pytest.raises(CheckpointError, match=r"The weights in .* cannot be read"):
            self.pruner(copy, family)

    def test_no_tokenizer(self, family, copy):
        (copy / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json\. Save the tokenizer"):
            self.pruner(copy, family)

    def test_another_method_is_refused(self, family, copy):
        named = copy.rename(copy.parent / "llmlingua-2")  # which says what it is; others ignore it
        with pytest.raises(InputError, match=rf"is of '{family}', so method='late' cannot"):
            ContextPruner.from_pretrained(named, method="late")

    def test_a_separator_in_a_passage_is_text(self, family, copy):
        pruner = self.pruner(copy, family)
        tokenizer = pruner.scorer.checkpoint.tokenizer
        special, rows = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, []
        run = pruner.scorer.run
        pruner.scorer.run = lambda forward, given: run(forward, rows.extend(given) or given)
        for mark in ("", "[SEP]", "</s>", "[CLS]", "<s>"):
            pruner.prune(f"Who {mark}?", [f"The cat {mark} sat."])
        assert len({sum(i in special for i in row) for row in rows}) == 1

    def test_empty_and_blank_passages(self, family, copy):
        result = self.pruner(copy, family).prune(QUESTION, ["", " \n", "Radium."])
        assert [p.relevance for p in result.passages[:2]] == [0, 0]
        assert result.passages[2].rank == 0

    def test_a_very_long_question(self, family, copy):
        pruner = self.pruner(copy, family)
        if family == "llmlingua2":
            pruner.prune("who found it " * 300, ["Radium."])
        else:
            with pytest.warns(UserWarning, match=r"The question has \d+ tokens"):
                assert pruner.prune("who found it " * 300, ["Radium. " * 90]).passages


def test_a_token_classifier_of_no_known_kind(tmp_path):
    where = releases.llmlingua2(tmp_path / "pruner")
    with pytest.raises(CheckpointError, match="loads with method='llmlingua2'"):
        ContextPruner.from_pretrained(where)


def test_llmlingua2_is_known_by_its_name(tmp_path):
    where = releases.llmlingua2(tmp_path / "llmlingua-2-bert-base-multilingual-cased-meetingbank")
    assert ContextPruner.from_pretrained(where, device="cpu").scorer.name == "llmlingua2"


def test_our_own_checkpoint_is_of_no_released_family(tiny_checkpoint):
    for method in releases.FAMILIES:
        with pytest.raises(InputError, match="is none of a released family, so method="):
            ContextPruner.from_pretrained(tiny_checkpoint, method=method)
    assert {m.name for m in METHODS if m.family == "released"} == set(releases.FAMILIES)


def test_zilliz_is_open_provence_by_its_architecture(tmp_path):
    where = releases.open_provence(tmp_path, encoder="xlm-roberta")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"model_type": "semantic_highlight"}))
    assert ContextPruner.from_pretrained(where, device="cpu").scorer.name == "open_provence"


def test_a_config_without_what_is_needed(tmp_path):
    where = releases.open_provence(tmp_path)
    config = json.loads((where / "config.json").read_text())
    del config["base_model_config"]
    (where / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not describe .* KeyError\('base_model_conf"):
        ContextPruner.from_pretrained(where)
