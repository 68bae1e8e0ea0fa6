"""A selection as people look at it: a page, a section of a data card, a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from data_prune.rows import draws
from data_prune.saved import settings_of
from prune_core.page import write_page
from prune_core.storage import StrPath

if TYPE_CHECKING:
    from data_prune.selection import Selection

_POINTS = 3000  # of the map
_SAMPLE = 2000  # rows asked how far the nearest kept row is
_GROUPS = 12  # shown with examples, the largest first
_WIDTH, _HEIGHT = 860.0, 520.0


@dataclass(frozen=True)
class Choice:
    """What a choice of rows is like; the figures that a metric and a lottery are compared by.

    characters: mean of a row.   tokens: of all rows together, or None.
    far: mean cosine distance from a row of the data to the nearest one chosen; None without
    embeddings.   spread: of the labels or clusters, the entropy over that of an even choice.
    shared: the part of its rows that the selection keeps too.
    """

    name: str
    rows: int
    characters: float
    tokens: int | None
    far: float | None
    spread: float | None
    shared: float


def choices(selection: Selection) -> list[Choice]:
    """The selection, beside as many random rows, random ones of like lengths, and all rows."""
    scored = selection.scored
    at = scored.row_at
    kept = at[selection.indices]
    named = {
        "kept": kept,
        **{name: at[rows] for name, rows in selection.baselines.items()},
        "all": np.arange(len(scored.rows)),
    }
    groups = _groups(selection)
    return [
        Choice(
            name=name,
            rows=len(rows),
            characters=float(scored.lengths[rows].mean()) if len(rows) else 0.0,
            tokens=None if scored.sizes is None else int(scored.sizes[rows].sum()),
            far=_far(selection, rows),
            spread=None if groups is None else _spread(groups[1][rows], len(groups[2])),
            shared=len(np.intersect1d(rows, kept)) / max(1, len(rows)),
        )
        for name, rows in named.items()
    ]


def write_report(selection: Selection, path: StrPath) -> None:
    """See Selection.to_html."""
    scored = selection.scored
    write_page(
        path,
        Path(__file__).with_name("report.html.j2"),
        title=f"{len(selection.indices):,} of {len(selection):,} rows",
        selection=selection,
        settings=_settings(selection),
        notes=[*selection.notes, *_warnings(selection)],
        choices=selection.choices,
        points=_map(selection),
        width=_WIDTH,
        height=_HEIGHT,
        bars=_histogram(selection),
        groups=_group_rows(selection),
        has_text=bool(scored.rows.texts),
        edge=_edge(selection),
    )


def card(selection: Selection) -> str:
    """A section for the data set's card: what was chosen, by what, and beside what."""
    lines = [
        "## Selection",
        "",
        f"{selection}. Chosen with prunekit; the settings: {_settings(selection)}.",
        "",
        "| choice | rows | mean characters | also kept |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {c.name} | {c.rows:,} | {c.characters:,.0f} | {100 * c.shared:.0f} % |"
            for c in selection.choices
        ),
        "",
        *(f"- {note}" for note in [*selection.notes, *_warnings(selection)]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _settings(selection: Selection) -> str:
    def said(settings: dict[str, Any]) -> str:
        own = [
            f"{name} {said(value) if isinstance(value, dict) else value}"
            for name, value in settings.items()
            if name != "name" and value is not None
        ]
        return f"{settings['name']} ({', '.join(own)})" if own else str(settings["name"])

    return said(settings_of(selection.metric))


def _warnings(selection: Selection) -> list[str]:
    scores = selection.scores[selection.scored.rows.positions]
    fit = np.isfinite(scores)
    lengths = selection.scored.lengths[fit]
    if fit.sum() < 10 or np.ptp(scores[fit]) == 0 or np.ptp(lengths) == 0:
        return []
    with_length = float(spearmanr(scores[fit], lengths).statistic)
    if abs(with_length) <= 0.8:
        return []
    longer = "longer" if with_length > 0 else "shorter"
    return [
        f"The score is close to the rows' length (rank correlation {with_length:.2f}): it mostly "
        f"keeps {longer} rows. Compare with random rows of like lengths."
    ]


def _groups(selection: Selection) -> tuple[str, NDArray[np.int64], Sequence[str]] | None:
    """What the rows fall into: the budget's groups, or labels, or the metric's clusters."""
    scored = selection.scored
    for name, (numbers, names) in scored.groups.items():
        return name, numbers, names
    if scored.rows.labels is not None:
        return "label", scored.rows.labels, scored.rows.label_names
    if "cluster" in scored.columns:
        clusters = scored.columns["cluster"].astype(np.int64)
        return "cluster", clusters, [str(i) for i in range(int(clusters.max()) + 1)]
    return None


def _spread(groups: NDArray[np.int64], k: int) -> float:
    share = np.bincount(groups, minlength=k) / max(1, len(groups))
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / math.log(k)) if k > 1 else 1.0


