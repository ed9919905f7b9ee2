"""Keeps libraries that log by absl from configuring the root logger of the user's program."""

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
