"""`both`: a mean of the two engines' logits; they err differently, so together they err less.

Cost: that of `cross`, and that of `late` for passages not yet indexed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rag_prune.context.checkpoints import Checkpoint
from rag_prune.context.cross import Cross
from rag_prune.context.engine import Engine, Logits
from rag_prune.context.late import Late
from rag_prune.context.result import Request

# Joint reading errs less, so it weighs more; chosen on held-back rows (docs/context-training.md).
JOINT = 0.7


class Both(Engine):
    """Joint reading and vectors, averaged."""

    name = "both"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.cross, self.late = Cross(checkpoint), Late(checkpoint)

    def logits(self, requests: Sequence[Request]) -> Logits:
        return self.begin(requests)()

    def begin(self, requests: Sequence[Request]) -> Callable[[], Logits]:
        cross, late = self.cross.begin(requests), self.late.begin(requests)
        return lambda: [
            [
                (JOINT * ck + (1 - JOINT) * lk, JOINT * cr + (1 - JOINT) * lr)
                for (ck, cr), (lk, lr) in zip(joint, apart, strict=True)
            ]
            for joint, apart in zip(cross(), late(), strict=True)
        ]
