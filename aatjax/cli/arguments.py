"""Arguments of the commands, parsed by tyro; errors in one line."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from aatjax.errors import Range, UsageError, check_value, suggest

if TYPE_CHECKING:
    from aatjax.config import Config

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


NO_HINT = tyro.conf.arg(help_behavior_hint="")  # no "(default: None)" in the help
T = TypeVar("T")
Unset = Annotated[T | None, NO_HINT]
"""Type of an optional flag in a dataclass of flags; parameters of functions need none."""
Switch = Annotated[bool, NO_HINT]
"""Type of a flag without a value in a dataclass of flags."""


Count = Annotated[int, Range(1)]
Frames = Annotated[int, Range(1, 10**6)]
Port = Annotated[int, Range(0, 65535)]


@dataclasses.dataclass(frozen=True)
class ConfigChoice:
    """The experiment.

    Attributes:
        config: name of a config (default, folder, esc, one of `aatjax recipes`), or a .py or .json
            file; every field of it is a flag, such as --optim.lr 1e-3
        method: another adaptation method: a row of `aatjax methods`, a method at its defaults, or
            several joined by +
        flags: list every field of the config as a flag and exit
    """

    config: Positional[str] = "default"
    method: Unset[str] = None
    flags: Switch = False

    def load(self, command: str, fields: Sequence[str]) -> "Config":
        """Return the config with the method and the fields replaced."""
        from aatjax.config import load_config

        config = load_config(self.config)
        if self.method:
            config = config.with_method(self.method)
        fields = ["--help"] if self.flags else fields
        return replace_fields(config, fields, f"aatjax {command} {self.config}")


@dataclasses.dataclass(frozen=True)
class SoundsChoice:
    """Labelled sounds.

    Attributes:
        path: a folder of class folders, a CSV or JSON-lines file, ...; or several files, such as
            train=train.csv test=test.csv
        format: how PATH is read, as --data.format of `aatjax train`
        pattern: regular expression for --format names
    """

    path: Positional[tuple[str, ...]]
    format: str = "auto"
    pattern: Unset[str] = None

    def load(self, config: "Config", fields: Sequence[str]) -> "Config":
        """Return the config with these sounds, and with the fields replaced.

        Raises:
            UsageError: an unknown format, several paths without their parts, or a wrong field.
        """
        from aatjax.data.formats import SourceFormat

        known = typing.get_args(SourceFormat)
        if self.format not in known:
            hint = suggest(self.format, known) or f": one of {', '.join(known)}"
            raise UsageError(f"unknown data format {self.format!r}{hint}")
        if len(self.path) > 1 and not all("=" in path for path in self.path):
            raise UsageError("several paths: name the part of each, train=a.csv test=b.csv")
        given = ["--data.path", *self.path, "--data.format", self.format]
        given += ["--data.pattern", self.pattern] if self.pattern else []
        return replace_fields(config, [*given, *fields], "aatjax train")


SoundsArguments = Annotated[SoundsChoice, tyro.conf.OmitArgPrefixes]
ConfigArguments = Annotated[ConfigChoice, tyro.conf.OmitArgPrefixes]


def bind(
    function: Callable[..., None], arguments: Sequence[str], prog: str, description: str
) -> Callable[[], None]:
    """Parse the arguments of a command; the result runs it.

    A command is a typed function: its parameters are its arguments, those after `*` its flags, its
    docstring their help. A parameter `fields` takes every flag that is not the command's own, a
    parameter `command` the whole command line.

    Raises:
        UsageError: a wrong, unknown or missing argument.
        SystemExit: after `--help`.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    line = [*prog.split(), *arguments]
    more: dict[str, Any] = {}
    if "fields" in signature.parameters:
        own = [f"--{name.replace('_', '-')}" for name, _ in _list_arguments(signature, hints)]
        arguments, more["fields"] = split_fields(arguments, own)
    if "command" in signature.parameters:
        more["command"] = line
    for name, parameter in signature.parameters.items():
        if parameter.default in (None, False, ()):
            hints[name] = Annotated[hints[name], NO_HINT]
        if parameter.kind is not parameter.KEYWORD_ONLY and not _is_group(hints[name]):
            hints[name] = Positional[hints[name]]

    def call(*args: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **options, **more)

    call.__annotations__ = hints
    call.__doc__ = (inspect.getdoc(function) or "").replace("\n" + 8 * " ", " ")  # one line a flag
    typed = [
        p.replace(annotation=hints[n]) for n, p in signature.parameters.items() if n not in more
    ]
    call.__signature__ = signature.replace(parameters=typed)
    bound = _parse(call, arguments, prog=prog, description=description)
    values = dict(bound.keywords)
    for group in filter(dataclasses.is_dataclass, bound.keywords.values()):
        values |= vars(group)
        hints |= typing.get_type_hints(type(group), include_extras=True)
    for name in set(values) & set(hints):
        check_value(f"--{name.replace('_', '-')} ", values[name], hints[name])
    for name, required in _list_arguments(signature, hints):
        if required and values.get(name) == ():  # tyro lets a list be empty
            raise UsageError(f"required: {name.upper()}; see {prog} --help")
    return bound


