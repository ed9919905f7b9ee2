"""Whether an adapter file lies in the folder of the run that wrote it.

A file may come from anybody, and paths in it are not those of its reader: they are followed only
beside the config.json with which it was trained.
"""

import os
from pathlib import Path
from typing import Any

from aatjax.errors import DataError
from aatjax.io.json_file import read_json

CONFIG = "config.json"
_DEVICES = [("/", "dev"), ("/", "proc"), ("/", "sys")]


def lies_in_run(path: Path | None, config: Any) -> bool:
    """Return whether the config that an adapter file states is that of the folder it is in.

    Args:
        path: the file, if there is one.
        config: the config in its metadata, or None.

    Raises:
        DataError: the config.json there is damaged.
    """
    if path is None or config is None:
        return False
    beside = path.parent / CONFIG
    return beside.is_file() and read_json(beside) == config


def check_stored_path(text: str) -> None:
    """Refuse a network address, a device or a pipe where a run folder names a file or folder.

    Raises:
        DataError: it is one.
    """
    path = Path(os.path.expanduser(text))
    if "://" in text or text.startswith(("//", "\\\\")) or "\0" in text:
        raise DataError("it is a network address, which is not opened because a file names it")
    inside = path.resolve().parts[:2]
    if path.exists() and (not (path.is_file() or path.is_dir()) or inside in _DEVICES):
        raise DataError("it is a device or a pipe, which is not opened because a file names it")
