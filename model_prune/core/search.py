"""Evolutionary search of levels under an exact total: one part a level lower, one a level higher.

A candidate is a tuple of whole numbers, a level for each part of a network. Parts of one kind cost
the same a level, and a mutation moves levels between parts of one kind only, so all candidates
cost what the first one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from model_prune.core.allocate import check_least
from model_prune.core.work import Work
from prune_core.errors import InputError

Candidate = tuple[int, ...]
# (candidates, tokens to judge them by, random numbers that say which) -> lower is better
Fitness = Callable[[Sequence[Candidate], int, np.random.Generator], Sequence[float]]


@dataclass(frozen=True)
class Levels:
    """What candidates are made of.

    kinds: of each part, its kind.   low, high: the levels that it may have, both included.
    """

    kinds: Sequence[str]
    low: Sequence[int]
    high: Sequence[int]

    def mutated(self, candidate: Candidate, random: np.random.Generator) -> Candidate | None:
        """One to four moves away, fewer more often; None where no move is legal.

        Source: Li et al., "Týr-the-Pruner" (2025, arXiv:2503.09657) and its code, after Sieberling
        et al., "EvoPress" (2024, arXiv:2410.14649), section 3.
        """
        levels = list(candidate)
        for _ in range(min(random.integers(1, 5, size=2))):
            lower = [i for i, level in enumerate(levels) if level > self.low[i]]
            pairs = [
                (i, j)
                for i in lower
                for j, level in enumerate(levels)
                if i != j and self.kinds[i] == self.kinds[j] and level < self.high[j]
            ]
            if not pairs:
                return None
            i, j = pairs[random.integers(len(pairs))]
            levels[i] -= 1
            levels[j] += 1
        return tuple(levels)


@dataclass(frozen=True)
class Evolution:
    """How long is searched.

    offspring: candidates a generation.
    survivors, tokens: of each round of selection, how many are left by how many tokens; to the
    last round the parent comes too, so no generation's is worse than the one before by the tokens
    that judged both.
    """

    generations: int
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("generations", self.generations, 0)
        check_least("offspring", self.offspring, 1)
        if len(self.survivors) != len(self.tokens) or not self.survivors:
            raise InputError(
                f"Each round of selection has survivors and tokens, got {len(self.survivors)} and "
                f"{len(self.tokens)} numbers: give as many of both."
            )
        if self.survivors[-1] != 1 or any(x < 1 for x in (*self.survivors, *self.tokens)):
            raise InputError(
                f"survivors {list(self.survivors)} and tokens {list(self.tokens)} must be at least "
                f"1, and one survivor is left at the end: end survivors with 1."
            )

    def best(
        self, parent: Candidate, levels: Levels, fitness: Fitness, work: Work, progress: bool
    ) -> Candidate:
        """What is found from a first candidate; every one that was judged is kept in `work`.

        Generations that `work` holds are not searched again.
        """
        shown = None if progress else True
        for g in tqdm(range(self.generations), desc="searching", unit="generation", disable=shown):
            if g not in work:
                random = np.random.default_rng([self.seed, g])
                work[g] = self._generation(parent, levels, fitness, random)
            parent = tuple(work[g]["parent"].tolist())
        return parent

    def _generation(
        self, parent: Candidate, levels: Levels, fitness: Fitness, random: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        children: dict[Candidate, None] = {}
        for _ in range(20 * self.offspring):  # a small space has fewer than are asked for
            child = levels.mutated(parent, random)
            if child is None or len(children) == self.offspring:
                break
            if child != parent:
                children[child] = None
        left, last = list(children), len(self.tokens) - 1
        rows: list[tuple[Candidate, int, float]] = []
        for number, (survivors, tokens) in enumerate(zip(self.survivors, self.tokens, strict=True)):
            if number == last:
                left.append(parent)
            found = fitness(left, tokens, random)
            rows += [(candidate, tokens, x) for candidate, x in zip(left, found, strict=True)]
            left = [left[i] for i in np.argsort(found, kind="stable")[:survivors]]
        candidates, used, values = zip(*rows, strict=True)
        return {
            "parent": torch.tensor(left[0]),
            "candidates": torch.tensor(candidates),
            "tokens": torch.tensor(used),
            "fitness": torch.tensor(values, dtype=torch.float64),
        }
