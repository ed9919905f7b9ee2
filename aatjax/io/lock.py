"""A lock on a folder, which the operating system releases when its holder ends."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from aatjax.errors import UsageError
from aatjax.io.atomic import report_write_errors
from aatjax.io.json_file import write_json

LOCK, HOLDER = ".lock", ".lock.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_folder(folder: Path, argument: str = "run_dir=") -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        folder: the folder, created if needed.
        argument: what chooses another folder, for the message.

    Raises:
        UsageError: another process holds it; the message names the process and its host.
        WriteError: the folder cannot be written.
    """
    holder = folder / HOLDER
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_unused, folder, made)
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / LOCK, timeout=0))
            except Timeout as error:
                raise UsageError(
                    f"{folder} is in use by {_name_holder(holder)}: wait for it or end it, or "
                    f"choose another folder ({argument})"
                ) from error
            except NotImplementedError:
                pass  # a file system without locks
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            stack.callback(holder.unlink, missing_ok=True)
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            write_json(holder, about)
        yield


def _remove_unused(folder: Path, made: Sequence[Path]) -> None:
    """Remove the lock, and the folders made for it, where nothing came to lie beside it."""
    with contextlib.suppress(OSError):
        if {one.name for one in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            for one in made:
                one.rmdir()


def _name_holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['pid']} on host {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
