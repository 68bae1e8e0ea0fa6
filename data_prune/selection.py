"""The rows chosen, and an answer to every question about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from data_prune.budget import Budget, bounds
from data_prune.choose import choose, fill, in_order, places
from data_prune.metric import Array, Metric
from data_prune.rows import Columns, Rows, Source, draws
from data_prune.vectors import Vectors
from prune_core.errors import InputError
from prune_core.storage import StrPath

if TYPE_CHECKING:
    from data_prune.report import Choice

_BANDS = 20  # of length, for the random rows of like lengths


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """A data set with what a metric found of it: all that any budget needs.

    n: rows of the input.   names: of its columns.   lengths: (m,) characters of each of `rows`.
    columns: of the metric, in their order.   reach: rows kept up to which the columns hold.
    sizes: (m,) tokens, where they were counted.
    groups: (m,) group numbers and their names, by column, where a budget asked for them.
    """

    source: Source | None
    n: int
    names: Columns
    rows: Rows
    lengths: NDArray[np.int64]
    metric: Metric
    columns: Mapping[str, Array]
    seed: int
    reach: int
    vectors: Vectors | None = None
    sizes: NDArray[np.int64] | None = None
    groups: Mapping[str, tuple[NDArray[np.int64], list[str]]] = field(default_factory=dict)

    @cached_property
    def row_at(self) -> NDArray[np.int64]:
        """(n,) of each row of the input its place in `rows`, -1 for those that are not there."""
        places = np.full(self.n, -1, dtype=np.int64)
        places[self.rows.positions] = np.arange(len(self.rows))
        return places


def counted(sizes: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The tokens of each row, for a budget in tokens; raises InputError where none are counted."""
    if sizes is None:
        raise InputError(
            "A budget in tokens needs tokenizer=, of the model that will read the rows."
        )
    return sizes


