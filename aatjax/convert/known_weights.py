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


def remember_weights(fingerprint: str, path: Path) -> None:
    """Note where weights were read; nothing where the user's cache folder cannot be written."""
    with contextlib.suppress(AatjaxError, OSError, RuntimeError):
        entry, text = _locate(fingerprint), str(path.absolute())
        if entry.is_file() and entry.read_text(encoding="utf-8") == text:
            return
        write_text(entry, text)
        entries = sorted(entry.parent.iterdir(), key=lambda one: one.stat().st_mtime)
        for old in entries[:-MOST]:
            old.unlink(missing_ok=True)


def find_weights(fingerprint: str) -> Path | None:
    """Return the file or folder in which weights were read before, if it is still there."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", fingerprint):  # it may come from any file
            path = Path(_locate(fingerprint).read_text(encoding="utf-8"))
            return path if path.is_file() or path.is_dir() else None
    return None


def _locate(fingerprint: str) -> Path:
    return find_user_cache() / "weights" / fingerprint
