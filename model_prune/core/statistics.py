"""What calibration remembers of the inputs of a matrix: sums, so that batches change nothing.

Statistics of inputs take activations x, float32 [tokens, in], in pieces; those of a block take its
inputs and outputs side by side, float32 [windows, tokens, 2 · hidden]. Vectors are added up in
float64, Gram matrices in float32; results differ between ways to cut the pieces by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model_prune.core.linear import gram


class Statistic(Protocol):
    """Something that is added up over the tokens of calibration."""

    def update(self, x: Tensor) -> None:
        """Take in a piece."""

    def total(self) -> Tensor:
        """What was added up; not finite if an input was not."""


class SquaredNorm:
    """Sum over tokens of x_j², whose root is the norm of a column; for Wanda and its kin."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum = torch.zeros(1, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        self.tokens += len(x)
        self._sum = self._sum.to(x.device) + x.square().sum(0)

    def total(self) -> Tensor:
        """float64 [in]."""
        return self._sum

    @property
    def norm(self) -> Tensor:
        """‖x_j‖ over the tokens, float32 [in]."""
        return self._sum.sqrt().float()


class Moments:
    """Mean and variance over tokens, merged piece by piece (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.tokens = 0
        self._mean = torch.zeros(1, dtype=torch.float64)
        self._squares = torch.zeros(1, dtype=torch.float64)  # of deviations from the mean

    def update(self, x: Tensor) -> None:
        n, m = self.tokens, len(x)
        mean = x.mean(0).double()
        squares = (x - mean.float()).square().sum(0).double()
        delta = mean - self._mean.to(x.device)
        self.tokens = n + m
        self._mean = self._mean.to(x.device) + delta * (m / self.tokens)
        self._squares = (
            self._squares.to(x.device) + squares + delta.square() * (n * m / self.tokens)
        )

    def total(self) -> Tensor:
        """float64 [in]: squares of deviations."""
        return self._squares

    @property
    def mean(self) -> Tensor:
        """float32 [in]."""
        return self._mean.float()

    @property
    def variance(self) -> Tensor:
        """Of all tokens (dividing by their number), float32 [in]."""
        return (self._squares / self.tokens).float()

    @property
    def norm(self) -> Tensor:
        """‖x_j‖ over the tokens, float32 [in]."""
        return (self._squares + self.tokens * self._mean.square()).sqrt().float()


class AbsoluteMean:
    """Mean over tokens of |x_j|."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum = torch.zeros(1, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        self.tokens += len(x)
        self._sum = self._sum.to(x.device) + x.abs().sum(0)

    def total(self) -> Tensor:
        """float64 [in]."""
        return self._sum

    @property
    def mean(self) -> Tensor:
        """float32 [in]."""
        return (self._sum / self.tokens).float()


class Gram:
    """Σ xᵀx over tokens, the Hessian of a layer's squared error up to a factor."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        self.tokens += len(x)
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], x.shape[1])
        self._sum += gram(x)

    def total(self) -> Tensor:
        """float32 [in, in]."""
        assert self._sum is not None, "update was never called"
        return self._sum


class Cosine:
    """Mean over tokens of f(cos(input, output)) of a block; f is the identity unless given."""

    def __init__(self, of: Callable[[Tensor], Tensor] = lambda cosine: cosine) -> None:
        self._of = of
        self._tokens = 0
        self._sum = torch.zeros(1, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        before, after = x.chunk(2, -1)
        # Rounding may pass 1, of which there is no arc cosine.
        cosines = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
        self._tokens += cosines.numel()
        self._sum += self._of(cosines).sum().cpu()

    def total(self) -> Tensor:
        """float64 [1]."""
        return self._sum

    @property
    def mean(self) -> float:
        """Over all tokens."""
        return float(self._sum) / self._tokens


def angle(cosine: Tensor) -> Tensor:
    """arccos / π, in [0, 1]."""
    return cosine.arccos() / math.pi


class LastTokens:
    """The hidden states of every window's last token, before and after a block."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self._pieces.append(x[:, -1])

    def total(self) -> Tensor:
        """float32 [windows, 2 · hidden]."""
        return torch.cat(self._pieces)
