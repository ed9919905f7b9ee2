"""Files and folders that appear under their name only when they are whole."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from aatjax.errors import WriteError


def refuse_special(path: Path) -> None:
    """Raises OSError for a device, a pipe or a standard stream, whose place no file may take."""
    stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
    if stream or (path.exists() and not path.is_file() and not path.is_dir()):
        raise OSError(errno.EINVAL, "a device, pipe or stream, where a file must be named", path)


def into_place(temporary: Path, path: Path) -> None:
    """Renames a finished file to its final name.

    Raises:
        OSError: it cannot be renamed, or the name is that of a device, a pipe or a stream.
    """
    refuse_special(path)
    os.replace(temporary, path)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the final name and renames when everything is on disk."""
    place: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(number)
        place = Path(name)
        write(place)
        place.chmod(0o666 & ~_umask())
        _flush(place)
        into_place(place, path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path}: not written ({_reason(error)}); nothing is left there") from None
    finally:
        if place is not None:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside the final name and renames it when everything is on disk."""
    place: Path | None = None
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise WriteError(f"{path}: exists and is not an empty folder: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        fill(place)
        for file in place.rglob("*"):
            if file.is_file():
                _flush(file)
        place.chmod(0o777 & ~_umask())
        os.replace(place, path)
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path}: not written ({_reason(error)}); nothing is left there") from None
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
        WriteError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem[:16]}-{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x+b") as file:
            write(file)
        into_place(temporary, path)
    except OSError as error:
        raise WriteError(unwritable(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritable(path: Path, error: OSError) -> str:
    """The message for a path that could not be written."""
    why = error.strerror or error
    return f"{path}: cannot be written: {why}; free space there or choose another folder"
