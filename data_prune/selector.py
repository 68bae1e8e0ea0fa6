"""Choose the rows of a data set that are worth training on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prune.budget import Budget
from data_prune.cache import cache_folder
from data_prune.engine import Engine, Local
from data_prune.metric import Given, Metric
from data_prune.rows import Columns, Rows, Source, read, rows_of
from data_prune.selection import Scored, Selection, counted
from data_prune.vectors import Encoder, SentenceEncoder, Vectors, embed
from prune_core.errors import InputError, did_you_mean
from prune_core.storage import StrPath

Array = NDArray[Any]


def select(
    dataset: Any,
    *,
    metric: str | Metric = "prototypes",
    budget: int | float | str | Budget,
    seed: int = 0,
    prompt: str | None = None,
    response: str | None = None,
    text: str | None = None,
    label: str | None = None,
    id: str | None = None,
    embeddings: Array | Encoder | StrPath | None = None,
    target: Any = None,
    log: Any = None,
    degradation: Any = None,
    losses: Any = None,
    scores: Array | str | None = None,
    tokenizer: Any = None,
    engine: Engine | None = None,
    cache: StrPath | bool = True,
) -> Selection:
    """Choose the rows of a data set that are worth training on, each with a score and a reason.

    dataset: a Hugging Face Dataset; a list of dicts or of strings; a pandas DataFrame; or the path
    of a .jsonl, .jsonl.gz, .csv or .parquet file. It is not changed.
    metric: a name from `data_prune.METHODS`, or one of their classes with settings.
    budget: rows (500), a share of them (0.2, "20%"), or a Budget: tokens, floors and ceilings.
    seed: of whatever is drawn. The same rows are chosen whatever their order and the engine.

    prompt, response, text, label, id: the columns' names; common ones are found (see Columns).
    embeddings: (n, width) numbers, which may be a memory map; a callable, texts to numbers; or a
    sentence-transformers model. By default all-MiniLM-L6-v2, only if the metric needs it.
    target: rows of what the model shall be good at, of any kind that `dataset` is; where
    embeddings is an array, one as well.
    log: a TrainingLog, or (epochs, n) arrays by name, or those of several runs, (runs, epochs, n).
    degradation: (n,) how much a pruned model lost on each row, or a callable of prompts and
    responses.   losses: (n, 2) or such a callable, for ifd.
    scores: (n,) made elsewhere, higher is kept, or the name of a column with them.
    tokenizer: of transformers, or a callable of a text to its tokens; for budgets in tokens.
    engine: Local(workers) by default, or Ray(workers).
    cache: a folder for what models said; True is $PRUNEKIT_CACHE or ~/.cache/prunekit, False none.

    Raises InputError, in a sentence, for whatever of these is not fit; MissingExtra for packages
    of the extra `data` that are needed and not installed.
    """
    budget = Budget.of(budget)
    metric = metric_of_name(metric)
    source = read(dataset)
    names = Columns(prompt=prompt, response=response, text=text, label=label, id=id)
    names = names.found(source.names)
    rows = rows_of(source, names)
    engine = engine or Local()
    folder = None if cache is False else cache_folder(cache)
    if metric.embeds and not isinstance(embeddings, np.ndarray):
        embeddings = encoder_of(embeddings)  # one, for rows and target
    vectors = None
    if metric.embeds or isinstance(embeddings, np.ndarray):
        vectors = _vectors(rows, len(source), embeddings, metric.embeds, engine, folder)
        if unfit := vectors.unfit():
            if len(unfit) == len(rows):
                raise InputError(f"No row can be used: of the first, {next(iter(unfit.values()))}.")
            fit = np.setdiff1d(np.arange(len(rows)), list(unfit))
            rows, vectors = rows.without(unfit), vectors.subset(fit)
    theirs, their_vectors = _target(target, names, embeddings, metric, engine, folder)
    sizes = None if tokenizer is None else _sizes(rows, tokenizer)
    if budget.tokens is None:
        keep = budget.count(len(source), len(rows))
    else:  # as many as fit, if they are the shortest
        shortest = np.cumsum(np.sort(counted(sizes)))
        keep = int(np.searchsorted(shortest, budget.tokens, "right")) or 1
    given = Given(
        rows=rows,
        keep=keep,
        seed=seed,
        engine=engine,
        cache=folder,
        vectors=vectors,
        target=theirs,
        target_vectors=their_vectors,
        log=_log(log, source, rows),
        degradation=_aligned("degradation", degradation, source, rows),
        losses=_aligned("losses", losses, source, rows),
        sizes=sizes,
        scores=_aligned(
            "scores", source.column(scores) if isinstance(scores, str) else scores, source, rows
        ),
    )
    columns = metric.score(given)
    selection = Selection(
        Scored(
            source=source,
            n=len(source),
            names=names,
            rows=rows,
            lengths=np.array([len(t) for t in rows.texts], dtype=np.int64),
            metric=metric,
            columns=columns,
            seed=seed,
            reach=len(rows) if metric.nested else keep,
            vectors=vectors,
            sizes=sizes,
            groups=_groups(source, rows, budget.group_by),
        ),
        budget,
    )
    for note in selection.notes:
        warnings.warn(note, stacklevel=2)
    return selection


def metric_of_name(metric: str | Metric, settings: Mapping[str, Any] = {}) -> Metric:
    """The metric of that name with these settings; or, given as one, as it is.

    Raises UnknownName for the name, InputError for a setting that it does not have or refuses.
    """
    from data_prune import METHODS

    if isinstance(metric, Metric):
        return metric
    if not issubclass(METHODS.get(metric), Metric):
        raise InputError(
            f"'{metric}' is a way to train, not to choose rows: see `prunekit methods`."
        )
    found: Metric = METHODS.build(metric, settings)
    return found


def _vectors(
    rows: Rows,
    n: int,
    embeddings: Any,
    of: str | None,
    engine: Engine,
    folder: Path | None,
) -> Vectors:
    if isinstance(embeddings, np.ndarray):
        if embeddings.ndim != 2 or len(embeddings) != n or embeddings.dtype.kind not in "fiu":
            raise InputError(
                f"embeddings must be numbers of shape (rows, width) for {n} rows, got shape "
                f"{embeddings.shape} of {embeddings.dtype}."
            )
        return Vectors(embeddings, rows.positions)
    vectors = embed(texts_of(rows, of), embeddings, engine, folder)
    return Vectors(vectors, np.arange(len(rows), dtype=np.int64))


def texts_of(rows: Rows, embeds: str | None) -> Sequence[str]:
    """What a metric embeds of each row."""
    return rows.prompts if embeds == "prompt" and rows.prompts else rows.texts


def encoder_of(embeddings: Any) -> Encoder:
    """A callable as it is, or a sentence-transformers model by its name."""
    return embeddings if callable(embeddings) else SentenceEncoder(embeddings)


def _target(
    target: Any,
    names: Columns,
    embeddings: Any,
    metric: Metric,
    engine: Engine,
    folder: Path | None,
) -> tuple[Rows | None, Vectors | None]:
    if target is None:
        return None, None
    if isinstance(target, np.ndarray):
        if target.ndim != 2 or not len(target):
            raise InputError(f"target= as an array must be (rows, width), got {target.shape}.")
        return None, Vectors(target, np.arange(len(target), dtype=np.int64))
    source = read(target)
    known = {
        role: name
        for role, name in asdict(names).items()
        if name in source.names and role not in ("label", "id")
    }
    rows = rows_of(source, Columns(**known).found(source.names))
    if metric.embeds is None or isinstance(embeddings, np.ndarray):
        return rows, None
    return rows, _vectors(rows, len(source), embeddings, metric.embeds, engine, folder)


def _sizes(rows: Rows, tokenizer: Any) -> NDArray[np.int64]:
    """(n,) tokens of each row's text."""
    if hasattr(tokenizer, "from_pretrained"):
        ids = tokenizer(list(rows.texts), add_special_tokens=False)["input_ids"]
        return np.array([len(row) for row in ids], dtype=np.int64)
    return np.array([len(tokenizer(text)) for text in rows.texts], dtype=np.int64)


