"""The command line: `aatjax COMMAND ...`. Commands import what is heavy when they run."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from aatjax.cli.commands import COMMANDS
from aatjax.cli.failures import check_working_folder, explain
from aatjax.cli.spelling import spell_flags
from aatjax.cli.streams import discard_output, prepare_streams
from aatjax.errors import AatjaxError, DryRun, UsageError, WriteError, printable, suggest
from aatjax.io.host import prepare_process
from aatjax.io.progress import SHOWN_AFTER, StageBar
from aatjax.io.signals import catch_ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `aatjax` command; exits with the code of the error, if any."""
    if not prepare_streams():
        print("aatjax: standard output is closed: redirect it to a file", file=sys.stderr)
        sys.exit(WriteError.exit_code)
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except (BrokenPipeError, WriteError) as error:
        discard_output()
        code = code or _report(error)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; a user's mistake gives one line, no traceback."""
    given = arguments
    try:
        check_working_folder()
        while arguments[:1] == ["--import"]:
            if not arguments[1:]:
                raise UsageError("--import needs a Python file or the name of a module")
            import_own(arguments[1])
            arguments = arguments[2:]
        if arguments[:1] == ["help"] and arguments[1:]:
            arguments = [arguments[1], "--help"]
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(format_overview())
        elif arguments[0] in ("-V", "--version"):
            print(version("aatjax"))
        else:
            command = find_command(*arguments)
            _quiet_libraries()
            prepare_process()
            with catch_ends(), StageBar(quiet=_is_quiet(command), after=SHOWN_AFTER):
                command()
        return 0
    except SystemExit as end:  # --help, and commands whose exit code is a result
        return end.code if isinstance(end.code, int) else 2 * (end.code is not None)
    except KeyboardInterrupt:
        print("aatjax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _leave(_report(error, given))


def _report(error: Exception, arguments: Sequence[str] = ()) -> int:
    """Print what ended the command, in one line, and return its exit code."""
    if isinstance(error, BrokenPipeError):
        discard_output()
        return 141  # as after SIGPIPE: part of the output was lost
    said = explain(error, arguments)
    if isinstance(said, DryRun):
        print(said)
        return said.exit_code
    text = spell_flags(printable(" ".join(str(said).splitlines())))
    print(f"aatjax: {_name_process()}{text}", file=sys.stderr)
    return said.exit_code


def import_own(name: str) -> None:
    """Import a module of the user, by its name or as a file, which registers methods of its own.

    Raises:
        UsageError: there is none, or it cannot be run.
    """
    path = Path(name)
    folder = path.resolve().parent if path.suffix == ".py" else Path.cwd()
    module = path.stem if path.suffix == ".py" else name
    sys.path.insert(0, str(folder))
    try:
        import_module(module)
    except AatjaxError:
        raise
    except Exception as error:
        raise UsageError(f"--import {name}: {type(error).__name__}: {error}") from error


def find_command(name: str, *arguments: str) -> Callable[[], None]:
    """The command of a name, bound to its arguments.

    A file in `commands/` holds one: its function `main`, or the functions of its dictionary
    `KINDS` by the word that selects one.

    Raises:
        UsageError: no such command, or wrong arguments.
    """
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS) or f" (there are {', '.join(COMMANDS)})"
        raise UsageError(f"unknown command {name!r}{hint}")
    from aatjax.cli.arguments import bind, bind_kind

    module = import_module(f"aatjax.cli.commands.{name}")
    kinds = getattr(module, "KINDS", None)
    if kinds is not None:
        return bind_kind(kinds, arguments, f"aatjax {name}", module.__doc__ or "")
    return bind(module.main, arguments, f"aatjax {name}", module.__doc__ or "")


def _name_process() -> str:
    """Return the name of this process with a colon where it is one of several; else nothing."""
    distributed = sys.modules.get("aatjax.train.distributed")
    return "" if distributed is None else distributed.name_process()


def _is_quiet(command: Callable[[], None]) -> bool:
    """Whether a bound command was given --quiet, itself or in a group of its arguments."""
    values = getattr(command, "keywords", {}).items()
    return any(getattr(value, "quiet", name == "quiet" and value) for name, value in values)


def _leave(code: int) -> int:
    """Return the exit code; where other processes take part, exit without waiting for them."""
    if _name_process():
        from aatjax.train.distributed import leave

        leave(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def format_overview() -> str:
    """Return the text of `aatjax --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: aatjax COMMAND ...",
        "",
        "Parameter-efficient fine-tuning of the Audio Spectrogram Transformer.",
    ]
    group = None
    for name, (its_group, summary) in COMMANDS.items():
        lines += [""] * (its_group != group)
        lines.append(f"  {name:<{width}}  {summary}")
        group = its_group
    lines += [
        "",
        "aatjax train            needs no data: synthetic sounds, and the weights in the package",
        "aatjax COMMAND --help   arguments and flags of a command",
        "aatjax --import FILE COMMAND ...   with the methods of a Python file of yours",
    ]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises too
    warnings.filterwarnings("ignore", category=UserWarning, module="orbax")
    warnings.formatwarning = lambda message, *_, **__: (
        f"{_name_process()}warning: {spell_flags(str(message))}\n"
    )