def bind_kind(
    kinds: dict[str, Callable[..., None]], arguments: Sequence[str], prog: str, description: str
) -> Callable[[], None]:
    """Parse the arguments of a command that has several kinds; the first argument selects one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<9} {(f.__doc__ or '').splitlines()[0]}" for name, f in kinds.items()]
        usage = f"usage: {prog} {{{','.join(kinds)}}} ...\n\n{description.strip()}\n"
        print("\n".join([usage, *lines, f"\n{prog} KIND --help lists the flags of one"]))
        raise SystemExit(0)
    kind = arguments[0]
    if kind not in kinds:
        hint = suggest(kind, kinds, 0.7) or f" (there are {', '.join(kinds)})"
        raise UsageError(f"{prog} has no kind {kind!r}{hint}")
    return bind(
        kinds[kind], arguments[1:], f"{prog} {kind}", (kinds[kind].__doc__ or "").split("\n")[0]
    )


def _is_group(hint: Any) -> bool:
    """Whether a parameter is a dataclass of arguments and flags."""
    return dataclasses.is_dataclass(next(iter(typing.get_args(hint)), None))  # Annotated[it, ...]


def _list_arguments(
    signature: inspect.Signature, hints: dict[str, Any]
) -> Iterator[tuple[str, bool]]:
    """Names of a command's arguments, those in a dataclass too, and whether each is required."""
    for name, parameter in signature.parameters.items():
        if _is_group(hints[name]):
            for field in dataclasses.fields(typing.get_args(hints[name])[0]):
                yield field.name, field.default is dataclasses.MISSING
        else:
            yield name, parameter.default is parameter.empty


def split_fields(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the fields of the config, with their values, from a command's own arguments.

    Raises:
        UsageError: an unknown flag that looks like one of the command's own.
    """
    rest: list[str] = []
    fields: list[str] = []
    target = rest
    for argument in arguments:
        flag, has_value, _ = argument.partition("=")
        if flag.startswith("--"):
            target = rest if flag in (*own, "--help", "--") else fields
            if (
                target is fields
                and "." not in flag
                and (hint := suggest(flag.partition("=")[0], own, 0.7))
            ):
                raise UsageError(f"unknown flag {flag!r}{hint}")
        target.append(argument)
        if has_value or flag.rpartition(".")[2].startswith("no-"):
            target = rest
    return rest, fields


def select_fields(fields: Sequence[str], *parts: str) -> list[str]:
    """Return the flags of some parts of the config, such as `data`, with their values."""
    chosen: list[str] = []
    take = False
    for argument in fields:
        if argument.startswith("--"):
            take = argument[2:].partition(".")[0].removeprefix("no-") in parts
        chosen += [argument] if take else []
    return chosen


def replace_fields(config: Any, fields: Sequence[str], prog: str) -> Any:
    """Return the config with fields replaced by flags such as `--optim.lr 1e-3`.

    Raises:
        UsageError: an unknown field or a wrong value.
    """
    from aatjax.petl.sizes import SIZES

    given = {field.partition("=")[0] for field in fields}
    if sizes := [s for s in SIZES if f"--petl.{s}" in given and hasattr(config.petl, s)]:
        petl = config.petl.replace(**dict.fromkeys(sizes))  # omits the size in the config
        config = dataclasses.replace(config, petl=petl)
    return _parse(
        tyro.conf.AvoidSubcommands[type(config)],
        fields,
        default=config,
        prog=prog,
        description="Every field of the config as a flag.",
    )


def _parse(target: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
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
    field = re.match(r"Error parsing [\w.-]+: ([\w.]+)=", message)  # a range was exceeded
    if field:
        message = f"--{field[1].replace('_', '-')} {message[field.end() :]}"
    return message[:1].lower() + message[1:].replace(". Expected 1 values.", "").rstrip(".")
