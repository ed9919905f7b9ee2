"""Keeps what C libraries print about damaged files off the screen."""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_users = 0
_saved: int | None = None
_nowhere: int | None = None


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Send what C libraries print to standard error to nowhere, with glibc; else do nothing.

    libmpg123 prints each damaged frame, and libsndfile has no option against it. Only the `stderr`
    of C is replaced, which its libraries share: Python's own, file descriptor 2 and the processes
    started meanwhile keep it. Any number of threads may be inside.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        yield
        return
    global _users, _saved
    with _lock:
        stream = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr")
        if _users == 0:
            _saved, stream.value = stream.value, _open_nowhere() or stream.value
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                stream.value = _saved


def _open_nowhere() -> int | None:
    """Return the address of a C stream that drops what is written."""
    global _nowhere
    if _nowhere is None:
        library = ctypes.CDLL(None)
        library.fopen.restype = ctypes.c_void_p
        _nowhere = library.fopen(os.fsencode(os.devnull), b"w")
    return _nowhere
