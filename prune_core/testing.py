"""Checks that the test suites of several packages share."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable
from importlib import import_module

from prune_core.errors import InputError
from prune_core.registry import Method


def unregistered(
    methods: Iterable[Method], folder: str, *, ignore: Collection[str] = ()
) -> list[str]:
    """The modules of a folder of methods that no row targets: empty when nothing was forgotten.

    The rule: every module directly in the folder is the target of at least one row, unless its
    name starts with an underscore or is in `ignore`. A sub-package counts as one module. The
    modules themselves are not imported.

    methods: a Registry, or the rows of several.   folder: dotted name ("data_prune.metrics").
    Raises InputError if `ignore` names a module that the folder does not have.
    """
    present = {module.name for module in pkgutil.iter_modules(import_module(folder).__path__)}
    if stale := set(ignore) - present:
        raise InputError(
            f"`ignore` names {sorted(stale)}, which {folder} does not have: remove them there."
        )
    targeted = {
        method.module.removeprefix(f"{folder}.").partition(".")[0]
        for method in methods
        if method.module.startswith(f"{folder}.")
    }
    return sorted(name for name in present - targeted - set(ignore) if not name.startswith("_"))
