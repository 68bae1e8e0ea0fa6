"""Rows in: any kind of data set as columns, and its rows that can be scored in one fixed order.

The order is that of each row's content, not of the input, so that everything computed afterwards,
to the last bit, is the same however the input was shuffled.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prune_core.errors import InputError, did_you_mean, require
from prune_core.storage import read_jsonl

Array = NDArray[Any]

# What instruction data is commonly called, in the order tried.
_PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
]
_TEXTS = ["text", "content"]
_SEPARATOR = "\n"


class Source(Protocol):
    """A data set as it was given."""

    @property
    def names(self) -> Sequence[str]:
        """Of the columns."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> Sequence[Any]:
        """The column's values, in the input's order; None where a row lacks it."""

    def take(self, indices: NDArray[np.int64]) -> Any:
        """These rows, as the same type that was given."""


class _Records:
    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = records
        self.names = list(dict.fromkeys(name for record in records for name in record))

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> list[Any]:
        return [record.get(name) for record in self.records]

    def take(self, indices: NDArray[np.int64]) -> list[Any]:
        return [self.records[i] for i in indices.tolist()]


class _Strings(_Records):
    def take(self, indices: NDArray[np.int64]) -> list[Any]:
        return [self.records[i]["text"] for i in indices.tolist()]


class _Frame:
    def __init__(self, frame: Any) -> None:
        self.frame = frame
        self.names = [str(name) for name in frame.columns]

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.frame[name].tolist()
        return values

    def take(self, indices: NDArray[np.int64]) -> Any:
        return self.frame.iloc[indices]


class _Dataset:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.names = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def column(self, name: str) -> list[Any]:
        return list(self.dataset[name])

    def take(self, indices: NDArray[np.int64]) -> Any:
        return self.dataset.select(indices)


def read(dataset: Any) -> Source:
    """A data set of any kind that `select` takes.

    dataset: a Hugging Face Dataset; a list of dicts or of strings; a pandas DataFrame; or the path
    of a .jsonl, .jsonl.gz, .csv or .parquet file, or of a folder of .parquet files.

    Raises InputError for anything else, for a file that cannot be read, and where there is no row;
    MissingExtra for Parquet without the package `datasets`.
    """
    source = _source(dataset)
    if not len(source):
        raise InputError("The data set is empty: there is nothing to select from.")
    return source


def _source(dataset: Any) -> Source:
    if isinstance(dataset, str | os.PathLike):
        return _read_file(Path(dataset))
    kind = type(dataset)
    if kind.__module__.partition(".")[0] == "datasets":
        if kind.__name__ == "DatasetDict":
            raise InputError(
                f"The data set has the splits {', '.join(dataset)}: pass one of them, "
                f"like dataset['{next(iter(dataset), 'train')}']."
            )
        if not hasattr(dataset, "select"):
            raise InputError(
                f"A {kind.__name__} can be read only once and has no length: make a Dataset of it, "
                f"with datasets.Dataset.from_generator."
            )
        return _Dataset(dataset)
    if hasattr(dataset, "iloc"):
        return _Frame(dataset)
    if isinstance(dataset, Sequence):
        if all(isinstance(row, Mapping) for row in dataset):
            return _Records(dataset)
        if all(isinstance(row, str) for row in dataset):
            return _Strings([{"text": text} for text in dataset])
        wrong = next(row for row in dataset if not isinstance(row, Mapping))
        raise InputError(
            f"The rows of a list must all be dicts, or all strings, got {type(wrong).__name__}: "
            f"make each row a dict of its fields."
        )
    raise InputError(
        f"A data set must be a Hugging Face Dataset, a list of dicts or strings, a pandas "
        f"DataFrame or the path of a JSONL, CSV or Parquet file, got {kind.__name__}."
    )


