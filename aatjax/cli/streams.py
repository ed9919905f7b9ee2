"""Standard input, output and error of a command: closed, full, or of another encoding."""

import contextlib
import io
import os
import sys

from aatjax.errors import WriteError


class _Output(io.FileIO):
    """Standard output; what cannot be written is explained."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WriteError(
                f"standard output cannot be written: {error.strerror}; free space there, or "
                "redirect it to another place"
            ) from error


class _Messages(io.FileIO):
    """Standard error; work goes on where nobody can read its messages (disk full, hung up)."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes  # pyright: ignore[reportArgumentType]


def prepare_streams() -> bool:
    """Make the three standard streams usable.

    A closed one is opened on the null device, or the next file that is opened would take its
    number, and get what libraries print. Characters that the locale cannot write are escaped.

    Returns:
        Whether standard output was open.
    """
    was_open = True
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            was_open = was_open and name != "stdout"
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for name, kind in (("stdout", _Output), ("stderr", _Messages)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _is_file(stream):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, _reopen(stream, kind))
    return was_open


def _is_file(stream: io.TextIOWrapper) -> bool:
    """Whether a stream is one of the system, not one in memory that a caller has put there."""
    try:
        return stream.fileno() >= 0
    except OSError:
        return False


def _reopen(stream: io.TextIOWrapper, kind: type[io.FileIO]) -> io.TextIOWrapper:
    """A stream on the same file, whose raw writes are those of `kind`."""
    raw = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def discard_output() -> None:
    """Send what is still to be written to standard output nowhere: it would fail at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