def _log(log: Any, source: Source, rows: Rows) -> Mapping[str, Array] | None:
    if log is None:
        return None
    arrays: Mapping[str, Array] = getattr(log, "arrays", log)
    for name, array in arrays.items():
        if np.ndim(array) not in (2, 3) or np.shape(array)[-1] != len(source):
            raise InputError(
                f"log['{name}'] must be (epochs, rows) or (runs, epochs, rows) for {len(source)} "
                f"rows, got shape {np.shape(array)}."
            )
    return {name: np.asarray(array)[..., rows.positions] for name, array in arrays.items()}


def _aligned(name: str, values: Any, source: Source, rows: Rows) -> Any:
    """A callable as it is; an array of a number (or several) a row, in the order of `rows`."""
    if values is None or callable(values):
        return values
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers, one for each row: {error}.") from error
    if array.ndim == 0 or len(array) != len(source):
        raise InputError(
            f"{name} must have one entry for each of the {len(source)} rows, got shape "
            f"{array.shape}."
        )
    return array[rows.positions]


def _groups(
    source: Source, rows: Rows, name: str | None
) -> dict[str, tuple[NDArray[np.int64], list[str]]]:
    if name is None:
        return {}
    if name not in source.names:
        raise InputError(
            f"There is no column '{name}' (group_by=). {did_you_mean(name, source.names)}"
        )
    values = source.column(name)
    names, numbers = np.unique([str(values[i]) for i in rows.positions], return_inverse=True)
    return {name: (numbers.astype(np.int64), names.tolist())}
