"""How much is gone after each of several steps."""

from __future__ import annotations

from prune_core.errors import InputError


def linear(total: float, steps: int) -> list[float]:
    """total/steps, 2·total/steps, …, total; raises InputError for fewer than one step."""
    if steps < 1:
        raise InputError(f"Pruning takes at least one step, got {steps}.")
    return [total * (step + 1) / steps for step in range(steps)]
