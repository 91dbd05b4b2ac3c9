"""Reads JSON fields into dataclasses by their annotations, and names the field that is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union

from .files import parse_fields, read_text
from .privacy import without_secrets
from .text import printable

T = TypeVar("T")
NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


class Record:
    """A dataclass that is a JSON file: an object with the field "format" and those of the class.

    A field whose default is None is left out of the file while it is None.
    """

    FORMAT: ClassVar[str]
    WHAT: ClassVar[str]  # in words, for messages: "a training run"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"format": self.FORMAT, **without_missing_parts(self)}

    def to_json(self) -> str:
        """The text of the file, without secrets."""
        return json.dumps(without_secrets(self.to_dict()), indent=2) + "\n"

    def cleaned(self) -> Self:
        """The record without secrets, for what is written of it elsewhere."""
        return self.from_dict(without_secrets(self.to_dict()), self.WHAT)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> Self:
        """Take the fields of a JSON object; `where` names it in errors.

        Raises:
            ValueError: another format, or a field that is missing, unknown or of another type, by its name.
        """
        if fields.get("format") != cls.FORMAT:
            found = printable(fields.get("format"), 40)
            raise ValueError(f'{where} is no record of {cls.WHAT}: its "format" is {found}, expected "{cls.FORMAT}".')
        return read(cls, {name: value for name, value in fields.items() if name != "format"}, where)

    @classmethod
    def from_json(cls, text: str, where: str | None = None) -> Self:
        """Read the text of a file; `where` names the file in errors.

        Raises:
            ValueError: not JSON, or as `from_dict`.
        """
        where = where or f"the record of {cls.WHAT}"
        return cls.from_dict(parse_fields(text, where), where)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a file, which may come from a stranger.

        Raises:
            ValueError: not there, or as `from_json`.
        """
        return cls.from_json(read_text(path), str(path))


def without_missing_parts(value: Any) -> Any:
    """A dataclass as JSON values, without the optional fields that are None."""
    if dataclasses.is_dataclass(value):
        pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {f.name: without_missing_parts(v) for f, v in pairs if not (v is None and f.default is None)}
    if isinstance(value, Mapping):
        return {name: without_missing_parts(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_missing_parts(item) for item in value]
    return value


def read(kind: type[T] | Any, value: Any, where: str, name: str = "") -> Any:
    """`value`, parsed JSON, as `kind`: a dataclass, a list, a dict, a union, or a plain type.

    Args:
        where: the file.
        name: of the field in it, dotted.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message names it.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: float
    ...     tags: list[str] | None = None
    >>> read(Point, {"x": 1}, "point.json")
    Point(x=1, tags=None)
    >>> read(Point, {"x": 1, "tags": ["a", 2]}, "point.json")
    Traceback (most recent call last):
    ValueError: point.json: tags[1] is 2, expected text
    """
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where, name)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(kind, value, where, name)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(kind, value, where, name)
        return value
    if origin is list and isinstance(value, list):
        items = enumerate(value)
        return [read(arguments[0], item, where, f"{name}[{i}]") for i, item in items] if arguments else value
    if origin is dict and isinstance(value, dict):
        return {key: read(arguments[1], item, where, f"{name}.{key}") for key, item in value.items()}
    accepted = (int, float) if origin is float else (origin,)
    if origin in (list, dict) or not isinstance(value, accepted) or (isinstance(value, bool) and origin is not bool):
        raise _wrong(kind, value, where, name)
    return value


def _read_dataclass(kind: type[T], value: Any, where: str, name: str) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {printable(name)} is {printable(value, 60)}, expected an object")
    prefix, hints = f"{name}." if name else "", typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(value.keys() - fields.keys()):
        known = ", ".join(itertools.islice(fields, 8)) + (", ..." if len(fields) > 8 else "")
        raise ValueError(f"{where}: {printable(prefix)}{printable(unknown[0], 60)} is not known; expected {known}")
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise ValueError(
                f"{where}: {printable(prefix)}{field.name} is missing, expected {_describe(hints[field.name])}"
            )
    return kind(**{key: read(hints[key], item, where, prefix + key) for key, item in value.items()})


def _wrong(kind: Any, value: Any, where: str, name: str) -> ValueError:
    # Made where it is raised: kept in a variable, it and its traceback would be a cycle that keeps the callers' models.
    return ValueError(f"{where}: {printable(name)} is {printable(value, 60)}, expected {_describe(kind)}")


def _read_union(union: Any, value: Any, where: str, name: str) -> Any:
    kinds = typing.get_args(union)
    for kind in kinds:
        # An object or a list can only be meant as the one option of that kind, whose own error says more.
        if (isinstance(value, dict) and (kind is dict or dataclasses.is_dataclass(kind))) or (
            isinstance(value, (dict, list)) and typing.get_origin(kind) is type(value)
        ):
            return read(kind, value, where, name)
    for kind in kinds:
        try:
            return read(kind, value, where, name)
        except ValueError:
            continue
    raise _wrong(union, value, where, name)


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0])}" if arguments else "a list"
    return NAMES.get(origin, "an object")
