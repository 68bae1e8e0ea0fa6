"""Give an engine's logits a meaning: threshold 0.1 keeps the stated share of evidence sentences.

One number is fixed by that, the other (how steep the probabilities are) by maximum likelihood on
held-back tasks. So the default threshold means the same for every engine and every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from prune_core.errors import InputError
from rag_prune.context.checkpoints import Calibration
from rag_prune.context.engine import Engine
from rag_prune.context.evaluate import Task, least_kept
from rag_prune.context.pruner import DEFAULT_THRESHOLD
from rag_prune.context.result import Request
from rag_prune.context.sentences import touched


def calibrate(engine: Engine, tasks: Sequence[Task], recall: float = 0.95) -> Calibration:
    """Fit on tasks; at DEFAULT_THRESHOLD at least `recall` of their evidence sentences are kept.

    Raises InputError when the tasks have no evidence sentence.
    """
    requests = [Request.read(t.question, t.passages) for t in tasks]
    logits, labels = [], []
    for task, request, scored in zip(tasks, requests, engine.logits(requests), strict=True):
        for i, (passage, (keep, _)) in enumerate(zip(request.passages, scored, strict=True)):
            logits.append(keep)
            labels.append(touched(passage.spans, task.evidence if i == task.gold else ()))
    x = np.concatenate([np.zeros(0), *logits])
    y = np.concatenate([np.zeros(0, dtype=bool), *labels]).astype(bool)
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    if not y.any():
        raise InputError(
            "The tasks to calibrate on have no evidence sentence: give rows with some."
        )
    at = least_kept(x[y], recall)
    anchor = np.log(DEFAULT_THRESHOLD / (1 - DEFAULT_THRESHOLD))

    def loss(log_scale: float) -> float:
        z = np.exp(log_scale) * (x - at) + anchor
        return float(np.mean(np.logaddexp(0, z) - y * z))

    scale = float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))
    # A hair below the anchor, so that rounding cannot drop the sentence that sets it.
    return Calibration(scale, float(anchor - scale * at + 1e-6))
