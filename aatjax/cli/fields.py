"""Fields of a config as flags: `--optim.lr 1e-3`, and short forms of the most used."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from aatjax.cli.parser import parse
from aatjax.errors import UsageError, suggest

SHORT = {
    "--base": "--model.source",
    "--batch-size": "--training.batch-size",
    "--data": "--data.path",
    "--deterministic": "--training.deterministic",
    "--epochs": "--training.epochs",
    "--frames": "--model.frames",
    "--kernels": "--training.kernels",
    "--lr": "--optim.lr",
    "--profile": "--training.profile",
    "--seed": "--training.seed",
}
"""Short forms of fields, where a command has no flag of that name."""


def split_fields(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the fields of the config, with their values, from a command's own arguments.

    Args:
        arguments: of the command.
        own: the command's flags.

    Returns:
        The command's own arguments, and the flags of fields; short forms are written out.

    Raises:
        UsageError: an unknown flag that is no field of a config.
    """
    rest: list[str] = []
    fields: list[str] = []
    target = rest
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        if flag.startswith("--"):
            target = rest if flag in (*own, "--help", "--") else fields
            if target is fields and flag in SHORT:
                argument = SHORT[flag] + has_value + value
            elif target is fields and "." not in flag and flag != "--name":
                hint = suggest(flag, [*own, *SHORT], 0.7)
                raise UsageError(f"unknown flag {flag!r}{hint or '; --help lists them'}")
        target.append(argument)
        if flag.startswith("--") and (has_value or flag.rpartition(".")[2].startswith("no-")):
            target = rest  # the flag has all of its values
    return rest, fields


def select_fields(fields: Sequence[str], *parts: str) -> list[str]:
    """Return the flags of some parts of the config, such as `data`, with their values."""
    chosen: list[str] = []
    take = False
    for argument in fields:
        if argument.startswith("--"):
            take = argument[2:].partition(".")[0] in parts
        chosen += [argument] if take else []
    return chosen


def keep_data(fields: Sequence[str]) -> list[str]:
    """Return the flags, which must all be of the config's data.

    Raises:
        UsageError: one is of another part, which the command does not read.
    """
    for flag in fields:
        if flag.startswith("--") and not flag.startswith("--data."):
            raise UsageError(f"{flag.partition('=')[0]} is of no use here: nothing is trained")
    return list(fields)


def replace_fields(config: Any, fields: Sequence[str], prog: str) -> Any:
    """Return the config with fields replaced by flags such as `--optim.lr 1e-3`.

    Raises:
        UsageError: an unknown field or a wrong value.
    """
    from aatjax.petl.sizes import SIZES

    given = {field.partition("=")[0] for field in fields}
    known = ["--help", *list_flags(config)]
    for flag in fields:
        name = flag.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise UsageError(f"unknown flag {name!r}{_explain_unknown(name, known, config)}")
    if sizes := [s for s in SIZES if f"--petl.{s}" in given and hasattr(config.petl, s)]:
        petl = config.petl.replace(**dict.fromkeys(sizes))  # omits the size in the config
        config = dataclasses.replace(config, petl=petl)
    return parse(
        tyro.conf.AvoidSubcommands[type(config)],
        fields,
        default=config,
        prog=prog,
        description="Every field of the config as a flag.",
    )


def list_flags(config: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass's fields, those inside its fields too; no-... of truth values."""
    for field in dataclasses.fields(config):
        name, value = field.name.replace("_", "-"), getattr(config, field.name)
        items = value if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            yield from list_flags(value, f"{prefix}{name}.")
        elif items and all(map(dataclasses.is_dataclass, items)):
            for number, item in enumerate(items):
                yield from list_flags(item, f"{prefix}{name}.{number}.")
        else:
            yield f"{prefix}{name}"
            if isinstance(value, bool):
                yield f"{prefix}no-{name}"


def _explain_unknown(flag: str, known: Sequence[str], config: Any) -> str:
    """What to give in place of a flag that is no field: the same word elsewhere, or a near one."""
    last = flag.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    if same:
        return f", did you mean {same[0]!r}?"
    if flag.startswith("--petl."):
        from aatjax.petl import METHODS

        field = last.removeprefix("no-").replace("-", "_")
        named = [
            m.name for m in METHODS.values() if field in {f.name for f in dataclasses.fields(m)}
        ]
        if named:
            return (
                f": the method {config.petl.name!r} has none; --method {named[0]}"
                f"{' (or ' + ', '.join(named[1:]) + ')' if named[1:] else ''} has"
            )
    return suggest(flag, known) or "; --flags lists them"
