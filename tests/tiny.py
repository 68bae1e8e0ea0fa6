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
