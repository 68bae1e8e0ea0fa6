"""Files that are whole or not there, and long work that goes on where it stopped."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from prune_core.errors import InputError

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_write(path: StrPath, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    Until then it has a temporary name in the same folder (made if need be), which an error
    removes. Text is UTF-8 with newlines as written. Raises InputError for another mode.
    """
    if mode not in ("w", "wb"):
        raise InputError(f"mode must be 'w' or 'wb', got {mode!r}: a file is written whole.")
    path = Path(path).resolve()  # through a link, so that the link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
    try:
        # Not tempfile: its files are private to the user, whatever the umask says.
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: StrPath, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` only when the block ends without an error.

    An error removes it and leaves `path` as it was. With `overwrite` the old folder goes away
    only after the new one is complete; POSIX has no swap of two folders, so between two renames
    `path` is absent for an instant, and the old one is put back if the second fails.

    Raises InputError, before the block runs, if `path` is a file, or a folder that is not empty
    unless `overwrite`.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"'{path}' must be a folder, but is a file: choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(
            f"The folder '{path}' must be new or empty, but holds files: choose another one, "
            f"or pass overwrite=True to replace it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if overwrite and path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def save_tensors(path: StrPath, tensors: Mapping[str, Any]) -> None:
    """Write torch tensors as safetensors, as transformers does, to be read by whom the umask lets.

    safetensors' own files are private to the user, so that another user's server cannot read them.
    Use it within `atomic_folder`: the file is not whole at once.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(mode)


def write_json(path: StrPath, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; raises TypeError for what JSON cannot hold."""
    with atomic_write(path) as file:
        file.write(json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def json_line(value: Any) -> bytes:
    """`value` as a line of JSON in UTF-8; raises TypeError for what JSON cannot hold.

    JSON may spell a lone surrogate, which UTF-8 cannot hold: it stays spelled.
    """
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_jsonl(path: StrPath, rows: Iterable[Any]) -> None:
    """Write each row as a line of JSON, atomically; see `json_line`."""
    with atomic_write(path, "wb") as file:
        file.writelines(map(json_line, rows))


def read_text(path: StrPath) -> str:
    """A text file, UTF-8, plain or .gz; raises InputError for one that cannot be read."""
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if os.fspath(path).endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(
            f"Cannot read the text '{path}' ({error}): give a text file in UTF-8, plain or .gz."
        ) from error


def read_jsonl(source: StrPath | Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """Yield the object of each line of a file (`.gz` or not) or an open stream; skip blank lines.

    Raises InputError, naming the file and the line, when it reaches a line that is not a JSON
    object, and for a file that cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        yield from _objects(source, str(getattr(source, "name", "<stream>")))
        return
    name = os.fspath(source)
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as lines:
            yield from _objects(lines, name)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        raise InputError(f"Cannot read '{name}': {error}. Give a complete JSONL file.") from error


def _objects(lines: Iterable[str | bytes], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise InputError(
                f"{name}, line {number} is not valid JSON ({error}): "
                f"each line must hold one JSON object."
            ) from error
        if not isinstance(value, dict):
            raise InputError(
                f"{name}, line {number} must hold a JSON object, got "
                f'{type(value).__name__}: write {{"name": value, …}} on each line.'
            )
        yield value


def check_fingerprint(
    folder: StrPath, fingerprint: Mapping[str, Any], pieces: Sequence[Path]
) -> None:
    """Claim a folder for work that can be stopped and go on, or make sure that it is the same work.

    fingerprint: all that the work depends on, JSON-serialisable.   pieces: what is there of it.
    Raises InputError if the folder was made with another fingerprint, or has pieces but none.
    """
    stored_at = Path(folder) / "fingerprint.json"
    if not stored_at.exists():
        if pieces:
            raise InputError(
                f"The folder '{folder}' has shards but no fingerprint.json, so what made them "
                f"is not known: choose another folder, or delete this one."
            )
        write_json(stored_at, dict(fingerprint))
    stored = json.loads(stored_at.read_text(encoding="utf-8"))
    for key in [*fingerprint, *stored]:
        was, now = (  # as JSON text, in which tuples are lists
            json.dumps(given[key], sort_keys=True) if key in given else "absent"
            for given in (stored, fingerprint)
        )
        if was != now:
            raise InputError(
                f"The folder '{folder}' was made by other work: '{key}' was {was} and is now "
                f"{now}. Choose another folder, or delete this one to start again."
            )


class Shards:
    """Long work in numbered pieces, each written whole, so that a stopped run can go on.

        shards = Shards("labels", {"model": name, "seed": 0})
        for i in shards.missing(n):
            shards.write(i, label(pieces[i]))
        rows = list(shards.rows())

    folder: made if need be.   fingerprint: all that the rows depend on, JSON-serialisable.
    Raises InputError if the folder was made with another fingerprint, or has shards but none.
    """

    def __init__(self, folder: StrPath, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        check_fingerprint(self.folder, fingerprint, self._paths())

    def path(self, i: int) -> Path:
        """Where shard `i` is kept; raises InputError unless i is in [0, 999999]."""
        if not 0 <= i <= 999_999:
            raise InputError(f"A shard's number must be in [0, 999999], got {i}: use fewer shards.")
        return self.folder / f"shard-{i:06d}.jsonl"

    def __contains__(self, i: int) -> bool:
        return self.path(i).exists()

    def missing(self, n: int) -> list[int]:
        """Those of the shards 0 to n - 1 that are not written yet, ascending."""
        return [i for i in range(n) if i not in self]

    def write(self, i: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write shard `i`, replacing an earlier one; an error leaves the folder as it was."""
        write_jsonl(self.path(i), map(dict, rows))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of the shards that are there, in order of shard and row."""
        for path in self._paths():
            yield from read_jsonl(path)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"shard-{'[0-9]' * 6}.jsonl"))


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, hence on the same file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
