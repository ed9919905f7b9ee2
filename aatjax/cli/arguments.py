"""What the verbs share: their arguments, one-line complaints, tables."""

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from aatjax.cli.commands import VERBS
from aatjax.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        wrong = next((w for w in message.split() if w.startswith("--")), None)
        hint = "" if wrong is None else nearest(wrong, list(self._option_string_actions))
        raise UsageError(f"{message}{hint}; see {self.prog} --help")


def parser_of(verb: str) -> argparse.ArgumentParser:
    return Parser(prog=f"aatjax {verb}", description=VERBS[verb], allow_abbrev=False)


def nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean ...?` where one of the known words is near."""
    import difflib

    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near and near[0] != word else ""


def config_of(
    verb: str,
    arguments: list[str],
    text: str,
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Any, argparse.Namespace]:
    """CONFIG, the flags of the verb, and every other flag as a field of the config.

    Args:
        verb: for the messages.
        arguments: of the command line.
        text: of `--help`, with places for `{configs}` and `{methods}`.
        flags: adds the verb's own flags to the parser.
    """
    import textwrap

    from aatjax.config import list_configs, load_config
    from aatjax.petl import METHODS

    if any(a in ("-h", "--help") for a in arguments):
        indent = " " * 21
        names = ", ".join(sorted(METHODS.keys() - {"combined"}))
        methods = textwrap.fill(names, 98, initial_indent=indent, subsequent_indent=indent)
        print(
            text.format(
                methods=methods,
                configs=", ".join([*list_configs(), "and those of `aatjax recipes`"]),
            )
        )
        raise SystemExit(0)
    parser = Parser(prog=f"aatjax {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--flags", action="store_true")
    flags(parser)
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, fields = parser.parse_known_args(arguments[1 if name else 0 :])
    for field in fields:
        hint = nearest(field, list(parser._option_string_actions))
        if field.startswith("--") and "." not in field and hint:
            raise UsageError(f"unknown flag {field!r}{hint}")
    config = load_config(name or "default")
    if options.method:
        config = config.with_method(options.method)
    if options.flags:
        fields = ["--help"]
    config = with_fields(config, fields, f"aatjax {verb} {name or 'default'}")
    return config, options


def with_fields(config: Any, fields: list[str], prog: str) -> Any:
    """The config with fields replaced by flags such as `--optim.lr 1e-3`.

    Raises:
        UsageError: an unknown field or a wrong value.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                tyro.conf.AvoidSubcommands[type(config)],
                default=config,
                args=fields,
                prog=prog,
                description="Every field of the config as a flag.",
            )
    except SystemExit as end:
        if not said.getvalue():
            raise
        raise UsageError(unbox(said.getvalue())) from end
    return config


def unbox(text: str) -> str:
    """What tyro says of a wrong flag in a box of several lines, as one line."""
    inside = (line.strip(" │") for line in text.splitlines()[1:])  # the first is a title
    words = (line for line in inside if line.strip("─-╰╯"))
    return " ".join(words).partition(" For full helptext")[0]


def with_interval(headline: tuple[str, float | None, float | None, float | None] | None) -> str:
    if headline is None or headline[1] is None:
        return "n/a"
    _, value, low, high = headline
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{bounds}"


def text_table(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    ]
    return "\n".join(lines)
