"""Which files of a folder are sound, and why the others are not."""

import errno
import os
import stat
from pathlib import Path

from aatjax.errors import DataError, printable

EXTENSIONS = frozenset(
    {".wav", ".wave", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"}
    | {".aifc", ".au", ".snd", ".caf", ".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma"}
)
"""Names that are listed without a look inside; how well they decode shows later."""


def list_audio(root: str | os.PathLike[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Finds the sound files below a folder.

    A file counts by its extension in upper or lower case, or, where it has none, by its first
    bytes. Links to files are followed as long as they stay inside the folder; links to folders are
    not (their files are listed where they really lie), so no loop can trap the walk. Nothing but
    regular files is ever opened.

    Args:
        root: folder to search, with all folders below it.

    Returns:
        The files in sorted order, and what was skipped as sorted pairs of path and reason.

    Raises:
        DataError: `root` is not a folder that can be read.
    """
    root = Path(root)
    try:
        home = os.path.realpath(root, strict=True)
        os.scandir(home).close()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{printable(root)}: not a folder that can be read ({_why(error)})"
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
            skipped.append((str(folder), _why(error)))
            continue
        for entry in names:
            path = folder / entry.name
            try:
                reason = _reason(entry, home)
            except OSError as error:
                reason = _why(error)
            if reason == "folder":
                folders.append(path)
            elif reason:
                skipped.append((str(path), reason))
            else:
                files.append(path)
    return sorted(files), sorted(skipped)


def _reason(entry: "os.DirEntry[str]", home: str) -> str:
    """'' to list it, 'folder' to walk it, else why it is skipped."""
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
    if not suffix and not _sounds(entry.path):
        return "not recognised as audio"
    return ""


def _sounds(path: str) -> bool:
    """Whether the first bytes are those of a sound file."""
    with open(path, "rb") as file:
        head = file.read(16)
    return (
        (head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE")
        or (head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"))
        or head[:4] in (b"fLaC", b"OggS", b".snd", b"caff", b"riff")
        or head[:3] == b"ID3"
        or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 in (0xE2, 0xE4, 0xE6))
    )


def _why(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "symlink loop"
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
