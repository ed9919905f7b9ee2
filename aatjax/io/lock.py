"""One folder, one run: a lock that the operating system gives back when its holder ends."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from aatjax.errors import UsageError, WriteError


@contextlib.contextmanager
def locked(folder: Path, flag: str = "--run") -> Iterator[None]:
    """Holds the folder's lock, `.lock`; the file tells who has it, and stays when it is free.

    Raises:
        UsageError: another run has it; the message names its process and host.
        WriteError: the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"{folder} is in use by {_holder(file.read())}: wait for it or end it, or choose "
                f"another folder with {flag}"
            ) from error
        except OSError:
            pass  # a file system without locks: nothing to hold
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        told = json.loads(text)
        return f"process {told['pid']} on host {told['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
