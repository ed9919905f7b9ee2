"""Weights that were loaded on this machine, found again by their fingerprint.

An adapter file names its backbone by fingerprint and by path. The path is that of whoever wrote
the file; this index holds only what its own user has loaded.
"""

import contextlib
import re
from pathlib import Path

from aatjax.errors import AatjaxError
from aatjax.io.atomic import write_text
from aatjax.io.host import find_user_cache

MOST = 500
"""Entries that are kept; the oldest ones are dropped."""
MOST_PLACES = 8
"""Places that an entry holds, the newest first: copies come and go."""


def remember_weights(fingerprint: str, path: Path) -> None:
    """Note where weights were read; nothing where the user's cache folder cannot be written."""
    with contextlib.suppress(AatjaxError, OSError, RuntimeError):
        entry, place = _locate(fingerprint), str(path.absolute())
        before = _read_places(entry)
        if place in before[:1]:
            return
        others = [one for one in before if one != place and Path(one).exists()]
        write_text(entry, "\0".join([place, *others][:MOST_PLACES]))
        entries = sorted(entry.parent.iterdir(), key=lambda one: one.stat().st_mtime)
        for old in entries[:-MOST]:
            old.unlink(missing_ok=True)


def find_weights(fingerprint: str) -> Path | None:
    """Return the file or folder in which weights were read before, if it is still there."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", fingerprint):  # it may come from any file
            places = map(Path, _read_places(_locate(fingerprint)))
            return next((one for one in places if one.is_file() or one.is_dir()), None)
    return None


def _read_places(entry: Path) -> list[str]:
    return entry.read_text(encoding="utf-8").split("\0") if entry.is_file() else []


def _locate(fingerprint: str) -> Path:
    return find_user_cache() / "weights" / fingerprint