def _far(selection: Selection, rows: NDArray[np.int64]) -> float | None:
    vectors = selection.scored.vectors
    if vectors is None or not len(rows):
        return None
    sample = vectors[_sample(selection, _SAMPLE)]
    nearest = np.full(len(sample), -1.0, dtype=np.float32)
    for start in range(0, len(rows), 4096):
        cosines = sample @ vectors[np.sort(rows[start : start + 4096])].T
        nearest = np.maximum(nearest, cosines.max(axis=1))
    return max(0.0, float((1 - nearest).mean()))


def _sample(selection: Selection, count: int) -> NDArray[np.int64]:
    lots = draws(selection.scored.rows.ids, selection.seed, "report")
    return np.sort(np.argsort(lots)[:count])


def _map(selection: Selection) -> list[tuple[float, float, bool, str]]:
    """x, y, kept and reason of some rows: their embeddings' first two principal components."""
    vectors = selection.scored.vectors
    if vectors is None or len(vectors) < 3:
        return []
    shown = _sample(selection, _POINTS)
    block = vectors[shown].astype(np.float64)
    block -= block.mean(axis=0)
    _, axes = np.linalg.eigh(block.T @ block)
    flat = block @ axes[:, -2:][:, ::-1]
    low, high = flat.min(axis=0), flat.max(axis=0)
    unit = (flat - low) / np.maximum(high - low, 1e-12)
    places = selection.scored.rows.positions[shown].tolist()
    kept = selection.kept[places]
    points = [
        (8 + x * (_WIDTH - 16), 8 + y * (_HEIGHT - 16), bool(k), f"row {i}, {selection.reasons[i]}")
        for (x, y), k, i in zip(unit.tolist(), kept.tolist(), places, strict=True)
    ]
    return sorted(points, key=lambda point: point[2])  # the kept ones on top


def _histogram(selection: Selection) -> list[tuple[str, float, float, int, int]]:
    """Of each bin of the scores: its range, the heights of what is dropped and kept, the counts."""
    scores = selection.scores
    fit = np.isfinite(scores)
    if not fit.any() or np.ptp(scores[fit]) == 0:
        return []
    # A few far-off scores would leave one bar.
    low, high = np.quantile(scores[fit], [0.005, 0.995])
    if low == high:
        low, high = np.quantile(scores[fit], [0, 1])
    edges = np.linspace(low, high, 31)
    clipped = np.clip(scores, edges[0], edges[-1])
    kept = selection.kept
    stay, _ = np.histogram(clipped[fit & kept], edges)
    go, _ = np.histogram(clipped[fit & ~kept], edges)
    top = max(1, int((stay + go).max()))
    return [
        (f"{a:.3g} to {b:.3g}", 120 * g / top, 120 * s / top, int(g), int(s))
        for a, b, g, s in zip(edges, edges[1:], go, stay, strict=False)
    ]


@dataclass(frozen=True)
class Row:
    """One row as the page shows it."""

    place: int
    text: str
    reason: str


def _row(selection: Selection, i: int) -> Row:
    """i: in the order of the rows that are scored."""
    place = int(selection.scored.rows.positions[i])
    text = selection.scored.rows.texts[i]
    short = text if len(text) <= 400 else text[:400] + " …"
    return Row(place, short, selection.reasons[place])


def _edge(selection: Selection) -> dict[str, list[Row]]:
    """The best rows, those on either side of the cut, and the worst."""
    scored = selection.scored
    if not scored.rows.texts:
        return {}
    scores = selection.scores[scored.rows.positions]
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    kept = selection.kept[scored.rows.positions[order]]
    stay, go = order[kept], order[~kept]
    parts = {
        "First kept": stay[:4],
        "Last kept": stay[4:][-4:],
        "First dropped": go[:4],
        "Last dropped": go[4:][-4:],
    }
    return {name: [_row(selection, int(i)) for i in rows] for name, rows in parts.items()}


@dataclass(frozen=True)
class Group:
    """A group of rows as the page shows it."""

    name: str
    size: int
    kept: int
    score: float
    examples: Sequence[tuple[bool, Row]]


def _group_rows(selection: Selection) -> tuple[str, list[Group]] | None:
    found = _groups(selection)
    if found is None:
        return None
    what, numbers, names = found
    scored = selection.scored
    scores = selection.scores[scored.rows.positions]
    kept = selection.kept[scored.rows.positions]
    sizes = np.bincount(numbers, minlength=len(names))
    groups = []
    for rank, g in enumerate(np.argsort(-sizes, kind="stable")[:100].tolist()):
        members = np.flatnonzero(numbers == g)
        if not len(members):
            break
        examples: list[tuple[bool, Row]] = []
        if rank < _GROUPS and scored.rows.texts:
            best = members[np.argsort(-scores[members], kind="stable")]
            examples = [
                (stays, _row(selection, int(i)))
                for stays in (True, False)
                for i in best[kept[best] == stays][:3]
            ]
        fit = np.isfinite(scores[members])
        mean = float(scores[members][fit].mean()) if fit.any() else math.nan
        groups.append(Group(names[g], len(members), int(kept[members].sum()), mean, examples))
    return what, groups
