"""JSON objects that become dataclasses: their names, types and sizes, checked by annotation."""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from aatjax.errors import UsageError, printable, suggest

T = TypeVar("T")
_SHOWN = 60  # characters of a value in a message


def check_json_fields(
    where: str, fields: Any, cls: type[Any], *, most: Mapping[str, float] | None = None
) -> None:
    """Refuse what no dataclass of a class can be made of, before one is made.

    Whole numbers count as floats; truth values are no numbers; numbers are finite; lists become
    tuples, and have the length that the annotation gives. A field that is itself a dataclass must
    be an object; what is in it is not checked.

    Args:
        where: name of the object, for the message.
        fields: the JSON value.
        cls: the dataclass.
        most: the largest number, or the longest list or text, of a field.

    Raises:
        UsageError: `model.depth=1.5 is not of type int`.
    """
    if not isinstance(fields, dict):
        raise UsageError(f"{where}={shorten(fields)} is not an object with fields")
    hints = _find_hints(cls)
    for name, value in fields.items():
        if name not in hints:
            hint = suggest(str(name), hints) or f" (there are {', '.join(hints)})"
            raise UsageError(f"{where} has no field {shorten(name)}{hint}")
        if not _fits(value, hints[name]):
            kind = str(hints[name]) if typing.get_args(hints[name]) else hints[name].__name__
            raise UsageError(
                f"{where}.{name}={shorten(value)} is not of type {kind.replace('typing.', '')}"
            )
        if most is not None and name in most:
            _check_most(f"{where}.{name}", value, most[name])


def read_json_fields(
    where: str,
    fields: Any,
    cls: type[T],
    *,
    most: Mapping[str, float] | None = None,
    ignore_others: bool = False,
) -> T:
    """Make a dataclass of a JSON object, lists as tuples; its own checks follow.

    Args:
        where, fields, cls, most: see `check_json_fields`.
        ignore_others: leave fields out that the dataclass does not have.

    Raises:
        UsageError: a field is missing, unknown or does not fit: `row.at is missing`.
    """
    known = _find_hints(cls)
    if ignore_others and isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if name in known}
    check_json_fields(where, fields, cls, most=most)
    for field in dataclasses.fields(cast(Any, cls)):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise UsageError(f"{where}.{field.name} is missing")
    return cls(**{name: _make_tuple(value) for name, value in fields.items()})


def _make_tuple(value: Any) -> Any:
    return tuple(map(_make_tuple, value)) if isinstance(value, list) else value


def shorten(value: Any) -> str:
    """Return a value as it is shown in a message: on one line, and cut where it is long."""
    text = printable(repr(value)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_most(name: str, value: Any, most: float) -> None:
    if isinstance(value, str | list) and len(value) > most:
        raise UsageError(f"{name} has {len(value)} entries, at most {most:g} are read")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int | float) and item > most:
            raise UsageError(f"{name}={shorten(value)} must be at most {most:g}")


@functools.cache
def _find_hints(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value is of a field's type; other types than those of JSON pass."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is tuple:  # JSON has no tuples
        if not isinstance(value, list | tuple):
            return False
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, options[0]) and _fits(item, options[1]) for key, item in value.items()
        )
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict | typing.cast(type, hint))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return not isinstance(hint, type) or isinstance(value, hint)
