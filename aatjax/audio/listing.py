"""Lists the sound files of a folder, and the reasons why other files are skipped."""

import errno
import glob
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from aatjax.audio.content import find_sound
from aatjax.errors import DataError, printable

EXTENSIONS = frozenset(
    {".wav", ".wave", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"}
    | {".aifc", ".au", ".snd", ".caf", ".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma"}
)
"""Files with these extensions are listed without being opened."""

REPORT_EVERY = 1000  # files
LISTS = (".txt", ".lst", ".m3u", ".m3u8")
"""Files with these extensions are lists of sound files."""


def list_audio(
    root: str | os.PathLike[str], progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[Path], list[tuple[str, str]]]:
    """List the sound files below a folder.

    A file is recognised by its extension or, without one, by its first bytes. Links to files are
    followed if they stay inside the folder; links to folders are not, so that no loop is possible.
    Only regular files are opened.

    Args:
        root: folder to search, with all folders below it.
        progress: called with the stage `list`, the files found, and 0 for the unknown total.

    Returns:
        The files, sorted, and the skipped entries as sorted pairs of path and reason.

    Raises:
        DataError: `root` is not a readable folder.
    """
    root = Path(root)
    try:
        home = os.path.realpath(root, strict=True)
        os.scandir(home).close()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{printable(root)}: not a folder that can be read ({_explain(error)})"
        ) from error
    files: list[Path] = []
    skipped: list[tuple[str, str]] = []
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                names = list(entries)
        except OSError as error:
            skipped.append((str(folder), _explain(error)))
            continue
        for entry in names:
            path = folder / entry.name
            try:
                reason = _find_reason(entry, home)
            except OSError as error:
                reason = _explain(error)
            if reason == "folder":
                folders.append(path)
            elif reason:
                skipped.append((str(path), reason))
            else:
                files.append(path)
                if progress is not None and len(files) % REPORT_EVERY == 0:
                    progress("list", len(files), 0)
    return sorted(files), sorted(skipped)


def find_sounds(names: Iterable[str], given: TextIO | None = None) -> list[str]:
    """Return the sound files that names on a command line stand for, in the order given.

    A folder stands for the sound files below it (`list_audio`), a pattern such as `a/**/*.wav` for
    what it matches, a list (a file .txt, .lst or .m3u) for the names on its lines, `-` for those
    on standard input: one per line, or with zero bytes between as `find -print0` writes them. A
    name of a list is looked for in the working folder, then beside the list.

    Args:
        names: files, folders, patterns, lists or `-`.
        given: standard input.

    Raises:
        DataError: a folder without sounds, a pattern without matches, an empty list.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if name == "-":
            some = _read_names(b"" if given is None else given.buffer.read())
            why = "standard input names no file"
        elif path.is_dir():
            some, why = [str(one) for one in list_audio(path)[0]], "no sound file below this folder"
        elif path.suffix.lower() in LISTS and path.is_file():
            lines = _read_names(path.read_bytes())
            beside = [(line, path.parent / line) for line in lines]
            some = [line if os.path.exists(line) else str(other) for line, other in beside]
            why = "this list names no file"
        elif glob.has_magic(name) and not path.exists():
            some, why = sorted(glob.glob(name, recursive=True)), "no file matches this pattern"
        else:
            some, why = [name], ""
        if not some:
            raise DataError(f"{printable(name)}: {why}")
        found += some
    return found


def _read_names(data: bytes) -> list[str]:
    """The names of a list; empty lines and comments (#) are none."""
    if b"\0" in data:
        return [os.fsdecode(one) for one in data.split(b"\0") if one]
    lines = [os.fsdecode(line.rstrip(b"\r")) for line in data.split(b"\n")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _find_reason(entry: "os.DirEntry[str]", home: str) -> str:
    """Return '' to list an entry, 'folder' to walk it, else the reason to skip it."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        target = os.path.realpath(entry.path, strict=True)
        if os.path.commonpath([home, target]) != home:
            return "link out of the folder"
        if os.path.isdir(target):
            return "link to a folder"
    mode = entry.stat().st_mode
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix and suffix not in EXTENSIONS:
        return "not an audio extension"
    if not os.access(entry.path, os.R_OK):
        return "permission denied"
    if not suffix:
        with open(entry.path, "rb") as file:
            if find_sound(file, os.fstat(file.fileno()).st_size)[0] == "other":
                return "not recognised as audio"
    return ""


def _explain(error: Exception) -> str:
    known = {errno.ELOOP: "symlink loop", errno.ENOENT: "no such file or folder"}
    known |= dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied")
    code = getattr(error, "errno", None) or 0
    return known.get(code) or getattr(error, "strerror", None) or str(error)
