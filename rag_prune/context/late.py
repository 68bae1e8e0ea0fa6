"""`late`: passages are encoded once, without a question; a question then costs one short pass.

A passage becomes one vector a sentence (the mean of its token states) and one for the whole. A
sentence's logit is a·cos(question, sentence) + b·cos(question, passage) + c, with a, b, c trained;
the passage's relevance is the same sum over its best sentence with numbers of its own.

Source: ours; late interaction as in ColBERT (2020, arXiv:2004.12832), with sentences for tokens.
Cost: at index time one pass a window of each passage; for a question one pass and dot products.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from prune_core.errors import InputError
from prune_core.storage import StrPath, atomic_write
from rag_prune.context.checkpoints import Checkpoint
from rag_prune.context.engine import Engine, Floats, Logits, fit_question
from rag_prune.context.model import KEEP, RELEVANCE, alone_ids
from rag_prune.context.result import Passage, PassageLike, Request
from rag_prune.context.sentences import SPLITTER
from rag_prune.context.windows import encode_plain, tokenise

RECENT_BYTES = 256 * 2**20  # of passages that came with a question; a server meets ever new ones


@dataclass(frozen=True, eq=False)
class Vectors:
    """Unit vectors: sentences (n, hidden), whole (hidden,); zero where there was no token."""

    sentences: Floats
    whole: Floats

    @property
    def nbytes(self) -> int:
        return self.sentences.nbytes + self.whole.nbytes


class Late(Engine):
    """Scores requests from vectors of their passages.

    Vectors of passages given to `index` are kept for good, those of other passages until
    `RECENT_BYTES` of later ones have come. They are found again by a hash of text, title, weights
    and splitter, so they are never stale.
    """

    name = "late"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._indexed: dict[str, Vectors] = {}
        self._recent: dict[str, Vectors] = {}  # the one used last comes last
        self._recent_lock = threading.Lock()

    def logits(self, requests: Sequence[Request]) -> Logits:
        passages = [p for request in requests for p in request.passages]
        keys = [self._key(p) for p in passages]
        known = self._read(dict(zip(keys, passages, strict=True)))
        self._remember(known)
        vectors = iter([known[key] for key in keys])
        weights = self.checkpoint.model.late.detach().double().cpu().numpy()
        out = []
        for question, request in zip(self._questions(requests), requests, strict=True):
            scored = []
            for _ in request.passages:
                v = next(vectors)
                read = v.sentences.any(axis=1)
                near, whole = v.sentences @ question, float(v.whole @ question)
                keep = weights[KEEP] @ [near, np.full(len(near), whole), np.ones(len(near))]
                relevance = -np.inf
                if read.any():
                    relevance = float(weights[RELEVANCE] @ [near[read].max(), whole, 1.0])
                scored.append((np.where(read, keep, -np.inf), relevance))
            out.append(scored)
        return out

    def index(self, passages: Sequence[PassageLike]) -> None:
        """Encode passages ahead of the questions, which then cost one short pass each."""
        read = [Passage.read(p, i) for i, p in enumerate(passages)]
        self._indexed |= self._read({self._key(p): p for p in read})

    def _read(self, passages: Mapping[str, Passage]) -> dict[str, Vectors]:
        """Vectors of passages, by key; those not known are encoded."""
        known = {key: self._indexed.get(key) or self._recent.get(key) for key in passages}
        fresh = [key for key, vectors in known.items() if vectors is None]
        encoded = zip(fresh, self._encode([passages[key] for key in fresh]), strict=True)
        return {key: vectors for key, vectors in known.items() if vectors} | dict(encoded)

    def _remember(self, read: Mapping[str, Vectors]) -> None:
        with self._recent_lock:
            for key, vectors in read.items():
                self._recent.pop(key, None)
                if key not in self._indexed:
                    self._recent[key] = vectors
            excess = sum(v.nbytes for v in self._recent.values()) - RECENT_BYTES
            while excess > 0:
                excess -= self._recent.pop(next(iter(self._recent))).nbytes

    def save_index(self, file: StrPath) -> None:
        """Write the indexed vectors, in half precision, as one safetensors file, or none of it."""
        tensors = {
            key: np.vstack([v.sentences, v.whole]).astype(np.float16)
            for key, v in self._indexed.items()
        }
        with atomic_write(file, "wb") as out:
            out.write(save(tensors, {"model": self.checkpoint.fingerprint, "splitter": SPLITTER}))

    def load_index(self, file: StrPath) -> None:
        """Read vectors written by `save_index`; those of another model simply do not match.

        Raises InputError for a file that is absent or is no such index.
        """
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"Cannot read the vector index '{file}': {error}. Make one with save_index."
            ) from error
        for key, stacked in stored.items():
            unit = _unit(stacked.astype(np.float64))
            self._indexed[key] = Vectors(unit[:-1], unit[-1])

    def _key(self, passage: Passage) -> str:
        parts = (self.checkpoint.fingerprint, SPLITTER, passage.title or "", passage.text)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def _questions(self, requests: Sequence[Request]) -> Floats:
        """(n_requests, hidden) unit vectors."""
        tokenizer, window = self.checkpoint.tokenizer, self.checkpoint.settings.window
        ids = encode_plain(tokenizer, [r.question for r in requests])["input_ids"]
        rows = [alone_ids(tokenizer, [], fit_question(q, window - 2)) for q in ids]
        out = np.zeros((len(rows), self.checkpoint.model.classifier.config.hidden_size))
        for row, states in self.run(self.checkpoint.model.states, rows):
            out[row] = states[1:-1].sum(0)
        return _unit(out)

    def _encode(self, passages: Sequence[Passage]) -> list[Vectors]:
        tokenizer, settings = self.checkpoint.tokenizer, self.checkpoint.settings
        tokens = tokenise(tokenizer, [p.text for p in passages], [p.spans for p in passages])
        titles = encode_plain(tokenizer, [p.title or "" for p in passages])["input_ids"]
        frames = [partial(alone_ids, tokenizer, title[: settings.window // 8]) for title in titles]
        hidden = self.checkpoint.model.classifier.config.hidden_size
        sums = [np.zeros((len(p.spans), hidden)) for p in passages]
        read = self.run_windows(self.checkpoint.model.states, tokens, frames)
        for i, (low, high), states, _ in read:
            sentence = tokens[i].sentence[low:high]
            first = np.flatnonzero(np.diff(sentence, prepend=-1))
            sums[i][sentence[first]] += np.add.reduceat(states, first)
        return [Vectors(_unit(s), _unit(s.sum(0))) for s in sums]


def _unit(vectors: Floats) -> Floats:
    """Vectors scaled to length 1; zero stays zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = np.zeros_like(vectors)
    np.divide(vectors, norm, out=unit, where=norm > 0)
    return unit
