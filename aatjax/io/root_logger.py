"""What libraries that log by absl do to the log of the user's program."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def keep_root_logger() -> Iterator[None]:
    """Leave the handlers of the root logger as they are, within the context.

    absl calls `logging.basicConfig` at its first message where the root logger has no handler, and
    the program's own call of it then does nothing. Orbax and Grain log when they are imported.
    """
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    guard = logging.NullHandler()
    root.addHandler(guard)
    try:
        yield
    finally:
        root.removeHandler(guard)


@contextlib.contextmanager
def drop_messages(package: str) -> Iterator[None]:
    """Drop what the files of a package log by absl or by the root logger, within the context."""

    def pass_others(record: logging.LogRecord) -> bool:
        return f"/{package}/" not in record.pathname.replace("\\", "/")

    loggers = [logging.getLogger(name) for name in (None, "absl")]
    for logger in loggers:
        logger.addFilter(pass_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(pass_others)