def _read_file(path: Path) -> Source:
    name = path.name.removesuffix(".gz")
    if path.is_dir() or name.endswith(".parquet"):
        parquet = require("pyarrow.parquet", extra="data", purpose="Reading Parquet")
        datasets = require("datasets", extra="data", purpose="Reading Parquet")
        try:
            return _Dataset(datasets.Dataset(parquet.read_table(path, memory_map=True)))
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            raise InputError(f"Cannot read '{path}' as Parquet: {error}") from error
    if name.endswith(".jsonl"):
        return _Records(list(read_jsonl(path)))
    if name.endswith(".csv"):
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: Excel's mark
                return _Records(list(csv.DictReader(file)))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"Cannot read '{path}' as CSV in UTF-8: {error}") from error
    raise InputError(
        f"'{path}' must be a .jsonl, .jsonl.gz, .csv or .parquet file, or a folder of Parquet "
        f"files: convert it, or pass the rows as a list."
    )


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold what; those that are None are found by their common names.

    prompt, response: of instruction data. `messages` may be the prompt alone: a list of
    {role, content}, of which the last one is the response.   text: of rows that are one text.
    label: of a class.   id: the user's own, which must differ from row to row.
    """

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    label: str | None = None
    id: str | None = None

    def found(self, names: Sequence[str]) -> Columns:
        """With the common names filled in; raises InputError where nothing can be read."""
        for role, name in vars(self).items():
            if name is not None and name not in names:
                raise InputError(
                    f"There is no column '{name}' ({role}=). {did_you_mean(name, names)}"
                )
        label = self.label or ("label" if "label" in names else None)
        if self.text or self.prompt:
            if self.text and (self.prompt or self.response):
                raise InputError(
                    "Give either text= or prompt= with response=, not both: a row is one text or "
                    "a pair."
                )
            return Columns(**{**vars(self), "label": label})
        if "messages" in names and self.response is None:
            return Columns(**{**vars(self), "prompt": "messages", "label": label})
        for prompt, response in _PAIRS:
            if prompt in names and (self.response or response) in names:
                return Columns(
                    prompt=prompt, response=self.response or response, label=label, id=self.id
                )
        for text in _TEXTS:
            if text in names and self.response is None:
                return Columns(text=text, label=label, id=self.id)
        raise InputError(
            f"None of the columns is called as instruction data or text commonly is: name them "
            f"with prompt= and response=, or with text=. There are: {', '.join(names)}."
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """The n rows that can be scored, in the order of their content.

    ids: (n,) S32, a hexadecimal hash of what is scored, ascending; exact copies are numbered.
    positions: (n,) where each row is in the input.   prompts, responses: empty for rows of text.
    labels: (n,) class numbers, or None; label_names: what they stand for.
    invalid: of rows that cannot be scored, by their place in the input: why.
    """

    ids: Array
    positions: NDArray[np.int64]
    texts: Sequence[str]
    prompts: Sequence[str]
    responses: Sequence[str]
    labels: NDArray[np.int64] | None
    label_names: Sequence[str]
    invalid: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.positions)

    def without(self, unfit: Mapping[int, str]) -> Rows:
        """Without the rows at these places of this order, each with the reason."""
        kept = np.array([i for i in range(len(self)) if i not in unfit], dtype=np.int64)
        pick = kept.tolist()
        return Rows(
            self.ids[kept],
            self.positions[kept],
            [self.texts[i] for i in pick],
            [self.prompts[i] for i in pick] if self.prompts else [],
            [self.responses[i] for i in pick] if self.responses else [],
            None if self.labels is None else self.labels[kept],
            self.label_names,
            {**self.invalid, **{int(self.positions[i]): why for i, why in unfit.items()}},
        )


def rows_of(source: Source, columns: Columns) -> Rows:
    """Read what is scored of each row; `columns` as `Columns.found` gives them.

    Raises InputError if no row can be scored, or an id is there twice.
    """
    fields, invalid = _fields(source, columns)
    labels = source.column(columns.label) if columns.label else None
    own = source.column(columns.id) if columns.id else None
    if own is not None:
        [(most, count)] = Counter(map(str, own)).most_common(1)
        if count > 1:
            raise InputError(
                f"The ids in '{columns.id}' must differ, but {most!r} is there {count} times: "
                f"name another column, or none."
            )
    valid = [i for i in range(len(source)) if i not in invalid]
    if not valid:
        raise InputError(
            f"None of the {len(source)} rows can be scored; the first: {invalid[0]}. "
            f"Do the columns hold what they should ({columns})?"
        )
    seen: Counter[bytes] = Counter()
    ids = []
    for i in valid:
        hashed = hashlib.blake2b(digest_size=16)
        extra = [str(labels[i])] if labels is not None else []
        for field in [*fields[i], *extra, *([str(own[i])] if own is not None else [])]:
            raw = field.encode("utf-8", "surrogatepass")
            hashed.update(len(raw).to_bytes(8, "little") + raw)
        digest = hashed.digest()
        seen[digest] += 1
        if seen[digest] > 1:
            digest = hashlib.blake2b(
                digest + seen[digest].to_bytes(8, "little"), digest_size=16
            ).digest()
        ids.append(digest.hex().encode())
    unordered = np.array(ids, dtype="S32")
    order = np.argsort(unordered, kind="stable")
    positions = np.array(valid, dtype=np.int64)[order]
    chosen = [fields[i] for i in positions.tolist()]
    paired = columns.text is None
    numbers, names = _numbered([labels[i] for i in positions.tolist()] if labels else None)
    return Rows(
        unordered[order],
        positions,
        [_SEPARATOR.join(field) for field in chosen],
        [prompt for prompt, _ in chosen] if paired else [],
        [response for _, response in chosen] if paired else [],
        numbers,
        names,
        invalid,
    )


def _fields(source: Source, columns: Columns) -> tuple[Sequence[tuple[str, ...]], dict[int, str]]:
    """What is scored of each row, and of those that cannot be: why."""
    invalid: dict[int, str] = {}
    if columns.text:
        texts = source.column(columns.text)
        for i, text in enumerate(texts):
            if why := _unfit("text", text):
                invalid[i] = why
        return [(text,) for text in texts], invalid
    assert columns.prompt is not None  # `found` sees to it
    prompts = list(source.column(columns.prompt))
    if columns.response is None:
        pairs = [_last_turn(messages) for messages in prompts]
    else:
        pairs = list(zip(prompts, source.column(columns.response), strict=True))
        # Alpaca's rows keep what the instruction is about apart from it.
        if columns.prompt == "instruction" and "input" in source.names:
            pairs = [
                (f"{prompt}\n{about}" if about and isinstance(prompt, str) else prompt, response)
                for (prompt, response), about in zip(pairs, source.column("input"), strict=True)
            ]
    for i, (prompt, response) in enumerate(pairs):
        if prompt is None and columns.response is None:
            invalid[i] = f"its '{columns.prompt}' is no list of {{role, content}}"
        elif why := _unfit("prompt", prompt) or _unfit("response", response):
            invalid[i] = why
    return pairs, invalid


def _unfit(what: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"its {what} is {'missing' if value is None else f'no text but {value!r:.40}'}"
    return None if value.strip() else f"its {what} is empty"


def _last_turn(messages: Any) -> tuple[Any, Any]:
    """The conversation before its last message, as text, and the last message."""
    try:
        *before, last = [(turn["role"], turn["content"]) for turn in messages]
        return "\n".join(f"{role}: {content}" for role, content in before), last[1]
    except (KeyError, TypeError, ValueError):
        return None, None


def _numbered(labels: Sequence[Any] | None) -> tuple[NDArray[np.int64] | None, list[str]]:
    if labels is None:
        return None, []
    names, numbers = np.unique([str(label) for label in labels], return_inverse=True)
    return numbers.astype(np.int64), names.tolist()


def draws(ids: Array, seed: int, purpose: str) -> NDArray[np.float64]:
    """(n,) numbers uniform in [0, 1), each decided by the row's id, the seed and the purpose."""
    key = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    halves = ids.view("S16").reshape(len(ids), 2)[:, 0] if len(ids) else np.array([], "S16")
    x = np.frombuffer(bytes.fromhex(b"".join(halves.tolist()).decode()), dtype=">u8")
    x = x.astype(np.uint64) ^ np.frombuffer(key, dtype="<u8")[0]
    # The finaliser of splitmix64: one changed bit of the input changes half of the output's.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    uniform: NDArray[np.float64] = (x >> np.uint64(11)) * 2.0**-53
    return uniform
