"""Files and folders that appear under their final name only when they are complete.

All writers keep one promise. Data goes to a temporary name beside the target, is flushed to disk
and renamed; a failure leaves the target as it was. The umask decides the mode, whatever library
wrote the file. The place of a device, a pipe or a standard stream is refused.
"""

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from aatjax.errors import AatjaxError, WriteError, printable

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_LEFTOVERS = f".*.{'[0-9a-f]' * 32}.tmp"


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names `path` and the reason."""
    try:
        yield
    except AatjaxError:
        raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        room = (isinstance(error, OSError) and error.errno in _SPACE) or "No space left" in why
        advice = "free space there or choose another folder" if room else "choose another place"
        message = f"{printable(path)}: cannot be written: {why}; {advice}"
        raise WriteError(message) from error


@contextlib.contextmanager
def open_output(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` if the block succeeds; errors of the block pass.

    Args:
        path: the file; its folder is created.
        durable: flush to disk. False where a checksum finds what a power failure destroyed.

    Raises:
        WriteError: the file cannot be created, completed or renamed.
    """
    with _replace(path, durable) as place:
        with report_write_errors(path):
            file = place.open("r+b")
        try:
            yield file
            with report_write_errors(path):
                file.close()
        finally:
            with contextlib.suppress(OSError):
                file.close()


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before what is written is computed.

    Raises:
        WriteError: a device or a folder has its name, or its folder cannot be made or written.
    """
    with report_write_errors(path):
        _check_target(path)
        folder = next(one for one in path.absolute().parents if os.path.lexists(one))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission to write in {folder}")


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file of these bytes, see `open_output`."""
    with report_write_errors(path), open_output(path, durable=durable) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, see `open_output`."""
    write_bytes(path, text.encode())


def append_line(path: Path, text: str) -> None:
    """Add a line to a file and flush it to disk; a failure may leave the beginning of the line.

    Raises:
        WriteError: the file cannot be opened or written.
    """
    with report_write_errors(path), path.open("ab") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by a function that takes the path to write to, see `open_output`."""
    with report_write_errors(path), _replace(path, True) as place:
        write(place)


def write_folder(path: Path, fill: Callable[[Path], object], *, replace: bool = False) -> None:
    """Write a folder by a function that fills an empty one.

    Args:
        path: the folder; its parent is created.
        fill: writes files below the folder that it is given.
        replace: take the place of a folder that is not empty, which is then deleted.

    Raises:
        WriteError: the folder cannot be written, or it exists and is not empty.
    """
    place, old = _name_temporary(path), _name_temporary(path)
    try:
        with report_write_errors(path):
            if path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
                raise WriteError(f"{path}: exists and is not an empty folder: choose another name")
            path.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir()
            mode = stat.S_IMODE(place.stat().st_mode)
            fill(place)
            for entry in place.rglob("*"):
                entry.chmod(mode if entry.is_dir() else mode & 0o666)
            flush_folder(place)
            if path.exists() and replace:
                os.replace(path, old)
            elif path.exists():
                path.rmdir()
            os.replace(place, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Flush every file and folder below a folder, and the folder itself, to disk."""
    for entry in (*folder.rglob("*"), folder):
        if entry.is_dir():
            _sync_folder(entry)
        elif entry.is_file():
            _sync(entry)


def remove_leftovers(folder: Path, *, older_than: float = 0.0) -> None:
    """Delete temporary files that killed processes left below a folder.

    Args:
        folder: where to search.
        older_than: age in seconds from which a file counts as left.

    Raises:
        WriteError: one cannot be deleted.
    """
    with report_write_errors(folder):
        for left in list(folder.rglob(_LEFTOVERS)):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.lstat().st_mtime < older_than:
                    continue
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink()


@contextlib.contextmanager
def _replace(path: Path, durable: bool) -> Iterator[Path]:
    """An empty file beside `path`, renamed to it if the block succeeds."""
    place = _name_temporary(path)
    try:
        with report_write_errors(path):
            _check_target(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            place.touch(exist_ok=False)
            mode = stat.S_IMODE(place.stat().st_mode)
        yield place
        with report_write_errors(path):
            place.chmod(mode)  # some libraries write for the owner alone
            if durable:
                _sync(place)
            _check_target(path)
            os.replace(place, path)
            if durable:
                _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)


def _check_target(path: Path) -> None:
    stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
    if stream or (path.exists() and not path.is_file() and not path.is_dir()):
        raise OSError(errno.EINVAL, "a device, pipe or stream, where a file must be named")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")


def _name_temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:16]}.{uuid.uuid4().hex}.tmp")


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable; systems that cannot open folders do without."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
