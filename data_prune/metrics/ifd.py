"""Instruction-following difficulty: how little the prompt helps to foretell its response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prune.asked import asked
from data_prune.metric import Array, Columns, Given, Metric, Ranking
from prune_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class IFD(Metric):
    """Keep rows whose response is the hardest to foretell from the prompt, against alone.

    IFD = loss(response | prompt) / loss(response), of mean losses a token. Above 1 the prompt makes
    the response less likely: it does not belong to it, and the row is never kept, even if fewer
    rows than the budget are left.

    Source: Li et al., "From quantity to quality: boosting LLM performance with self-guided data
    selection for instruction tuning" (NAACL 2024, arXiv:2308.12032). A small model ranks much as a
    large one does ("Superfiltering", ACL 2024, arXiv:2402.00530).
    Two ratios are published: this one, of losses, is the first paper's and its code's;
    Superfiltering's code takes that of perplexities, exp(loss - loss), which is above 1 for the
    same rows, but ranks the others by their difference. The first paper trains the model briefly on
    rows of every cluster before it scores; here the model is whichever one is given.
    Cost: two forward passes of the response and one of the prompt, by the model given.

    Needs `losses`: `data_prune.causal.Losses`, another callable of prompts and responses, or an
    array, (n, 2): [after the prompt, alone]. NaN and infinite ones leave a row unscored. Those of a
    callable with a `fingerprint` are kept in the cache.
    """

    name = "ifd"

    def score(self, given: Given) -> dict[str, Array]:
        """See Metric. Raises InputError for rows without prompts, losses below 0 or not (n, 2)."""
        losses = given.needed("losses", self.name)
        if callable(losses):
            losses = asked(losses, "losses", _checked, given, self.name)
        after, alone = np.array(_checked(losses, len(given.rows)), dtype=np.float64).T
        known = np.isfinite(after) & np.isfinite(alone) & (alone > 0)
        ratio = np.divide(after, alone, out=np.full(len(known), np.nan), where=known)
        return {"after_prompt": after, "alone": alone, "ifd": ratio}

    def rank(self, columns: Columns, keep: int) -> Ranking:
        """See Metric."""
        barred = {
            int(i): f"its prompt does not help: IFD {columns['ifd'][i]:.3f} is above 1"
            for i in np.flatnonzero(columns["ifd"] > 1)
        }
        return Ranking(columns["ifd"], barred=barred)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        if np.isnan(columns["ifd"][i]):
            return "no IFD: one of its losses is missing or not above 0"
        return (
            f"IFD {columns['ifd'][i]:.3f}: loss {columns['after_prompt'][i]:.3f} after its prompt, "
            f"{columns['alone'][i]:.3f} alone"
        )


def _checked(losses: Any, n: int) -> Array:
    found = np.asarray(losses)
    if found.shape != (n, 2) or found.dtype.kind not in "fiu":
        raise InputError(
            f"Losses must be numbers of the shape ({n}, 2), after the prompt and alone of each of "
            f"{n} rows, got {found.shape} of type {found.dtype}."
        )
    if (found < 0).any():
        raise InputError(
            f"A loss is a mean negative log-likelihood and cannot be below 0, got {found.min()}: "
            f"are these log-likelihoods? Pass them negated."
        )
    return found
