"""What training says of each row, epoch by epoch: a few numbers, never the logits.

    log = TrainingLog(len(dataset), "log")
    for epoch in range(20):
        for rows, inputs, labels in batches:  # rows: their places in the data set
            logits = model(inputs)
            log.record(rows, logits, labels)
            ...  # the loss and the step, as ever
        log.end_epoch()

The entries, all float32, in the order of the data set:

el2n            ‖softmax(logits) − onehot(label)‖₂
margin          the label's logit less the largest other one
correct         1 where the label's logit is the largest, else 0
entropy         of the softmax, in nats
gradient_norm   ‖∇ loss‖₂ of the row alone, where it was given (`metrics.grand.gradient_norms`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prune.metric import Given
from prune_core.errors import InputError
from prune_core.storage import StrPath, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

Entries = dict[str, NDArray[np.float32]]

IGNORED = -100
"""The label of tokens that do not count, as everywhere in PyTorch."""


class TrainingLog:
    """The log of one run; it needs 16 bytes a row and epoch, on disk if it has a folder.

    n: rows of the data set.   folder: new or without epochs; each epoch is a file in it, written
    whole when the epoch ends. To read a folder, or to go on with it: `TrainingLog.load`.

    Raises InputError for an n below 1, and for a folder that holds epochs.
    """

    def __init__(self, n: int, folder: StrPath | None = None) -> None:
        if n < 1:
            raise InputError(f"n must be the number of rows of the data set, >= 1, got {n!r}.")
        self.n = n
        self._folder = None if folder is None else Path(folder)
        self._kept: list[Entries] = []
        self._epoch: Entries = {}
        if len(self):
            raise InputError(
                f"The folder '{folder}' holds {len(self)} epochs of a training run: go on with "
                f"them by TrainingLog.load(folder), or choose another folder."
            )

    @classmethod
    def load(cls, folder: StrPath) -> TrainingLog:
        """The log in this folder; what is recorded from now on is appended.

        Raises InputError if there is none or if it cannot be read.
        """
        if not (paths := _paths(Path(folder))):
            raise InputError(f"There is no training log in '{folder}': it holds no epoch-*.npz.")
        log = cls(len(next(iter(_read(paths[0]).values()))))
        log._folder = Path(folder)
        return log

    def __len__(self) -> int:
        """Epochs that have ended."""
        return len(self._kept) if self._folder is None else len(_paths(self._folder))

    def record(
        self,
        rows: ArrayLike | Tensor,
        logits: Tensor,
        labels: Tensor,
        gradient_norms: ArrayLike | Tensor | None = None,
    ) -> None:
        """Note what the model says of these rows; of a row that comes again, the last time counts.

        The forward pass of the training step costs nothing more, as in most published code. Those
        who define EL2N and GraNd by fixed weights go over the rows once more, in eval mode.

        rows: (b,) whole numbers from 0, the rows' places in the data set.
        logits: (b, classes), at least two classes.   labels: (b,) class numbers.
        Of a language model: logits (b, t, vocabulary) and labels (b, t) of the tokens that they
        predict, so `logits[:, :-1], labels[:, 1:]`. Each entry is then the mean over the tokens
        whose label is not −100, and a row without such tokens counts as not seen.
        gradient_norms: (b,), of each row's own loss.

        Raises InputError for shapes that do not fit, numbers out of range, and logits or norms
        that are not finite: a training run that diverged says nothing of its rows.
        """
        logits, labels = logits.detach(), labels.detach()
        where = _numbers(rows)
        self._check(where, logits, labels)
        if logits.ndim == 2:
            entries = _entries(logits, labels)
        else:  # row by row, or the probabilities of all tokens at once would be in memory
            by_row = [
                _entries(some[tokens != IGNORED], tokens[tokens != IGNORED])
                for some, tokens in zip(logits, labels, strict=True)
            ]
            entries = {
                name: np.array([mean(row[name], axis=0) for row in by_row], dtype=np.float32)
                for name in ("el2n", "margin", "correct", "entropy")
            }
        if gradient_norms is not None:
            norms = _numbers(gradient_norms)
            if norms.shape != where.shape or not np.isfinite(norms).all():
                raise InputError(
                    f"gradient_norms must be a finite number for each of the {len(where)} rows, "
                    f"got shape {norms.shape}."
                )
            entries["gradient_norm"] = norms
        for name, values in entries.items():
            self._epoch.setdefault(name, self._unseen())[where] = values

    def end_epoch(self) -> None:
        """Close the epoch; raises InputError if nothing was recorded in it."""
        if not self._epoch:
            raise InputError("Nothing was recorded in this epoch: call record for each batch.")
        if self._folder is None:
            self._kept.append(self._epoch)
        else:
            with atomic_write(self._folder / f"epoch-{len(self):06d}.npz", "wb") as file:
                np.savez(file, allow_pickle=False, **self._epoch)
        self._epoch = {}

    def rewind(self, epochs: int) -> None:
        """Forget all but the first epochs, where training goes on from a checkpoint after them.

        Raises InputError if there are fewer.
        """
        if not 0 <= epochs <= len(self):
            raise InputError(f"The log has {len(self)} epochs, so it cannot go on after {epochs}.")
        self._epoch = {}
        del self._kept[epochs:]
        if self._folder is not None:
            for path in reversed(_paths(self._folder)[epochs:]):
                path.unlink()

    @property
    def arrays(self) -> Entries:
        """(epochs, n) of each entry, read anew; NaN where a row was not seen.

        Raises InputError for files that cannot be read, or that are of different data sets.
        """
        epochs = self._kept
        if self._folder is not None:
            epochs = [_read(path) for path in _paths(self._folder)]
        if any(len(values) != self.n for epoch in epochs for values in epoch.values()):
            raise InputError(f"The epochs in '{self._folder}' are not all of {self.n} rows.")
        names = dict.fromkeys(name for epoch in epochs for name in epoch)
        unseen = self._unseen()
        return {name: np.stack([e.get(name, unseen) for e in epochs]) for name in names}

    def _unseen(self) -> NDArray[np.float32]:
        return np.full(self.n, np.nan, dtype=np.float32)

    def _check(self, rows: NDArray[Any], logits: Tensor, labels: Tensor) -> None:
        if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
            raise InputError(
                f"logits must be (rows, classes) with labels (rows,), or of tokens (rows, tokens, "
                f"vocabulary) with labels (rows, tokens), and of at least two classes, got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}. A single logit z of a yes or "
                f"no stands for the two logits 0 and z."
            )
        if rows.shape != labels.shape[:1] or rows.dtype.kind not in "iu":
            raise InputError(
                f"rows must be a whole number for each of the {len(labels)} rows of the batch, "
                f"their places in the data set, got {rows.dtype} of shape {rows.shape}."
            )
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n):
            raise InputError(
                f"rows must be in [0, {self.n}), their places in the data set, got "
                f"{rows.min()} to {rows.max()}."
            )
        ignored = (labels == IGNORED) & (logits.ndim == 3)
        if not ((labels >= 0) & (labels < logits.shape[-1]) | ignored).all():
            raise InputError(
                f"labels must be in [0, {logits.shape[-1]}), the classes of the logits, got "
                f"{int(labels.min())} to {int(labels.max())}."
            )
        if not logits.isfinite().all():
            raise InputError(
                "The logits hold NaN or infinity: training has diverged, or classes are masked by "
                "−inf, for which a large negative number serves as well."
            )


def runs(logs: Sequence[TrainingLog]) -> Entries:
    """(runs, epochs, n) of the entries that all logs have, so that a score is the mean of runs.

    EL2N and GraNd are defined as expectations over initialisations, for which their paper takes
    ten runs. A run that ended earlier is NaN from there on.

    Raises InputError for no logs, and for logs of different numbers of rows.
    """
    if len({log.n for log in logs}) != 1:
        raise InputError(
            f"The logs must be of one data set, at least one of them, got logs of "
            f"{[log.n for log in logs]} rows."
        )
    arrays = [log.arrays for log in logs]
    longest = max(len(log) for log in logs)
    return {
        name: np.stack(
            [
                np.pad(a[name], ((0, longest - len(a[name])), (0, 0)), constant_values=np.nan)
                for a in arrays
            ]
        )
        for name in arrays[0]
        if all(name in a for a in arrays)
    }


def recorded(given: Given, entry: str, metric: str) -> NDArray[np.float32]:
    """(runs, epochs, n) of an entry; raises InputError if it is not there or does not fit."""
    log = given.needed("log", metric)
    if entry not in log:
        raise InputError(
            f"The metric '{metric}' needs '{entry}' in the log, which has "
            f"{', '.join(log) or 'nothing'}: see data_prune.training_log."
        )
    values: NDArray[np.float32] = np.asarray(log[entry], dtype=np.float32)
    n = len(given.rows)
    if values.ndim not in (2, 3) or values.shape[-1] != n or not values.size:
        raise InputError(
            f"The log's '{entry}' must be (epochs, {n}) or (runs, epochs, {n}), with at least one "
            f"epoch, got {values.shape}: is it of these rows?"
        )
    if np.isinf(values).any():
        raise InputError(f"The log's '{entry}' holds infinity: NaN is for rows that were not seen.")
    return values.reshape(-1, *values.shape[-2:])


def early(given: Given, entry: str, metric: str, epoch: int | None) -> NDArray[np.float64]:
    """(n,) an entry after this many epochs, the mean over runs; None: after 20, or all if fewer."""
    values = recorded(given, entry, metric)
    epochs = values.shape[1]
    if epoch is not None and epoch > epochs:
        raise InputError(f"epoch is {epoch}, but the log has {epochs}: train longer, or ask less.")
    return mean(values[:, (epoch or min(20, epochs)) - 1], axis=0)


def mean(values: NDArray[Any], axis: int | tuple[int, ...]) -> NDArray[np.float64]:
    """The mean of what is not NaN, in float64; NaN of nothing."""
    seen = ~np.isnan(values)
    count = seen.sum(axis=axis)
    total = values.sum(axis=axis, where=seen, dtype=np.float64)
    means: NDArray[np.float64] = np.full(count.shape, np.nan)
    np.divide(total, count, out=means, where=count > 0)
    return means


def _entries(logits: Tensor, labels: Tensor) -> Entries:
    """(m,) each, of m predictions: logits (m, classes), labels (m,)."""
    logits, at = logits.float(), labels.long()[:, None]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    # The label's own error, 1 − p, as the sum of the others: near certainty 1 − p is rounding.
    others = p.scatter(1, at, 0.0)
    entries = {
        "el2n": (others.square().sum(1) + others.sum(1).square()).sqrt(),
        "margin": logits.gather(1, at)[:, 0] - logits.scatter(1, at, -float("inf")).amax(1),
        "correct": (logits.argmax(1) == at[:, 0]).float(),
        "entropy": -(p * log_p).sum(1),
    }
    return {name: values.cpu().numpy() for name, values in entries.items()}


def _numbers(values: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"epoch-{'[0-9]' * 6}.npz"))


def _read(path: Path) -> Entries:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"Cannot read '{path}' as an epoch of a training log: {error}. Rewind the log to the "
            f"epoch before it."
        ) from error
