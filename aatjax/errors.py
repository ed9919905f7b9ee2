"""Errors that a user can cause or meet, each with its exit code on the command line."""

import os


def printable(text: str | os.PathLike[str]) -> str:
    """Text for one line of a message: control characters and broken encoding are escaped."""
    decoded = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


class AatjaxError(Exception):
    """Base of every error that is explained to the user in one line.

    The message says what was wrong, where (file, row, parameter), and what to do.
    """

    exit_code = 1


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


class OutOfMemoryError(AatjaxError, MemoryError):
    """The model and its batch do not fit the device."""


class WriteError(AatjaxError, OSError):
    """Something could not be written."""

    exit_code = 74
