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

from collections.abc import Sequence

import numpy as np

from rag_prune.context.engine import Engine, Floats, fit_question
from rag_prune.context.model import KEEP, RELEVANCE, joint_ids
from rag_prune.context.result import Request
from rag_prune.context.windows import encode_plain, sentence_means, tokenise, windows


class Cross(Engine):
    """Joint reading."""

    name = "provence"

    def logits(self, requests: Sequence[Request]) -> list[list[tuple[Floats, float]]]:
        tokenizer, settings = self.checkpoint.tokenizer, self.checkpoint.settings
        passages = [p for request in requests for p in request.passages]
        tokens = tokenise(tokenizer, [p.text for p in passages], [p.spans for p in passages])
        rows, places = [], []
        for i, (question, title) in enumerate(self._heads(requests)):
            # [CLS] question [SEP] title [SEP] window [SEP]
            room = settings.window - len(question) - len(title) - (4 if title else 3)
            for window in windows(tokens[i], room) if len(tokens[i].ids) else ():
                part = tokens[i].ids[window.start : window.end].tolist()
                rows.append(joint_ids(tokenizer, question, title, part))
                places.append((i, window))
        keep = [np.empty(len(t.ids)) for t in tokens]
        relevance = [-np.inf] * len(passages)
        for row, values in self.run(self.checkpoint.model.joint, rows):
            i, window = places[row]
            # The window's tokens end one [SEP] before the row does.
            shift = len(values) - 1 - window.end
            low, high = window.own
            keep[i][low:high] = values[low + shift : high + shift, KEEP]
            relevance[i] = max(relevance[i], float(values[0, RELEVANCE]))
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