class Selection:
    """Rows kept of a data set under a budget; made by `select`, or read by `Selection.load`.

    All numbers of rows are places in the input, from 0. Nothing of the input is copied or changed.
    """

    def __init__(self, scored: Scored, budget: Budget, notes: Sequence[str] = ()) -> None:
        self.scored = scored
        self.budget = budget
        m = len(scored.rows)
        self._lots = draws(scored.rows.ids, scored.seed, "ties")
        floors = caps = None
        if budget.tokens is None:
            self._asked = budget.count(scored.n, m)
        else:
            mean = max(1.0, float(counted(scored.sizes).mean()))
            self._asked = min(m, max(1, int(budget.tokens / mean)))
        ranking = scored.metric.rank(scored.columns, self._asked)
        self._names: Sequence[str] = []
        if budget.group_by is not None:
            if ranking.weights is not None:
                raise InputError(
                    f"The metric '{self.metric.name}' shares the budget among its own groups, so "
                    f"group_by= cannot: leave it out, or choose another metric."
                )
            numbers, self._names = scored.groups[budget.group_by]
            floors, caps = self._bounds(numbers)
            ranking = replace(ranking, groups=numbers, floors=None)
        self._ranking = ranking
        limits = (self._lots, floors, caps)
        if budget.tokens is None:
            self._kept = choose(ranking, self._asked, *limits)
        else:
            self._kept = fill(ranking, budget.tokens, counted(scored.sizes), *limits)
        self.notes = [*notes, *self._own_notes()]

    # ------------------------------------------------------------------------------- what stays

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """(k,) rows kept, ascending."""
        return np.sort(self.scored.rows.positions[self._kept])

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """(n,) whether each row is kept."""
        kept = np.zeros(len(self), dtype=bool)
        kept[self.indices] = True
        return kept

    @cached_property
    def dropped(self) -> NDArray[np.int64]:
        """(n - k,) rows dropped, ascending; those that could not be scored are among them."""
        return np.flatnonzero(~self.kept)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """(n,), higher is kept; NaN for rows that could not be scored."""
        scores = np.full(len(self), np.nan)
        scores[self.scored.rows.positions] = self._ranking.scores
        return scores

    @property
    def reasons(self) -> Sequence[str]:
        """n short phrases: for every row why it is kept or dropped. Made when they are read."""
        return _Reasons(self)

    @property
    def metric(self) -> Metric:
        """The metric, with its settings."""
        return self.scored.metric

    @property
    def seed(self) -> int:
        """Of whatever is drawn."""
        return self.scored.seed

    @property
    def keep_ratio(self) -> float:
        """The share of the input's rows that is kept."""
        return len(self.indices) / len(self)

    def __len__(self) -> int:
        """Rows of the input."""
        return self.scored.n

    def __str__(self) -> str:
        return (
            f"{len(self.indices):,} of {len(self):,} rows kept ({100 * self.keep_ratio:.1f} %) by "
            f"{self.metric.name}, budget {self.budget}, seed {self.seed}"
        )

    def dataset(self) -> Any:
        """The rows kept, as the type that was given, in the input's order.

        Raises InputError for a selection that was loaded without its data set.
        """
        return self._source().take(self.indices)

    # ---------------------------------------------------------------------------------- and why

    def explain(self, i: int) -> str:
        """One paragraph on row i: kept or not, its score, its place, and what would change it."""
        if not 0 <= i < len(self):
            raise InputError(f"Rows are numbered 0 to {len(self) - 1}, got {i}.")
        row = int(self.scored.row_at[i])
        words = f"Row {i}: {self.reasons[i]}."
        if row < 0 or row in self._ranking.barred or not np.isfinite(self._ranking.scores[row]):
            return words
        words += f" Its score is {self._ranking.scores[row]:.4g} (higher is kept)."
        # Where groups share the budget, more of it can mean less for one of them.
        alone = self.budget.group_by is None and self._ranking.weights is None
        if self.budget.tokens is None and alone:
            needed = self._needed(row)
            if self._kept[row]:
                words += f" It stays down to a budget of {needed:,} rows."
            else:
                words += f" It would be kept from a budget of {needed:,} rows."
        lot = "keeps" if i in self.baselines["random"] else "drops"
        return f"{words} A random choice of as many rows {lot} it."

    @cached_property
    def baselines(self) -> dict[str, NDArray[np.int64]]:
        """As many rows by lot, ascending: of all, and of like lengths as those kept.

        "random" and "random, like lengths": what a metric has to beat to be worth its cost.
        """
        rows = self.scored.rows
        lots = draws(rows.ids, self.seed, "baseline")
        count = int(self._kept.sum())
        lengths = self.scored.lengths
        edges = np.quantile(lengths, np.linspace(0, 1, _BANDS + 1)[1:-1])
        band = np.searchsorted(edges, lengths)
        wanted = np.bincount(band[self._kept], minlength=_BANDS)
        place = places(np.argsort(lots), band)
        return {
            "random": np.sort(rows.positions[np.argsort(lots)[:count]]),
            "random, like lengths": np.sort(rows.positions[place < wanted[band]]),
        }

    @cached_property
    def choices(self) -> list[Choice]:
        """What the rows kept are like, beside those of the baselines and all rows."""
        from data_prune.report import choices

        return choices(self)

    def compare(self, other: Selection | NDArray[np.int64]) -> Comparison:
        """How far two choices from the same data agree; other: a selection, or rows.

        Raises InputError for a selection from another number of rows.
        """
        if isinstance(other, Selection) and len(other) != len(self):
            raise InputError(
                f"The selections are from {len(self)} and {len(other)} rows: compare choices from "
                f"the same data."
            )
        theirs = other.indices if isinstance(other, Selection) else np.asarray(other)
        return Comparison(
            both=len(np.intersect1d(self.indices, theirs)),
            only_this=len(np.setdiff1d(self.indices, theirs)),
            only_other=len(np.setdiff1d(theirs, self.indices)),
        )

    def reselect(self, budget: int | float | str | Budget) -> Selection:
        """The same data at another budget; no model is called.

        Raises InputError for a budget that reaches further than what was computed, or by a column
        or in tokens that were not read: those need `select`, which finds its embeddings kept.
        """
        wanted = Budget.of(budget)
        if wanted.group_by is not None and wanted.group_by not in self.scored.groups:
            raise InputError(
                f"The groups of '{wanted.group_by}' were not read: call select with this budget."
            )
        if wanted.tokens is None and wanted.count(len(self), len(self.scored.rows)) > (
            self.scored.reach
        ):
            raise InputError(
                f"{self.metric.name} puts rows in order one by one, and went up to "
                f"{self.scored.reach:,}: call select for more; embeddings are not made again."
            )
        return Selection(self.scored, wanted)

    # ----------------------------------------------------------------------------- kept on disk

    def save(self, folder: StrPath, overwrite: bool = False) -> None:
        """Write the rows kept, every row's score and reason, a page and what made them.

        selected.jsonl, or selected.parquet for what came from Parquet, `datasets` or pandas;
        rows.parquet, a line for each row of the input; selection.json; report.html; card.md.
        Nothing is visible until all is written. Raises InputError for a folder that holds files,
        unless `overwrite`; MissingExtra without pyarrow.
        """
        from data_prune.saved import save

        save(self, folder, overwrite)

    @classmethod
    def load(cls, folder: StrPath, dataset: Any = None) -> Selection:
        """Read a saved selection, to be asked again and cut at other budgets.

        dataset: what it was made from, if its rows are wanted too.
        Raises InputError for a folder that holds no selection, or another data set.
        """
        from data_prune.saved import load

        return load(folder, dataset)

    def to_html(self, path: StrPath) -> None:
        """Write one self-contained page: the map of the data, what was kept and why."""
        from data_prune.report import write_report

        write_report(self, path)

    # ----------------------------------------------------------------------------------- parts

    def _source(self) -> Source:
        if self.scored.source is None:
            raise InputError(
                "This selection was loaded without its data set: pass it, as "
                "Selection.load(folder, dataset)."
            )
        return self.scored.source

    def _bounds(
        self, groups: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Floors and caps of the budget's groups, checked against what there is."""
        names, budget, total = list(self._names), self.budget, self._asked
        sizes = np.bincount(groups, minlength=len(names))
        floors = np.minimum(bounds(budget.min_per_group, names, total, 0), sizes)
        caps = bounds(budget.max_per_group, names, total, len(groups))
        if floors.sum() > total:
            raise InputError(
                f"min_per_group asks for {floors.sum():,} rows over {len(names)} groups, but the "
                f"budget is {total:,}: lower it, or raise the budget."
            )
        for name, floor, cap in zip(names, floors, caps, strict=True):
            if floor > cap:
                raise InputError(f"Group '{name}' must keep at least {floor} and at most {cap}.")
        if np.minimum(caps, sizes).sum() < total and budget.tokens is None:
            raise InputError(
                f"max_per_group leaves at most {np.minimum(caps, sizes).sum():,} rows, but the "
                f"budget is {total:,}: raise it, or lower the budget."
            )
        return floors, caps

    def _own_notes(self) -> list[str]:
        notes = []
        finite = self._ranking.scores[np.isfinite(self._ranking.scores)]
        if len(finite) > 1 and finite.min() == finite.max() and self.metric.name != "random":
            notes.append("All rows have the same score, so the choice among them is by lot.")
        short = self._asked - int(self._kept.sum())
        if self.budget.tokens is None and short > 0:
            notes.append(
                f"{self._kept.sum():,} rows are kept, {short:,} fewer than the budget: the metric "
                f"bars the others, or could not score them."
            )
        if invalid := self.scored.rows.invalid:
            notes.append(
                f"{len(invalid):,} of the rows cannot be scored and are dropped; the first is row "
                f"{min(invalid)}: {invalid[min(invalid)]}."
            )
        return notes

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each row: its place among its peers from 1 (0: none), the peers, how many stay.

        Its peers are its group where groups share the budget, or else all rows.
        """
        m = len(self.scored.rows)
        groups = self._ranking.groups
        if groups is None or self._ranking.weights is None:
            groups = np.zeros(m, dtype=np.int64)
        order = in_order(self._ranking, self._lots)
        place = np.zeros(m, dtype=np.int64)
        place[order] = places(np.arange(len(order)), groups[order]) + 1
        peers = np.bincount(groups[order], minlength=int(groups.max()) + 1)
        kept = np.bincount(groups[self._kept], minlength=len(peers))
        return place, peers[groups], kept[groups]

    def _instead(self, row: int) -> int | None:
        """The row that stays for this one, in the input: the first on the way that is kept."""
        instead = self._ranking.instead
        while instead is not None and (place := int(instead[row])) >= 0:
            row = int(self.scored.row_at[place])
            if self._kept[row]:
                return place
        return None

    def _needed(self, row: int) -> int:
        """The smallest budget in rows that keeps this one; found by trying."""
        low, high = 0, len(self.scored.rows)  # not kept at low, kept at high
        while high - low > 1:
            middle = (low + high) // 2
            ranking = self.metric.rank(self.scored.columns, middle)
            if choose(ranking, middle, self._lots)[row]:
                high = middle
            else:
                low = middle
        return high


@dataclass(frozen=True)
class Comparison:
    """Rows that two choices share, and that only one has."""

    both: int
    only_this: int
    only_other: int

    @property
    def jaccard(self) -> float:
        """Rows shared over rows that either has; 1 for two empty choices."""
        either = self.both + self.only_this + self.only_other
        return self.both / either if either else 1.0


class _Reasons(Sequence[str]):
    def __init__(self, selection: Selection) -> None:
        self._of = selection

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        of = self._of
        row = int(of.scored.row_at[i])
        if row < 0:
            return f"dropped: {of.scored.rows.invalid[i]}"
        found = of.metric.describe(of.scored.columns, row)
        if not of._kept[row] and (instead := of._instead(row)) is not None:
            found += f"; row {instead} stays for it"
        if row in of._ranking.barred:
            return f"dropped: {of._ranking.barred[row]}; {found}"
        place, peers, kept = (int(column[row]) for column in of._places)
        if not place:
            return f"dropped: it could not be scored; {found}"
        verdict = "kept" if of._kept[row] else "dropped"
        among = " in its group" if of._ranking.weights is not None else ""
        return f"{verdict}: rank {place:,} of {peers:,}{among}, of which {kept:,} stay; {found}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
