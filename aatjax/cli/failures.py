"""The last line of defence: whatever ends a command becomes one sentence and an exit code."""

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from aatjax.errors import (
    AatjaxError,
    DataError,
    OutOfMemoryError,
    ProgramError,
    UsageError,
    WriteError,
    printable,
)

NO_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)
"""What the system says of names that stand for no file of the kind that is read."""


def explain(error: Exception, arguments: Sequence[str]) -> AatjaxError:
    """Return what to say of an error; one that no user can cause is written to a file.

    Args:
        error: what ended the command.
        arguments: of the command, for the file.
    """
    if isinstance(error, AatjaxError):
        return error
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return OutOfMemoryError.explain(text)
    if isinstance(error, OSError) and error.strerror:
        kind = DataError if error.errno in NO_FILE else WriteError
        return kind(_describe(error))
    if "jax" in sys.modules and isinstance(error, RuntimeError | AssertionError):
        from aatjax.train.distributed import check_devices

        try:
            check_devices()
        except AatjaxError as why:
            return why
    return ProgramError(_write_report(error, arguments))


def check_working_folder() -> None:
    """Refuse to work in a folder that is gone, where no relative name means anything.

    Raises:
        UsageError: there is none.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            "the working folder was deleted or cannot be read: change to another (cd) first"
        ) from error


def _describe(error: OSError) -> str:
    """What the system refused, and of which file."""
    names = [printable(str(n)) for n in (error.filename, error.filename2) if n is not None]
    where = " -> ".join(names) or "a file or device"
    return f"{where}: {error.strerror}; check that it is there, that it may be used, and its disk"


def _write_report(error: Exception, arguments: Sequence[str]) -> str:
    """Write the traceback to a file, and return the sentence that names it."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    packages = ("aatjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    lines = [
        f"command: {shlex.join(['aatjax', *map(printable, arguments)])}",
        f"python {platform.python_version()} on {platform.platform()}",
        ", ".join(f"{name} {_find_version(name)}" for name in packages),
        "",
        "".join(traceback.format_exception(error)),
    ]
    try:
        number, path = tempfile.mkstemp(prefix="aatjax-error-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        print("\n".join(lines), file=sys.stderr)
        path = "the lines above"
    return (
        f"an error of this program, not of yours: {what}; please report it with {path}, which "
        "has the command, the versions and where it happened"
    )


def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
