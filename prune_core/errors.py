"""Every error prunekit raises on purpose. Catch `PruneError` to catch them all.

    PruneError
    ├── InputError (a ValueError)        a bad argument or bad data
    │   ├── UnknownName                  a name that is not in its table
    │   └── RecipeError                  a recipe that cannot be read
    ├── CheckpointError                  a folder or weights that cannot be loaded, or not safely
    ├── Overloaded                       too much is waiting: try again later
    └── MissingExtra (an ImportError)    an optional package that is not installed

Each message says what was wrong, the value got, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PruneError(Exception):
    """Base of every error prunekit raises on purpose."""


class InputError(PruneError, ValueError):
    """A bad argument or bad data."""


class UnknownName(InputError):
    """A name that is not in its table; `unknown_name` words it."""


class RecipeError(InputError):
    """A recipe that cannot be read into its class."""


class CheckpointError(PruneError):
    """A folder or weights that cannot be loaded, or not safely."""


class Overloaded(PruneError):
    """Too much is waiting, so this was not begun; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(PruneError, ImportError):
    """An optional package that is not installed, with the line that installs it.

    `MissingExtra("gguf", "demo", "Reading GGUF files")` reads "Reading GGUF files needs the
    package 'gguf': pip install 'prunekit[demo]'."
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        # The three parts are the `args`, so that the error survives pickling between processes.
        super().__init__(package, extra, purpose, name=package)

    def __str__(self) -> str:
        package, extra, purpose = self.args
        return f"{purpose} needs the package '{package}': pip install 'prunekit[{extra}]'."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The help after "Unknown …": "Did you mean 'provence'? Known: bm25, provence."."""
    names = sorted(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    guess = f"Did you mean '{by_lower[close[0]]}'? " if close else ""
    return f"{guess}Known: {', '.join(names) or '(none)'}."


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """The error, to be raised by the caller, for a `name` that is not among the `known` ones."""
    return UnknownName(f"Unknown {kind} {name!r}. {did_you_mean(name, known)}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise InputError unless `value`, of the argument `name`, is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}.")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise `MissingExtra` naming the extra that installs it.

    An import that fails inside an installed module is not hidden: its own error is raised.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtra(module.partition(".")[0], extra, purpose) from error
