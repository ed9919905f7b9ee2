"""Arguments of the commands, parsed by tyro; errors in one line."""

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from aatjax.cli.fields import keep_data, replace_fields, split_fields
from aatjax.cli.parser import parse
from aatjax.errors import DataError, Range, UsageError, check_value, printable, suggest

if TYPE_CHECKING:
    from aatjax.config import Config, Data

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
        if self.method is not None:
            config = config.with_method(self.method)
        fields = ["--help"] if self.flags else fields
        return replace_fields(config, fields, f"aatjax {command} {self.config}")


@dataclasses.dataclass(frozen=True)
class SoundsChoice:
    """Labelled sounds.

    Attributes:
        path: a folder of class folders, a CSV or JSON-lines file, ...; or several files, such as
            train=train.csv test=test.csv; --data.format and other flags of a config's data say
            how it is read
    """

    path: Positional[tuple[str, ...]]

    def load(self, config: "Config", fields: Sequence[str]) -> "Config":
        """Return the config with these sounds, and with the fields replaced.

        Raises:
            UsageError: several paths without their parts, or a wrong field.
            DataError: a path is not there.
        """
        if len(self.path) > 1 and not all("=" in path for path in self.path):
            raise UsageError("several paths: name the part of each, train=a.csv test=b.csv")
        for path in self.path:
            name = path.partition("=")[2] if len(self.path) > 1 else path
            if not os.path.lexists(path) and not os.path.lexists(os.path.expanduser(name)):
                raise DataError(f"{printable(path)}: no such file or folder")
        return replace_fields(config, ["--data.path", *self.path, *fields], "aatjax train")


@dataclasses.dataclass(frozen=True)
class OtherSoundsChoice:
    """Labelled sounds other than those of the run.

    Attributes:
        path: a folder of class folders, a CSV or JSON-lines file, ... (default: the test clips of
            the run that wrote the adapter); flags of a config's data say how it is read
    """

    path: Positional[tuple[str, ...]] = ()

    def load(self, fields: Sequence[str]) -> "Data | None":
        """Return the sounds, or None for those of the run.

        Raises:
            UsageError: fields without sounds, or as of `SoundsChoice.load`.
        """
        from aatjax.config import Config
        from aatjax.petl.simple import Linear

        if self.path:
            return SoundsChoice(self.path).load(Config(petl=Linear()), keep_data(fields)).data
        if fields:
            raise UsageError(f"{fields[0]} says how sounds are read: name the sounds too")
        return None


SoundsArguments = Annotated[SoundsChoice, tyro.conf.OmitArgPrefixes]
OtherSounds = Annotated[OtherSoundsChoice, tyro.conf.OmitArgPrefixes]
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
        own, _ = list_own_flags(function)
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
    bound = parse(call, arguments, prog=prog, description=description)
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


def list_own_flags(function: Callable[..., None]) -> tuple[list[str], bool]:
    """The flags of a command without the fields of a config, and whether it takes these too."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    names = [name.strip("_") for name, _ in _list_arguments(signature, hints)]
    own = [f"--{name.replace('_', '-')}" for name in names if name not in ("fields", "command")]
    return own, "fields" in signature.parameters


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
