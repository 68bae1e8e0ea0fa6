"""What the engines share: logits become scores, rows run in batches of about one length."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from rag_prune.context.checkpoints import Checkpoint
from rag_prune.context.model import pad
from rag_prune.context.result import Request, Scores
from rag_prune.context.windows import Tokens, batches, windows

# Padded tokens of a batch, and how many of them may be padding. Where a batch is nearly free, as on
# a CPU, padding costs more than another batch; a GPU wants much work at once.
BATCH_LIMITS = {"cpu": (2048, 64), "cuda": (65_536, 8192)}

Floats = NDArray[np.float64]
Logits = list[list[tuple[Floats, float]]]
Frame = Callable[[list[int]], list[int]]  # a window's tokens → the row that is read


class Engine(ABC):
    """A checkpoint, used in one of the ways it was trained for."""

    name: ClassVar[str]

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @abstractmethod
    def logits(self, requests: Sequence[Request]) -> Logits:
        """For each passage of each request its keep logits (n_sentences,) and its relevance logit.

        −inf stands for what holds no token: white space, control characters, nothing.
        """

    def begin(self, requests: Sequence[Request]) -> Callable[[], Logits]:
        """Do what `logits` does before the network is needed; what is returned does the rest.

        It may be called in another thread, while the network still reads the requests before.
        """
        return partial(self.logits, requests)

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request its passages' scores, in order; no request sways another."""
        return self.begin_score(requests)()

    def begin_score(self, requests: Sequence[Request]) -> Callable[[], list[list[Scores]]]:
        """`score` in two steps, as `begin` is to `logits`."""
        logits, calibration = self.begin(requests), self.checkpoint.settings.calibration[self.name]
        return lambda: [
            [Scores(float(expit(relevance)), calibration(keep)) for keep, relevance in passages]
            for passages in logits()
        ]

    def run(
        self, forward: Callable[[Tensor, Tensor], Tensor], rows: Sequence[list[int]]
    ) -> Iterator[tuple[int, Floats]]:
        """Run rows of token ids through `forward`; yields (row number, its output (tokens, d)).

        Equal rows are run once: rounding differs a little from batch to batch, and what is equal
        must tie exactly for a result to be the same alone and in a batch.
        """
        equal: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            equal[tuple(row)].append(i)
        distinct = list(equal.values())
        device = next(self.checkpoint.model.parameters()).device
        multiply_in = self.checkpoint.multiply_in
        with (
            torch.inference_mode(),
            torch.autocast(device.type, multiply_in, enabled=multiply_in != torch.float32),
        ):
            limits = BATCH_LIMITS.get(device.type, BATCH_LIMITS["cuda"])
            for batch in batches([len(rows[same[0]]) for same in distinct], *limits):
                ids, mask = pad(
                    [rows[distinct[j][0]] for j in batch], self.checkpoint.tokenizer.pad_token_id
                )
                out = forward(ids.to(device), mask.to(device)).cpu().double().numpy()
                for j, values in zip(batch, out, strict=True):
                    for i in distinct[j]:
                        yield i, values[: len(rows[i])]

    def run_windows(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        tokens: Sequence[Tokens],
        frames: Sequence[Frame],
    ) -> Iterator[tuple[int, tuple[int, int], Floats, Floats]]:
        """Run every passage in windows, each put into a row by the passage's frame.

        A frame takes a window's token ids and puts what belongs around them; the passage's tokens
        must end one [SEP] before the row does. Yields (passage number, the token range (low, high)
        scored here, the output of those tokens, the output of the row's first token).
        """
        rows, places = [], []
        for i, (passage, frame) in enumerate(zip(tokens, frames, strict=True)):
            room = self.checkpoint.settings.window - len(frame([]))
            for window in windows(passage, room) if len(passage.ids) else ():
                rows.append(frame(passage.ids[window.start : window.end].tolist()))
                places.append((i, window))
        for row, values in self.run(forward, rows):
            i, window = places[row]
            shift = len(values) - 1 - window.end
            low, high = window.own
            yield i, window.own, values[low + shift : high + shift], values[0]


def fit_question(ids: list[int], room: int) -> list[int]:
    """A question of more than `room` tokens keeps its head and its tail, and says so."""
    if len(ids) <= room:
        return ids
    warnings.warn(
        f"The question has {len(ids)} tokens; {room} of them are read, from its beginning and its "
        "end. Ask a shorter question for better pruning.",
        stacklevel=2,
    )
    return [*ids[: room // 2], *ids[len(ids) - (room - room // 2) :]]
