"""Provence as released (naver/provence-reranker-debertav3-v1): DeBERTa-v3 with two heads.

Paper: Provence: efficient and robust context pruning for retrieval-augmented generation (2025),
    arXiv:2501.16214; the owners' code in naver/bergen, scripts/provence.
Keeps: a sentence of which more than the share T of tokens has a keep probability above the same T.
    One number a sentence says this for every T: as T rises the share never does, so the sentence
    goes at T* = max over k of min(its k-th largest probability, k / its tokens).
Differs from the release: offsets into the caller's string, and not decoded tokens; passages beyond
    the window are read in overlapping windows, and not in blocks; our sentence ends, and not
    Punkt's; "[SEP]" in a passage is text; a question of more than half a window keeps both ends.
Cost: one pass a window of each passage, for every question.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from transformers import DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import ContextPooler

from rag_prune.context.engine import Floats, fit_question
from rag_prune.context.model import joint_ids
from rag_prune.context.released.base import (
    ReleasedEngine,
    columns,
    positions,
    probabilities,
    strictly,
    sub_config,
    tokenise_apart,
)
from rag_prune.context.result import Passage, Request, Scores
from rag_prune.context.windows import encode_plain

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ProvenceNetwork(nn.Module):
    """DeBERTa-v2 with a pooled ranking head and a linear keep head on its last states."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.deberta: nn.Module = DebertaV2Model(config)  # type: ignore[no-untyped-call]
        self.pooler: Any = ContextPooler(config)  # type: ignore[no-untyped-call]
        self.classifier = nn.Linear(self.pooler.output_dim, config.num_labels)
        self.token_classifier = nn.Linear(config.hidden_size, 2)

    def joint(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.deberta(input_ids=ids, attention_mask=mask).last_hidden_state
        return columns(self.token_classifier(states), self.classifier(self.pooler(states))[:, 0])


class Provence(ReleasedEngine):
    """Sentences by the share of their tokens above the threshold, passages by the ranking head."""

    name = "provence_debertav3"

    @classmethod
    def build(cls, config: dict[str, Any], names: Iterable[str]) -> tuple[nn.Module, int]:
        stock = sub_config("deberta-v2", config)
        return ProvenceNetwork(stock), positions(stock)

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request its passages' scores, in order; no request sways another."""
        tokenizer, window = self.checkpoint.tokenizer, self.checkpoint.settings.window
        passages = [p for request in requests for p in request.passages]
        questions = encode_plain(tokenizer, [normalised(r.question) for r in requests])["input_ids"]
        titles = encode_plain(tokenizer, [(p.title or "").strip() for p in passages])["input_ids"]
        tokens = tokenise_apart(tokenizer, [_sentences(p) for p in passages])
        fitted = [fit_question(ids, window // 2) for ids in questions]
        asked = [q for q, r in zip(fitted, requests, strict=True) for _ in r.passages]
        frames = [
            partial(self._row, question, title[: window // 8])
            for question, title in zip(asked, titles, strict=True)
        ]
        keep, ranking = self.read(tokens, frames)
        scored = iter(
            Scores(
                float(expit(ranking[i])),
                share_scores(probabilities(keep[i]), tokens[i].sentence, n),
            )
            for i, n in enumerate(len(p.spans) for p in passages)
        )
        return [[next(scored) for _ in request.passages] for request in requests]

    def _row(self, question: list[int], title: list[int], passage: list[int]) -> list[int]:
        """[CLS] question [SEP] title passage [SEP]: a title is a sentence in front."""
        return joint_ids(self.checkpoint.tokenizer, question, [], [*title, *passage])


def normalised(question: str) -> str:
    """A question as Provence reads it: lower case, no ASCII punctuation, single spaces."""
    return " ".join(question.lower().translate(_NO_PUNCTUATION).split())


def share_scores(keep: NDArray[Any], sentence: NDArray[np.int64], n_sentences: int) -> Floats:
    """(n_sentences,) scores s: the share of a sentence's tokens above T exceeds T when s >= T."""
    out = np.zeros(n_sentences)
    for i in range(n_sentences):
        falling = np.sort(keep[sentence == i])[::-1]
        shares = np.arange(1, len(falling) + 1) / max(len(falling), 1)
        out[i] = strictly(float(np.minimum(falling, shares).max(initial=0.0)))
    return out


def _sentences(passage: Passage) -> list[str]:
    texts = [passage.text[start:end].strip() for start, end in passage.spans]
    return [f" {text}" if i and text else text for i, text in enumerate(texts)]
