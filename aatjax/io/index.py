"""A small database of what was computed of files, so that it is computed once."""

import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aatjax.errors import WriteError, printable

CHUNK = 500  # keys per query
WAIT = 10.0  # seconds that a writer waits for another one
FINE, COARSE = 50_000_000, 2_000_000_000
"""Nanoseconds between two times that a file system can tell apart, at most: one that keeps parts of
a second, and one that does not (FAT)."""

SCHEMA = """CREATE TABLE IF NOT EXISTS facts (kind TEXT, key TEXT, value TEXT, checksum INTEGER,
PRIMARY KEY (kind, key)) WITHOUT ROWID"""


@dataclass(frozen=True)
class Index:
    """JSON values by kind and key in a SQLite file, which any number of processes may share.

    It holds nothing that cannot be computed again: a missing, damaged or locked file is as good as
    an empty one, and each value has a checksum of its own.

    Attributes:
        path: the file.
    """

    path: Path

    def load(self, kind: str, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those keys that have one."""
        names = {_encode(key): key for key in keys}
        wanted, found = list(names), {}
        if not wanted or not self.path.exists():
            return {}
        try:
            # Reading needs no right to write.
            address = f"file:{quote(str(self.path))}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, timeout=WAIT)) as base:
                for start in range(0, len(wanted), CHUNK):
                    some = wanted[start : start + CHUNK]
                    places = ",".join("?" * len(some))
                    query = (
                        "SELECT key, value, checksum FROM facts "
                        f"WHERE kind = ? AND key IN ({places})"
                    )
                    for key, value, checksum in base.execute(query, (kind, *some)):
                        if checksum == _compute_checksum(kind, key, value):
                            found[names[key]] = json.loads(value)
        except (sqlite3.Error, ValueError, TypeError):
            pass
        return found

    def save(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add values, in the place of older ones, in one transaction.

        Raises:
            WriteError: the file cannot be written.
        """
        if not values:
            return
        rows = []
        for name, value in values.items():
            key, text = _encode(name), json.dumps(value)
            rows.append((kind, key, text, _compute_checksum(kind, key, text)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(rows)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # damaged: nothing in it is needed
                self.path.unlink(missing_ok=True)
                self._write(rows)
        except (sqlite3.Error, OSError) as error:
            why = getattr(error, "strerror", None) or error
            raise WriteError(f"{printable(self.path)}: cannot be written: {why}") from error

    def _write(self, rows: list[tuple[str, str, str, int]]) -> None:
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as base, base:
            base.execute(SCHEMA)
            base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)


def make_stamp(found: os.stat_result) -> list[int]:
    """Return what changes with the content of a file: size, times and inode."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def is_settled(found: os.stat_result, now: int) -> bool:
    """Whether a later change of a file must show in its time, as git asks of its index.

    A file that was written just before it was read may be written again within the same tick of the
    file system's clock: neither size nor time need change then.

    Args:
        found: of the file.
        now: time in nanoseconds before the file was read.
    """
    tick = FINE if found.st_mtime_ns % 1_000_000_000 else COARSE
    return found.st_mtime_ns + tick <= now


def _encode(key: str) -> str:
    """Return a key that SQLite can store: names of files need not be UTF-8."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _compute_checksum(kind: str, key: str, value: str) -> int:
    return zlib.crc32(f"{kind}\0{key}\0{value}".encode())
