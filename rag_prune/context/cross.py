"""`cross`, Provence's engine: question and passage are read together, one pass for both jobs.

Paper: Provence: efficient and robust context pruning for retrieval-augmented generation (2025),
    arXiv:2501.16214, §3: a cross-encoder with a token-level keep head and a relevance head.
Differs from the paper: a sentence's score is the sigmoid of its mean token logit (the paper counts
    the tokens above the threshold, so its threshold means two things and a result cannot be cut
    again); long passages are read in overlapping windows; special-token strings in a passage are
    plain text; character offsets into the caller's string come back instead of decoded tokens.
Cost: one pass a window of each passage, for every question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from rag_prune.context.engine import Engine, Frame, Logits, fit_question
from rag_prune.context.model import KEEP, RELEVANCE, joint_ids
from rag_prune.context.result import Request
from rag_prune.context.windows import Tokens, encode_plain, sentence_means, tokenise


class Cross(Engine):
    """Joint reading."""

    name = "provence"

    def logits(self, requests: Sequence[Request]) -> Logits:
        return self.begin(requests)()

    def begin(self, requests: Sequence[Request]) -> Callable[[], Logits]:
        tokenizer = self.checkpoint.tokenizer
        passages = [p for request in requests for p in request.passages]
        tokens = tokenise(tokenizer, [p.text for p in passages], [p.spans for p in passages])
        frames = [partial(joint_ids, tokenizer, *head) for head in self._heads(requests)]
        return partial(self._read, requests, tokens, frames)

    def _read(
        self, requests: Sequence[Request], tokens: Sequence[Tokens], frames: Sequence[Frame]
    ) -> Logits:
        passages = [p for request in requests for p in request.passages]
        keep = [np.empty(len(t.ids)) for t in tokens]
        relevance = [-np.inf] * len(passages)
        read = self.run_windows(self.checkpoint.model.joint, tokens, frames)
        for i, (low, high), logits, first in read:
            keep[i][low:high] = logits[:, KEEP]
            relevance[i] = max(relevance[i], float(first[RELEVANCE]))
        scored = iter(
            (sentence_means(keep[i], tokens[i].sentence, len(p.spans)), relevance[i])
            for i, p in enumerate(passages)
        )
        return [[next(scored) for _ in request.passages] for request in requests]

    def _heads(self, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
        """Token ids of question and title for every passage, long ones cut to their share."""
        tokenizer, window = self.checkpoint.tokenizer, self.checkpoint.settings.window
        questions = encode_plain(tokenizer, [r.question for r in requests])["input_ids"]
        titles = iter(
            encode_plain(tokenizer, [p.title or "" for r in requests for p in r.passages])[
                "input_ids"
            ]
        )
        return [
            (question, next(titles)[: window // 8])
            for request, ids in zip(requests, questions, strict=True)
            for question in [fit_question(ids, window // 2)]
            for _ in request.passages
        ]
