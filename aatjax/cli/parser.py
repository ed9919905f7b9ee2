"""Runs tyro on the arguments of a command; its errors in one line."""

import contextlib
import io
import itertools
import os
import re
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from aatjax.errors import UsageError, suggest

MARKERS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
    tyro.conf.HelptextFromCommentsOff,
)


NOT_A_PAIR = "is not NAME=VALUE with a NAME of "
NAMED = tyro.constructors.ConstructorRegistry()
"""How the values of flags are read that tyro reads otherwise."""


@NAMED.primitive_rule
def read_pairs(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict[str, str]] | None:
    """Read a dictionary whose keys are known as `train=a.csv test=b.csv`; a rule for tyro."""
    if info.type_origin is not dict:
        return None
    names = typing.get_args(typing.get_args(info.type)[0])

    def read(arguments: list[str]) -> dict[str, str]:
        pairs = [argument.partition("=") for argument in arguments]
        for (name, _, value), argument in zip(pairs, arguments, strict=True):
            if name not in names or not value:
                raise ValueError(f"{argument!r} {NOT_A_PAIR}{'|'.join(names)}")
        return {name: value for name, _, value in pairs}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{'|'.join(names)}=...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={text}" for name, text in value.items()],
    )


def parse(target: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """Run tyro; its boxed errors become a UsageError."""
    errors = io.StringIO()
    columns = os.environ.get("COLUMNS")
    markers = () if "default" in options else MARKERS
    if not {"-h", "--help"} & set(arguments):
        os.environ["COLUMNS"] = "1000"  # no line breaks inside a message
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                target, args=arguments, prog=prog, config=markers, registry=NAMED, **options
            )
    except SystemExit as end:
        if not errors.getvalue():
            raise
        see = "--flags" if "default" in options else "--help"
        raise UsageError(f"{_join_lines(errors.getvalue())}; see {prog} {see}") from end
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _join_lines(box: str) -> str:
    """The text of one of tyro's error boxes as one line, the help of flags left out."""
    lines = [line[2:].rstrip(" │|") for line in box.splitlines()[1:-1]]
    message = ""
    for ruled, group in itertools.groupby(lines, lambda line: not line.strip("─-")):
        if ruled:
            continue
        head, *rest = group
        names = [line.strip() for line in rest if line[:5].count(" ") == 4]
        if head.startswith("For full helptext"):
            break
        if head.startswith("Perhaps you meant"):
            message += f", did you mean {names[0].split()[0]!r}?"
        elif head.startswith("Argument helptext"):
            message += f" ({names[0]})"
        elif head.startswith("Missing from"):
            message += f"required: {', '.join(names)}"
        else:
            message += " ".join([head, *(line.strip() for line in rest)]).replace("  ", " ")
    pair = re.match(rf"Error parsing ([\w.-]+): .*?('[^']*' {NOT_A_PAIR}\S+)", message)
    if pair:
        message = f"{pair[1]} {pair[2]}"
    choice = re.match(r"[Ii]nvalid choice '(.*)' for argument '([^']*)'.*?\((.*)\)", message)
    if choice:
        known = sorted(set(re.findall(r"'([^']*)'", choice[3])) - {"None"})
        hint = suggest(choice[1], known) or f": one of {', '.join(known)}"
        message = f"{choice[2]} {choice[1]!r}: no such choice{hint}"
    union = re.match(
        r"[Ee]rror parsing (--\S+): no type matching (\{\S+) could be .*? from \[('[^']*')\]",
        message,
    )
    if union:
        return f"{union[1]} {union[3]} is not one of {union[2]}"
    number = re.match(
        r"[Ee]rror parsing (--\S+): .*?(literal for int|string to float).*?: ('[^']*')", message
    )
    if number:
        kind = "a whole number" if "int" in number[2] else "a number"
        message = f"{number[1]} {number[3]} is not {kind}"
    field = re.match(r"Error parsing [\w.-]+: ([\w.]+)=", message)  # a range was exceeded
    if field:
        message = f"--{field[1].replace('_', '-')} {message[field.end() :]}"
    part = re.match(r"[Ee]rror parsing (\w+): \w+ (\w+)=", message)  # of a part of the config
    if part:
        message = f"--{part[1]}.{part[2].replace('_', '-')} {message[part.end() :]}"
    return message[:1].lower() + message[1:].replace(". Expected 1 values.", "").rstrip(".")
