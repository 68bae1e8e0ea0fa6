"""A selection on disk: the rows kept, and for every row of the input its score and its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prune.metric import Metric
from data_prune.rows import Columns, Rows, read, rows_of
from prune_core.errors import InputError, require
from prune_core.provenance import provenance
from prune_core.storage import StrPath, atomic_folder, write_json, write_jsonl

if TYPE_CHECKING:
    from data_prune.selection import Selection


def settings_of(metric: Metric) -> dict[str, Any]:
    """The metric's name and settings, JSON-serialisable; `metric_of` reads them."""
    values = {field.name: getattr(metric, field.name) for field in fields(metric)}
    return {"name": metric.name} | {
        name: settings_of(value) if isinstance(value, Metric) else value
        for name, value in values.items()
    }


def metric_of(settings: Mapping[str, Any]) -> Metric:
    """The metric that `settings_of` described."""
    from data_prune import METHODS

    values = {
        name: metric_of(value) if isinstance(value, Mapping) and "name" in value else value
        for name, value in settings.items()
        if name != "name"
    }
    metric: Metric = METHODS.get(settings["name"])(**values)
    return metric


def save(selection: Selection, folder: StrPath, overwrite: bool) -> None:
    """See Selection.save."""
    from data_prune.report import card

    require("pyarrow", extra="data", purpose="Saving a selection")
    scored = selection.scored
    with atomic_folder(folder, overwrite) as new:
        if scored.source is not None:
            _write_selected(selection.dataset(), new)
        _write_rows(selection, new / "rows.parquet")
        write_json(
            new / "selection.json",
            {
                "metric": settings_of(selection.metric),
                "budget": asdict(selection.budget),
                "seed": selection.seed,
                "rows": len(selection),
                "kept": len(selection.indices),
                "reach": scored.reach,
                "columns": asdict(scored.names),
                "labels": list(scored.rows.label_names),
                "groups": {name: names for name, (_, names) in scored.groups.items()},
                "numbers": {k: v.item() for k, v in scored.columns.items() if v.ndim == 0},
                "invalid": {str(i): why for i, why in scored.rows.invalid.items()},
                "notes": selection.notes,
                "provenance": provenance(selection.seed),
            },
        )
        (new / "card.md").write_text(card(selection), encoding="utf-8")
        selection.to_html(new / "report.html")


def load(folder: StrPath, dataset: Any) -> Selection:
    """See Selection.load."""
    from data_prune.budget import Budget
    from data_prune.selection import Scored, Selection

    parquet = require("pyarrow.parquet", extra="data", purpose="Reading a selection")
    try:
        manifest = json.loads(Path(folder, "selection.json").read_text(encoding="utf-8"))
        table = parquet.read_table(Path(folder, "rows.parquet"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{folder}' holds no saved selection: {error}") from error
    table = table.filter(table["id"].is_valid()).sort_by("id")
    held = {name: table[name].to_numpy() for name in table.column_names}
    own = {name.removeprefix("metric."): held[name] for name in held if name.startswith("metric.")}
    own |= {name: np.array(value) for name, value in manifest["numbers"].items()}
    labels = held["label"].astype(np.int64) if "label" in held else None
    names = Columns(**manifest["columns"])
    invalid = {int(i): why for i, why in manifest["invalid"].items()}
    ids = held["id"].astype("S32")
    source = None if dataset is None else read(dataset)
    if source is None:
        rows = Rows(ids, held["row"], [], [], [], labels, manifest["labels"], invalid)
    else:
        known = np.isin(np.arange(len(source)), held["row"])
        rows = rows_of(source, names)
        rows = rows.without({i: "" for i, p in enumerate(rows.positions) if not known[p]})
        if len(source) != manifest["rows"] or not np.array_equal(rows.ids, ids):
            raise InputError(
                f"The data set is not the one that '{folder}' was made from: pass that one, with "
                f"its rows as they were."
            )
        rows = Rows(**{**vars(rows), "invalid": invalid})
    scored = Scored(
        source=source,
        n=manifest["rows"],
        names=names,
        rows=rows,
        lengths=held["characters"].astype(np.int64),
        metric=metric_of(manifest["metric"]),
        columns=own,
        seed=manifest["seed"],
        reach=manifest["reach"],
        sizes=held["tokens"].astype(np.int64) if "tokens" in held else None,
        groups={
            name: (held[f"group.{name}"].astype(np.int64), known)
            for name, known in manifest["groups"].items()
        },
    )
    return Selection(scored, Budget(**manifest["budget"]))


def _write_selected(rows: Any, folder: Path) -> None:
    """As JSON lines, or as Parquet what is a table already."""
    if hasattr(rows, "to_parquet"):  # of datasets, of pandas
        rows.to_parquet(folder / "selected.parquet")
        return
    write_jsonl(folder / "selected.jsonl", rows)


def _write_rows(selection: Selection, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scored, n = selection.scored, len(selection)
    at = scored.rows.positions

    def spread(values: Any) -> Any:
        """One value for each row of the input; null where it could not be scored."""
        mask = np.ones(n, dtype=bool)
        mask[at] = False
        full = np.zeros(n, dtype=values.dtype)
        full[at] = values
        return pa.array(full, mask=mask)

    columns: dict[str, Any] = {
        "row": np.arange(n),
        "kept": selection.kept,
        "score": spread(selection.scores[at]),
        "reason": pa.array(iter(selection.reasons), pa.string()),
        "id": spread(scored.rows.ids.astype("U32")),
        "characters": spread(scored.lengths),
    }
    if scored.sizes is not None:
        columns["tokens"] = spread(scored.sizes)
    if scored.rows.labels is not None:
        columns["label"] = spread(scored.rows.labels)
    for name, (numbers, _) in scored.groups.items():
        columns[f"group.{name}"] = spread(numbers)
    for name, values in scored.columns.items():
        if values.ndim:
            columns[f"metric.{name}"] = spread(values)
    pq.write_table(pa.table(columns), path)
