"""What tests build in code where a real model would be slow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUESTION = "Who found radium?"
PASSAGES = [
    "The cat sat on the mat. It slept.",
    {"title": "Curie", "text": "Marie was born in Warsaw. Curie found radium in 1898.", "id": 7},
    "Paris is a city. Curie lived there. It is old.",
]

# The toy task: where is the thing?
NOUNS, PLACES, OTHERS = (
    text.split()
    for text in (
        "cat dog bird tree house lake boat train king queen apple river stone glass paper horse "
        "cloud table chair piano",
        "paris rome berlin madrid oslo lima cairo delhi",
        "where is the a now it was in long ago today not one of them saw",
    )
)
WORDS = [*NOUNS, *PLACES, *OTHERS]

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(words: Iterable[str]) -> Any:
    """A BERT tokenizer whose vocabulary is the special tokens and `words`, in this order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIALS, *words]))}
    backend = Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    backend.normalizer = normalizers.BertNormalizer(strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    named = {f"{token[1:-1].lower()}_token": token for token in SPECIALS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def toy_tokenizer() -> Any:
    """Words of the toy task, one token each."""
    return wordpiece([*WORDS, *".?"])


WORDPIECE = ("bert", "modernbert")  # the other families spell their special tokens as RoBERTa does


def toy_unigram() -> Any:
    """Words of the toy task as sentencepiece has them, "▁cat", with <s> and </s> around."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    pieces = [*(f"▁{word}" for word in WORDS), *(f"▁{word.capitalize()}" for word in WORDS)]
    vocabulary = [(piece, 0.0) for piece in specials.values()]
    vocabulary += [(piece, -5.0) for piece in dict.fromkeys([*pieces, ".", "?", "▁"])]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    named = {f"{name}_token": token for name, token in specials.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **named
    )


def toy_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The sentence that shares a noun with the question, and says "today", is the evidence.

    Two rows in five have none; theirs are the only passages that may be negatives.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        asked, title, *others = rng.choice(NOUNS, size=5, replace=False).tolist()
        sentences = [f"The {noun} was in {rng.choice(PLACES)} long ago. " for noun in others]
        evidence = []
        if i % 5 > 1:
            at = int(rng.integers(3))
            sentences[at] = f"The {asked} is in {rng.choice(PLACES)} today. "
            start = sum(map(len, sentences[:at]))
            evidence = [[start, start + len(sentences[at])]]
        rows.append(
            {
                "question": f"Where is the {asked}?",
                "title": f"{title} {i}",
                "passage": "".join(sentences),
                "evidence": evidence,
                "answers": ["today"],
            }
        )
    return rows


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def toy_encoder(folder: Path, family: str = "bert") -> str:
    """Save a small random encoder of a family, with a tokenizer of the toy task; its folder.

    Each family has its own special tokens, its own place for padding and its own positions.
    """
    import torch
    from transformers import (
        AutoModel,
        BertConfig,
        DebertaV2Config,
        ModernBertConfig,
        RobertaConfig,
        XLMRobertaConfig,
    )

    tokenizer = toy_tokenizer() if family in WORDPIECE else toy_unigram()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {
        "bert": lambda: BertConfig(**sizes, max_position_embeddings=160),
        # As released: no token types, and positions that begin after the padding's number.
        "roberta": lambda: RobertaConfig(**sizes, max_position_embeddings=162, type_vocab_size=1),
        "xlm-roberta": lambda: XLMRobertaConfig(
            **sizes, max_position_embeddings=162, type_vocab_size=1
        ),
        "modernbert": lambda: ModernBertConfig(
            **sizes,
            max_position_embeddings=160,
            global_attn_every_n_layers=2,
            local_attention=32,
            bos_token_id=tokenizer.cls_token_id,
            cls_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            sep_token_id=tokenizer.sep_token_id,
        ),
        "deberta-v2": lambda: DebertaV2Config(
            **sizes,
            max_position_embeddings=160,
            relative_attention=True,
            position_buckets=32,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
    }[family]()
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def toy_language_model(folder: Path) -> Path:
    """Save a small random Llama of three layers with the toy task's words; its folder."""
    from kv_oracle import tiny_llama

    tokenizer = toy_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
