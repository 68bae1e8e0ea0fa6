"""Recipes: YAML files read strictly into frozen dataclasses.

Nothing is guessed or ignored: an unknown, missing or repeated key, a value of another type, or
one the dataclass itself refuses is an error that names the place, like `stages[2].lr`.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from prune_core.errors import RecipeError, did_you_mean

T = TypeVar("T")

_SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def load_recipe(path: str | os.PathLike[str], cls: type[T]) -> T:
    """Read one YAML file into the dataclass `cls`; only plain data is ever built from it.

    Raises RecipeError, which names the file, for everything `parse_recipe` refuses and for a
    file that is absent, empty, not YAML, or repeats a key.
    """
    try:
        content = _load_yaml(Path(path).read_bytes())
        if content is None:
            raise RecipeError(f"The file is empty: it must hold {_describe(cls)}.")
        return parse_recipe(content, cls)
    except OSError as error:
        raise RecipeError(
            f"Cannot read the recipe '{path}': {error.strerror}. Give the path of a YAML file."
        ) from error
    except RecipeError as error:
        raise RecipeError(f"In the recipe '{path}': {error}") from error


def parse_recipe(mapping: Mapping[str, Any], cls: type[T]) -> T:
    """Read a mapping, as a YAML file holds it, into the dataclass `cls`.

    Fields may be dataclasses, unions, list, tuple, dict, Literal, Path, bool, int, float, str,
    None and Any. A whole number is accepted for a float; true and false are never numbers.

    Raises RecipeError for a key that is unknown or missing and a value of another type, and in
    place of a ValueError from a dataclass's own `__post_init__`; TypeError for a field type that
    recipes do not support.
    """
    return cast(T, _read(mapping, cls, ""))


def _read(value: Any, kind: Any, path: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _read_dataclass(value, kind, path)
    if origin in (Union, UnionType):
        return _read_union(value, args, path)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_read(part, args[0], f"{path}[{i}]") for i, part in enumerate(value)]
    elif origin is tuple:
        if isinstance(value, list | tuple):
            if args[1:] == (...,):
                args = (args[0],) * len(value)
            if len(value) == len(args):
                parts = enumerate(zip(value, args, strict=True))
                return tuple(_read(part, item, f"{path}[{i}]") for i, (part, item) in parts)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {
                _read(key, args[0], f"a key of {path}"): _read(part, args[1], _join(path, key))
                for key, part in value.items()
            }
    elif kind not in _SCALARS:
        raise TypeError(f"Recipes do not support the type of '{path}', {kind}: try list[Any].")
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif isinstance(value, kind):
        return value
    elif kind is float and isinstance(value, int):
        return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    raise _wrong_type(value, kind, path)


def _read_dataclass(value: Any, cls: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, cls, path)
    kinds = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in value:
        if key not in known:
            raise RecipeError(f"Unknown key '{_join(path, key)}'. {did_you_mean(key, known)}")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(
                f"The required key '{_join(path, name)}' is missing: add it, "
                f"as {_describe(kinds[name])}."
            )
    arguments = {key: _read(part, kinds[key], _join(path, key)) for key, part in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise RecipeError(f"{path or 'The recipe'}: {error}") from error


def _read_union(value: Any, kinds: tuple[Any, ...], path: str) -> Any:
    if type(value) in kinds:  # so that 3 stays a whole number where `float | int` is allowed
        return value
    shape = _shape(type(value))
    errors = []
    for kind in kinds:
        if _shape(kind) == shape:
            try:
                return _read(value, kind, path)
            except RecipeError as error:
                errors.append(error)
    if not errors or shape == "scalar":
        raise _wrong_type(value, Union[kinds], path)  # noqa: UP007 (kinds is a tuple)
    # The value has the right outer shape, so what is wrong inside is the news.
    raise RecipeError(" Or: ".join(map(str, errors))) from errors[0]


def _shape(kind: Any) -> str:
    """Of a type, or of a value's type: which values may be meant for which arm of a union."""
    origin = get_origin(kind) or kind
    if is_dataclass(kind) or origin is dict:
        return "mapping"
    return "list" if origin in (list, tuple) else "scalar"


def _wrong_type(value: Any, kind: Any, path: str) -> RecipeError:
    return RecipeError(
        f"{path or 'The recipe'} must be {_describe(kind)}, "
        f"got {reprlib.repr(value)} ({type(value).__name__})."
    )


def _describe(kind: Any) -> str:
    """What is allowed, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return f"a mapping with the keys {', '.join(f.name for f in fields(kind) if f.init)}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple and args[1:] != (...,):
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    if origin in (list, tuple):
        return f"a list, each {_describe(args[0])}"
    if origin is dict:
        return f"a mapping of names, each {_describe(args[1])}"
    return _SCALARS.get(kind, "any value")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _load_yaml(content: bytes) -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """SafeLoader takes the last of two equal keys without a word; this one refuses them."""

        # Checked while composing: later, `<<` has mixed the merged keys with the node's own.
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    name, line = (key.tag, key.value), key.start_mark.line + 1
                    if name in seen:
                        raise RecipeError(
                            f"The key '{key.value}' is given twice, in lines {seen[name]} and "
                            f"{line}: remove one."
                        )
                    seen[name] = line
            return node

    # YAML 1.1 reads 1e-4 as text, because it has no dot; every learning rate would be refused.
    StrictLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        return yaml.load(content, Loader=StrictLoader)
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"The file is not plain YAML: {error}") from error
