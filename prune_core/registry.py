"""The table of methods of a package: data only, so that listing it imports nothing heavy.

The command line's list, the docs, the paper index and the contract tests are made from it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from prune_core.errors import InputError, RecipeError, unknown_name
from prune_core.recipe import parse_recipe


@dataclass(frozen=True)
class Method:
    """One row of a table: a published method and where its class is.

    name: the paper's short name in lower case, as users type it ("wanda").
    target: "module:Class"; the module is imported only when the method is asked for.
    family: the heading it is listed under.   paper: the title, or "baseline".
    year, arxiv: of the paper ("2306.11695"), None if it has none.
    needs: what must be there for it to run, in words ("torch, calibration text").
    cost: in model calls, in words ("one forward pass over the calibration text").

    Raises InputError for a name or a target of another shape.
    """

    name: str
    target: str
    _: KW_ONLY
    family: str
    paper: str
    year: int | None = None
    arxiv: str | None = None
    needs: str
    cost: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise InputError(
                f"A method's name must be lower-case letters, digits and underscores, "
                f"starting with a letter, got {self.name!r}: use the paper's short name."
            )
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.target):
            raise InputError(
                f"The target of method '{self.name}' must be 'module:Class', got {self.target!r}: "
                f"write it like 'data_prune.metrics.el2n:EL2N'."
            )

    @property
    def module(self) -> str:
        """The dotted name of the module that holds the class."""
        return self.target.partition(":")[0]

    @property
    def package(self) -> str:
        """The import package that holds the class."""
        return self.module.partition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        """All fields and the package, JSON-serialisable."""
        return {"package": self.package, **asdict(self)}


class Registry:
    """The methods of one kind in one package; iterating gives the rows in the table's order.

    package: the import package that holds every target ("rag_prune").
    kind: what one entry is called in an error ("context pruner").

    Raises InputError for a name given twice or a target outside the package.
    """

    def __init__(self, package: str, kind: str, methods: Iterable[Method]) -> None:
        self.package = package
        self.kind = kind
        self._rows: dict[str, Method] = {}
        for method in methods:
            if method.name in self._rows:
                raise InputError(
                    f"The {kind} '{method.name}' is in the table of {package} twice, as "
                    f"{self._rows[method.name].target!r} and {method.target!r}: rename one."
                )
            if method.package != package:
                raise InputError(
                    f"The target of the {kind} '{method.name}' must be in the package "
                    f"'{package}', got {method.target!r}: list it in its own package's table."
                )
            self._rows[method.name] = method

    def __iter__(self) -> Iterator[Method]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def names(self) -> tuple[str, ...]:
        """The methods' names, in the table's order."""
        return tuple(self._rows)

    def row(self, name: str) -> Method:
        """The row called `name`; raises UnknownName, with a suggestion, if there is none."""
        if name not in self._rows:
            raise unknown_name(self.kind, name, self._rows)
        return self._rows[name]

    def get(self, name: str) -> type[Any]:
        """The class called `name`, imported now; raises UnknownName if there is none."""
        method = self.row(name)
        found: type[Any] = getattr(
            importlib.import_module(method.module), method.target.partition(":")[2]
        )
        return found

    def build(self, name: str, settings: Mapping[str, Any]) -> Any:
        """The class called `name` with these settings, read strictly as a recipe's are.

        Raises UnknownName for the name, RecipeError for a setting that is unknown or of another
        type, and InputError, in the class's own words, for one that it refuses.
        """
        try:
            return parse_recipe(settings, self.get(name))
        except RecipeError as error:
            # The method's own words need no recipe around them.
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise
