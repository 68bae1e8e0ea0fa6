"""Which rows and columns of a network's parameters go together: channels, followed through it.

A network is traced by torch.export, and every dimension of every tensor in it gets labels, one a
position. A parameter's dimensions begin with labels of their own; each operator says which labels
are of one channel (what a convolution reads is a channel of what was written), and channels are
what is connected in the end. Label 0 stands for what has to stay: inputs, outputs, what a norm or
a mean averages over, and all that an operator touches of which nothing is known here.

A dimension that is split, as attention's is into heads, goes by its outer part: a whole head.

Source: Wang et al., "Structurally prune anything" (2024, arXiv:2403.18955), section 3, which
propagates masks along the same edges, one channel at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Labels = NDArray[np.int64] | None  # of one dimension; None: it stays, as batches and time do


@dataclass
class Traced:
    """A tensor's sizes, and the labels of each of its dimensions."""

    shape: tuple[int, ...]
    labels: list[Labels]


@dataclass
class Trace:
    """What is known so far: how many labels there are, and which are of one channel."""

    count: int = 1
    left: list[NDArray[np.int64]] = field(default_factory=list)
    right: list[NDArray[np.int64]] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    def new(self, shape: Sequence[int]) -> Traced:
        """A tensor whose dimensions may all be cut, unless something says otherwise."""
        labels: list[Labels] = []
        for size in shape:
            labels.append(np.arange(self.count, self.count + size) if size > 1 else None)
            self.count += size
        return Traced(tuple(shape), labels)

    def same(self, *all_labels: Labels) -> Labels:
        """Dimensions of one size whose positions are of one channel each."""
        known = [labels for labels in all_labels if labels is not None]
        if len(known) < len(all_labels):
            for labels in known:
                self.stay(labels)
            return None
        for labels in known[1:]:
            self.left.append(known[0])
            self.right.append(labels)
        return known[0]

    def stay(self, labels: Labels) -> None:
        """A dimension that cannot be cut."""
        if labels is not None:
            self.left.append(labels)
            self.right.append(np.zeros_like(labels))

    def channels(self) -> NDArray[np.int64]:
        """Of every label its channel's number: that of the lowest label in it."""
        pairs = [
            np.concatenate(side) if side else np.zeros(0, dtype=np.int64)
            for side in (self.left, self.right)
        ]
        ones = np.ones(len(pairs[0]), dtype=np.int8)
        graph = coo_array((ones, (pairs[0], pairs[1])), shape=(self.count, self.count))
        _, found = connected_components(graph, directed=False)
        _, first, number = np.unique(found, return_index=True, return_inverse=True)
        lowest: NDArray[np.int64] = first[number]
        return lowest

    # -------------------------------------------------------------------- operators
    def moved(self, x: Traced, move: Callable[[Tensor], Any]) -> Any:
        """What comes of an operator that moves numbers about, by moving their positions.

        A dimension that is split goes by the part that tells its labels apart, or else by the
        outer part, whose positions then hold one channel each.
        """
        outputs: list[Traced] = []
        several = False
        for k, own in enumerate(x.labels):
            if k and own is None:
                continue
            sizes = [1] * len(x.shape)
            sizes[k] = x.shape[k]
            counted = move(torch.arange(x.shape[k]).view(sizes).expand(x.shape))
            several = isinstance(counted, list | tuple)
            parts = list(counted) if several else [counted]
            if k == 0:
                outputs = [Traced(tuple(part.shape), [None] * part.ndim) for part in parts]
            for output, part in zip(outputs, parts, strict=True):
                if own is not None:
                    self._place(output, own, part)
        return outputs if several else outputs[0]

    def _place(self, output: Traced, own: NDArray[np.int64], positions: Tensor) -> None:
        """Labels of a dimension of the input, whose positions are where the output shows them."""
        varying = [
            i
            for i in range(positions.ndim)
            if not torch.equal(positions, positions.narrow(i, 0, 1).expand(positions.shape))
        ]
        fixed = tuple(slice(None) if i in varying else 0 for i in range(positions.ndim))
        found = own[positions[fixed].numpy()]
        if found.ndim == 0:  # one position alone was taken
            self.stay(own)
            return
        at = 0
        for axis in range(found.ndim):
            others = tuple(i for i in range(found.ndim) if i != axis)
            if (found == found.min(others, keepdims=True)).all():
                at = axis
        rows = np.moveaxis(found, at, 0).reshape(found.shape[at], -1)
        self.left.append(np.broadcast_to(rows[:, :1], rows[:, 1:].shape).ravel())
        self.right.append(rows[:, 1:].ravel())
        if output.labels[varying[at]] is None:
            output.labels[varying[at]] = rows[:, 0]
        else:  # two dimensions became one
            self.stay(output.labels[varying[at]])
            self.stay(own)

    def opaque(self, inputs: Iterable[Any], shape: Sequence[int]) -> Traced:
        """What comes of an operator that nothing is known about: all that it reads stays."""
        for x in inputs:
            for labels in x.labels if isinstance(x, Traced) else ():
                self.stay(labels)
        return Traced(tuple(shape), [None] * len(shape))

    def pointwise(self, inputs: Iterable[Any], shape: Sequence[int]) -> Traced:
        """Broadcast against each other; a dimension of one says nothing of a channel."""
        tensors = [x for x in inputs if isinstance(x, Traced)]
        found = []
        for back in range(-len(shape), 0):
            meet = [x.labels[back] for x in tensors if len(x.shape) >= -back and x.shape[back] != 1]
            found.append(self.same(*meet) if meet else None)
        return Traced(tuple(shape), found)
