"""The command line: `aatjax VERB ...`. Heavy imports happen inside the verbs."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from aatjax.cli.commands import VERBS
from aatjax.errors import AatjaxError, UsageError
from aatjax.io.signals import catch_sigterm


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `aatjax` command; exits with the code of the error, if any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the locale cannot write are escaped
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; a user's mistake gives one line, no traceback."""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            from importlib.metadata import version

            print(version("aatjax"))
            return 0
        verb, rest = arguments[0], arguments[1:]
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" (there are {', '.join(VERBS)})"
            raise UsageError(f"unknown command {verb!r}{hint}")
        command: Callable[[list[str]], None] = import_module(f"aatjax.cli.commands.{verb}").main
        _quiet_libraries()
        with catch_sigterm():
            command(rest)
        sys.stdout.flush()
        return 0
    except AatjaxError as error:
        print(f"aatjax: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return _leave(error.exit_code)
    except SystemExit as end:  # --help, and what tyro says of a flag
        return end.code if isinstance(end.code, int) else 2 * (end.code is not None)
    except KeyboardInterrupt:
        print("aatjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if SIGPIPE had ended it: not everything was written


def _leave(code: int) -> int:
    """The exit code; where other processes run, ends at once instead of waiting for them."""
    if "aatjax.train.distributed" in sys.modules:
        from aatjax.train.distributed import is_distributed

        with contextlib.suppress(RuntimeError, AssertionError):  # no device: no peers
            if is_distributed():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return code


def overview() -> str:
    """The text of `aatjax --help`."""
    width = max(map(len, VERBS))
    lines = [
        "usage: aatjax VERB ...",
        "",
        "Parameter-efficient fine-tuning of the Audio Spectrogram Transformer.",
        "",
        *(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()),
        "",
        "aatjax train            runs at once, on synthetic sounds and the weights in the package",
        "aatjax VERB --help      more about one verb",
    ]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="orbax")
