"""Errors that a user can cause or meet, each with its exit code; checks of dataclass fields."""

import dataclasses
import difflib
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal


def printable(text: str | os.PathLike[str]) -> str:
    """Return text for one line of a terminal or page, with what does not print escaped.

    That is controls (escape sequences of terminals), marks that turn the order of the text around
    or have no width, and bytes of a broken encoding.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in os.fspath(text))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _make_line(message: str, most: int = 4000) -> str:
    line = printable(message)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def format_count(number: int, noun: str) -> str:
    """Return a number and its noun in singular or plural: `1 clip`, `1,200 clips`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `, did you mean 'x'?` with the nearest of the known words, or '' if none is near.

    Capitals and punctuation do not count: ESC-50 is near esc50.
    """

    def simplify(name: str) -> str:
        return re.sub(r"[\W_]", "", name).lower()

    names = {simplify(name): name for name in known}
    near = difflib.get_close_matches(simplify(word), names, n=1, cutoff=cutoff)
    found = names[near[0]] if near else word
    return f", did you mean {found!r}?" if found != word else ""


class AatjaxError(Exception):
    """Base of every error that is explained to the user in one line.

    The message says what was wrong, where (file, row, parameter), and what to do. It is one line:
    what it quotes of a file is escaped where it cannot be printed, and a very long one is cut.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(_make_line(one) if isinstance(one, str) else one for one in args))


class UsageError(AatjaxError, ValueError):
    """Wrong usage or configuration."""

    exit_code = 2


class NotFiniteError(AatjaxError, ArithmeticError):
    """Training met a loss or a weight that is not finite."""

    exit_code = 3


class DataError(AatjaxError, ValueError):
    """Input data (audio, manifest, weights, artefact) that cannot be used as it is."""

    exit_code = 65


class UnavailableError(AatjaxError, OSError):
    """A host or service that cannot be reached."""

    exit_code = 69


class ProgramError(AatjaxError):
    """An error of this program, whose traceback was written to a file."""

    exit_code = 70


class OutOfMemoryError(AatjaxError, MemoryError):
    """The model and its batch do not fit the device."""

    exit_code = 71

    @classmethod
    def explain(
        cls, text: str, advice: str = "take a smaller batch or a smaller model"
    ) -> "OutOfMemoryError":
        """Return the error for what XLA or Python said (`RESOURCE_EXHAUSTED: ...`)."""
        details = text.rpartition("RESOURCE_EXHAUSTED:")[2].strip().splitlines() or ["no details"]
        return cls(f"out of memory: {details[0][:300]}; {advice}")


class WriteError(AatjaxError, OSError):
    """Something could not be written."""

    exit_code = 74


class DryRun(AatjaxError):
    """Everything was checked, and the work was not begun, as asked."""

    exit_code = 0


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed values of a number, as part of an annotation: `Annotated[int, Range(1)]`.

    Attributes:
        low: least value.
        high: greatest value.
        above: lower bound that is excluded.
        below: upper bound that is excluded.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = [f"at least {self.low}", f"above {self.above}"]
        bounds += [f"at most {self.high}", f"below {self.below}"]
        return " and ".join(bound for bound in bounds if not bound.endswith("None"))


Seed = Annotated[int, Range(0, 2**32 - 1)]
"""Type of a seed of random numbers, as numpy and JAX take it."""


def check_kind(
    what: str, value: object, kinds: type | types.UnionType | tuple[type, ...], advice: str
) -> None:
    """Refuse an argument of another type.

    Args:
        what: function and argument.
        value: what was given.
        kinds: the types that are taken.
        advice: what to give.

    Raises:
        UsageError: `evaluate: source is a str: give data.Arrays(X, y, classes)`.
    """
    if not isinstance(value, kinds):
        raise UsageError(f"{what} is {_name_kind(value)}: {advice}")


def check_names(what: str, value: object) -> None:
    """Refuse a string, or what is no sequence, in place of several names.

    Raises:
        UsageError: `Classifier: classes is a str: give a list of names`.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{what} is {_name_kind(value)}: give a list of names")


def _name_kind(value: object) -> str:
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return "None" if value is None else f"{article} {name}"


def check_fields(config: Any, prefix: str | None = None) -> None:
    """Check the fields of a dataclass against their annotations; for its `__post_init__`.

        @dataclasses.dataclass(frozen=True)
        class Mixup:
            prob: Annotated[float, Range(0, 1)] = 0.5
            alpha: Annotated[float, Range(above=0)] = 10.0
            every: Annotated[int, Range(1)] | None = None
            domain: Literal["wave", "features"] = "wave"

            def __post_init__(self) -> None:
                check_fields(self)

    A field with a `Range` must hold a finite number inside it, whole where the annotation says
    int; of a tuple, every item must. A field of `Literal` strings must hold one of them. None is
    accepted where the annotation has it. Fields with neither are not checked.

    Args:
        config: an instance of a dataclass.
        prefix: text before the name of the field in a message; the class name by default.

    Raises:
        UsageError: a field does not fit: `Mixup every=0 must be at least 1`.
    """
    prefix = f"{type(config).__name__} " if prefix is None else prefix
    for name, parts in _field_parts(type(config)).items():
        _check_value(f"{prefix}{name}=", getattr(config, name), parts)


def check_value(what: str, value: object, hint: object) -> None:
    """Check one value against its annotation, as `check_fields` does.

    Args:
        what: text before the value in a message, such as `--per-device `.
        value: what was given.
        hint: the annotation.

    Raises:
        UsageError: it does not fit: `--per-device 0 must be at least 1`.
    """
    _check_value(what, value, tuple(_split(hint)))


def _check_value(what: str, value: Any, parts: tuple[Any, ...]) -> None:
    choices = [part for part in parts if isinstance(part, str)]
    ranges = [part for part in parts if isinstance(part, Range)]
    if (value is None and type(None) in parts) or (isinstance(value, str) and value in choices):
        return
    if ranges:
        whole = int in parts and float not in parts
        items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        for item in items:
            is_number = _is_number(item, whole)
            if not is_number or item not in ranges[0]:
                kind = "" if is_number else "a whole number" if whole else "a finite number"
                expected = ", ".join(filter(None, (kind, str(ranges[0]))))
                raise UsageError(f"{what}{value!r} must be {expected}")
    elif choices and not {str, int} & set(parts):
        raise UsageError(f"{what}{value!r} is not one of {', '.join(choices)}")


def _is_number(value: Any, whole: bool) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return isinstance(value, numbers.Integral) or math.isfinite(value)  # int may exceed any float


@functools.cache
def _field_parts(cls: type) -> dict[str, tuple[Any, ...]]:
    """What the annotation of each field consists of: types, `Range`s, strings of `Literal`s."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: tuple(_split(hints[field.name])) for field in dataclasses.fields(cls)}


def _split(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin is Literal:
        yield from typing.get_args(hint)
    elif origin in (Annotated, typing.Union, types.UnionType, tuple):
        for part in typing.get_args(hint):
            yield from _split(part)
    else:
        yield hint
