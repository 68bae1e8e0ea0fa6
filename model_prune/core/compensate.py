"""What the weights that stay can do for those that go: linear algebra on one matrix.

W is float32 [out, in], its inputs' Gram matrix H = Σ xᵀx is float32 [in, in].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import get_lapack_funcs
from threadpoolctl import ThreadpoolController
from torch import Tensor

from model_prune.core.structure import NM, keep_highest, removed_count
from prune_core.errors import InputError

DAMPING = (0.01, 0.1, 1.0)  # shares of the mean diagonal; the first that works is taken


def inverse_factor(gram: Tensor, damping: Sequence[float] = DAMPING) -> Tensor:
    """The upper Cholesky factor U of (H + λ·mean(diag H)·I)⁻¹ = Uᵀ U, float32 [in, in].

    An input that was always zero gets a 1 on the diagonal. Larger λ are tried where H cannot be
    factorised. Raises InputError where none of them does, rather than pruning by something else.
    """
    diagonal = gram.diagonal()
    for share in damping:
        # With rows and columns in reverse, H' = L Lᵀ, and U is L⁻¹ in reverse: one inverse of a
        # triangle in place of one of the whole and a second factorisation.
        reverse = gram.flip(0, 1)
        reverse.diagonal().add_((share * diagonal.mean() + (diagonal == 0)).flip(0))
        inverse = _inverse_of_cholesky(reverse)
        if inverse is not None:
            return inverse.flip(0, 1)
    raise InputError(
        f"The second moments of a matrix's inputs cannot be inverted, even with {damping[-1]} of "
        f"their mean added to the diagonal: give more calibration text, or look for infinities."
    )


def _inverse_of_cholesky(matrix: Tensor) -> Tensor | None:
    """L⁻¹ of matrix = L Lᵀ, which may be overwritten; None where there is no such L."""
    if matrix.device.type == "cpu":
        # LAPACK can invert a triangle for a third of what torch can: solving with the identity.
        own = matrix.numpy().T  # symmetric, so this is it in LAPACK's order of columns
        factorise, invert = get_lapack_funcs(("potrf", "trtri"), (own,))
        # Threads of its own would wait for more to do on the cores that torch's then want.
        with _openblas().limit(limits=1):
            lower, failed = factorise(own, lower=True, clean=True, overwrite_a=True)
            if failed:
                return None
            inverse, failed = invert(lower, lower=True, overwrite_c=True)
        return None if failed else torch.from_numpy(inverse)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return solved


@functools.cache
def _openblas() -> Any:
    return ThreadpoolController().select(internal_api="openblas")


@dataclass(frozen=True)
class Sweep:
    """SparseGPT's sweep over columns: prune one, let the ones to its right make up for it.

    Source: Frantar and Alistarh, "SparseGPT" (2023, arXiv:2301.00774), algorithm 1.
    block: columns whose weights are ranked together (the paper's B_s = 128).
    pattern: N:M in place of a share of each block.
    """

    block: int = 128
    pattern: NM | None = None

    def __call__(
        self, weights: Sequence[Tensor], factor: Tensor, sparsities: Sequence[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """New weights and masks of matrices that share their inputs; the given stay as they are.

        factor: `inverse_factor` of the inputs.   sparsities: share of zeros of each matrix.
        Each matrix is ranked for itself; they are swept together, as that is one pass.
        """
        rows = [len(weight) for weight in weights]
        # Columns of W are rows here, so that each is contiguous.
        work = torch.cat([weight.T for weight in weights], 1).contiguous()
        kept = torch.ones_like(work, dtype=torch.bool)
        columns, block = len(work), self._whole(self.block)
        for start in range(0, columns, block):
            end = min(start + block, columns)
            if self.pattern is None:
                scores = (work[start:end] / factor.diagonal()[start:end, None]).square()
                parts = zip(torch.split(scores, rows, 1), sparsities, strict=True)
                kept[start:end] = torch.cat([_of_block(part, share) for part, share in parts], 1)
                if kept[start:end].all():
                    continue  # so that nothing is rounded where nothing goes
            errors = self._block(work[start:], kept[start:end], factor[start:, start:])
            work[end:] -= factor[start:end, end:].T @ errors
        return (
            [part.T.contiguous() for part in torch.split(work, rows, 1)],
            [part.T.contiguous() for part in torch.split(kept, rows, 1)],
        )

    def _block(self, work: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        """Sweep the first columns; the errors [columns, rows] that the others make up for.

        work: [columns and all after, rows].   kept: [columns, rows]; found here for a pattern.
        Columns are taken a few at a time, so that what one changes is still in the cache for
        the next.
        """
        columns = len(kept)
        diagonal = factor.diagonal()[:columns, None]
        errors = torch.empty_like(work[:columns])
        scale = ~kept / diagonal
        inner = self._whole(32)
        for first in range(0, columns, inner):
            last = min(first + inner, columns)
            for j in range(first, last):
                if self.pattern is not None and j % self.pattern.block == 0:
                    group = slice(j, j + self.pattern.block)
                    scores = (work[group] / diagonal[group]).square()
                    kept[group] = self.pattern.mask(scores.T, self.pattern.sparsity).T
                    scale[group] = ~kept[group] / diagonal[group]
                torch.mul(work[j], scale[j], out=errors[j])
                work[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j], alpha=-1)
            done = errors[first:last]
            work[last:columns] -= factor[first:last, last:columns].T @ done
        work[:columns].masked_fill_(~kept, 0)
        return errors

    def _whole(self, columns: int) -> int:
        """At least so many columns, in whole groups of the pattern, which are ranked at once."""
        group = self.pattern.block if self.pattern else 1
        return -(-columns // group) * group


def _of_block(scores: Tensor, sparsity: float) -> Tensor:
    """scores [columns, rows]; ranked with the rows of W in front, as W is read."""
    flat = scores.T.flatten()
    mask = keep_highest(flat, removed_count(len(flat), sparsity))
    return mask.view(scores.shape[1], -1).T


def removal_order(
    weight: Tensor,
    gram: Tensor,
    groups: int,
    *,
    at_once: int = 1,
    gradient: bool = False,
    damping: Sequence[float] = DAMPING,
) -> Tensor:
    """The order in which groups of neighbouring columns go, each step those that cost least.

    A group costs its `rise`, with W and H⁻¹ as the groups gone before leave them. Groups of
    `at_once` go together.
    gradient: add tr(W_g (H W₀ᵀ)_g), as the authors of Týr do, which is no part of that rise.
    Source: Kurtic et al., "ZipLM" (2023, arXiv:2302.04089), section 3.1, whose groups are these;
    Frantar and Alistarh, "Optimal Brain Compression" (2022, arXiv:2208.11580), equation 3.

    Returns int64 [groups], the first to go first; equal costs by index. Raises InputError as
    `inverse_factor`.
    """
    size = weight.shape[1] // groups
    factor = inverse_factor(gram, damping)
    inverse = factor.T @ factor
    dead = gram.diagonal() == 0
    work = weight.T.masked_fill(dead[:, None], 0)  # [in, out]
    slope = _solved(factor, work) if gradient else None
    alive = torch.arange(groups, device=weight.device)
    order = []
    while len(alive) > at_once:
        cost = rise(work.T, inverse, torch.arange(len(work), device=work.device).view(-1, size))
        if slope is not None:
            cost += (work * slope).view(len(alive), -1).sum(1)
        ranked = cost.argsort(stable=True)
        gone, stays = ranked[:at_once], ranked[at_once:].sort().values
        order.append(alive[gone])
        left, right = _columns(stays, size), _columns(gone, size)
        mixed = inverse[left][:, right]
        solved = torch.linalg.solve(inverse[right][:, right], torch.cat([work[right], mixed.T], 1))
        work = work[left] - mixed @ solved[:, : work.shape[1]]
        inverse = inverse[left][:, left] - mixed @ solved[:, weight.shape[0] :]
        if slope is not None:
            slope = slope[left]
        alive = alive[stays]
    return torch.cat([*order, alive])


def rise(weight: Tensor, inverse: Tensor, groups: Tensor) -> Tensor:
    """What Σ ‖W x − W' x‖² / 2 rises by without a group of columns, the others making up for it.

    tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ) / 2, for each row of `groups`, int64 [groups, columns of one]; `inverse`
    is H⁻¹ [in, in]. Returns float32 [groups].
    Source: as of `removal_order`.
    """
    own = inverse[groups[:, :, None], groups[:, None, :]]  # [groups, columns, columns]
    # By Cholesky: on the CPU torch's LU of several matrices fails with more than one thread.
    lower, failed = torch.linalg.cholesky_ex(own)
    if failed.any():  # rounding, after many groups have gone
        little = 1e-4 * own.diagonal(dim1=1, dim2=2).mean(1)
        identity = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
        lower = torch.linalg.cholesky(own + little[:, None, None] * identity)
    solved: Tensor = torch.linalg.solve_triangular(lower, weight.T[groups], upper=False)
    return solved.square().sum((1, 2)) / 2


def _solved(factor: Tensor, x: Tensor) -> Tensor:
    """H x, by the factor U of H⁻¹ = Uᵀ U."""
    once = torch.linalg.solve_triangular(factor.T, x, upper=False)
    result: Tensor = torch.linalg.solve_triangular(factor, once, upper=True)
    return result


def _columns(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = 0.01) -> Tensor:
    """W with the columns that stay refitted to the outputs of the whole, the others zero.

    Minimises Σ ‖W x − W' x‖² over W' [out, in] whose columns outside `kept` (int64) are zero:
    W'_K = W H_:K (H_KK + λI)⁻¹, λ = damping · mean(diag H).
    Source: the closed form of the reconstruction of e.g. Frantar and Alistarh, "Optimal Brain
    Compression" (2022, arXiv:2208.11580), section 4.
    """
    own = gram[kept][:, kept].clone()
    own.diagonal().add_(damping * gram.diagonal().mean())
    # The damping pulls towards the old weights, not towards zero.
    target = gram[kept] @ weight.T
    target += damping * gram.diagonal().mean() * weight.T[kept]
    refitted = torch.zeros_like(weight)
    refitted[:, kept] = torch.linalg.solve(own, target).T
    return refitted


def mean_bias(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """What the removed columns gave on average, float32 [out]: Σ_j∉kept W_:j mean(x_j).

    Source: An et al., "FLAP" (2023, arXiv:2312.11983), equation 6 and its bias compensation.
    """
    gone = torch.ones_like(mean, dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone] @ mean[gone]
