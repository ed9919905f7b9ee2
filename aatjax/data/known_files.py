"""Files and their decoded entries that are known from before: none of them is opened."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from aatjax.errors import WriteError
from aatjax.io.host import count_cores
from aatjax.io.index import Index, is_settled, make_stamp
from aatjax.io.threads import map_threads

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

FILES, ENTRIES = "file", "entry"
"""Kinds of the index: [size, mtime, ctime, inode, digest] of a path, [bytes, notes] of a key."""
SAVE_EVERY = 1000  # files after which the index is written


@dataclass(frozen=True)
class Peers:
    """The processes of a run, which share the work of a start.

    Attributes:
        index: number of this one.
        count: how many there are.
        gather: returns the data of every process, on all of them.
    """

    index: int
    count: int
    gather: Callable[[bytes], list[bytes]]

    def owns(self, name: str) -> bool:
        """Whether the work of this name is that of this process."""
        return zlib.crc32(os.fsencode(name)) % self.count == self.index


@dataclass(frozen=True, slots=True)
class SoundFile:
    """A file under all of its names: hard links are one, and so are rows that repeat a file.

    Attributes:
        path: its first name.
        clips: numbers of its clips.
        found: what the system says of it; None where it cannot be found.
    """

    path: str
    clips: list[int]
    found: os.stat_result | None


def group_files(paths: Iterable[str]) -> list[SoundFile]:
    """Return the distinct files of a list of paths, in the order of their first names."""
    files: dict[Any, SoundFile] = {}
    for number, path in enumerate(paths):
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            found = None
        known = (found.st_dev, found.st_ino) if found is not None and found.st_ino else path
        if known not in files:
            files[known] = SoundFile(path, [], found)
        files[known].clips.append(number)
    return list(files.values())


@dataclass
class KnownFiles:
    """Digests of files and facts of entries, as they were found before or by another process.

    Attributes:
        index: where they are kept.
        make_key: returns the key of the entry of a file with a digest.
        digests: by the first name of a file.
        entries: by key.
        failure: why the index cannot be written, once that was tried.
    """

    index: Index
    make_key: Callable[[str], str]
    digests: dict[str, list[Any]] = field(default_factory=dict)
    entries: dict[str, list[Any]] = field(default_factory=dict)
    failure: WriteError | None = None
    _fresh: dict[str, dict[str, list[Any]]] = field(
        default_factory=lambda: {FILES: {}, ENTRIES: {}}
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)  # threads add while it is saved

    def load(self, files: Sequence[SoundFile]) -> None:
        """Read what the index holds of some files."""
        self.digests = self.index.load(FILES, (file.path for file in files))
        keys = {self.make_key(fact[-1]) for fact in self.digests.values()}
        self.entries = self.index.load(ENTRIES, keys)

    def find_digest(self, file: SoundFile) -> str | None:
        """Return the digest of a file that is as it was when it was hashed."""
        fact = self.digests.get(file.path)
        if fact is None or file.found is None or fact[:-1] != make_stamp(file.found):
            return None
        return fact[-1]

    def add(self, file: SoundFile, began: int, digest: str, key: str, entry: list[Any]) -> None:
        """Note what was found of a file that was read.

        Args:
            file: the file.
            began: time in nanoseconds before it was read.
            digest: of its content.
            key: of its entry.
            entry: bytes and notes of its entry; empty where it could not be kept.
        """
        with contextlib.suppress(OSError):
            found = os.stat(file.path)
            stamp = make_stamp(found)
            if file.found is not None and stamp == make_stamp(file.found):
                self.digests[file.path] = [*stamp, digest]
                if is_settled(found, began):
                    self._note(FILES, file.path, [*stamp, digest])
        if entry:
            self.entries[key] = entry
            self._note(ENTRIES, key, entry)

    def _note(self, kind: str, key: str, fact: list[Any]) -> None:
        with self._lock:
            self._fresh[kind][key] = fact

    def save(self, *, at_least: int = 1) -> None:
        """Write what is new to the index, where there is as much; a failure costs time only."""
        if sum(map(len, self._fresh.values())) < at_least or self.failure is not None:
            return
        with self._lock:
            fresh, self._fresh = self._fresh, {FILES: {}, ENTRIES: {}}
        try:
            for kind, facts in fresh.items():
                self.index.save(kind, facts)
        except WriteError as error:
            self.failure = error

    def exchange(self, peers: Peers, files: Iterable[SoundFile]) -> None:
        """Send what this process knows of some files to the others, and take what they know.

        A digest counts only where size, times and inode are the same here: on separate disks each
        process reads its own files, so that a difference between them shows.
        """
        digests = {f.path: self.digests[f.path] for f in files if f.path in self.digests}
        keys = (self.make_key(fact[-1]) for fact in digests.values())
        entries = {key: self.entries[key] for key in keys if key in self.entries}
        text = json.dumps([digests, entries])
        for data in peers.gather(text.encode()):
            theirs = json.loads(data)
            self.digests = theirs[0] | self.digests
            self.entries = theirs[1] | self.entries


class Store(Protocol[T_co]):
    """What `fetch_files` fetches from: entries that are made of files."""

    def find(self, file: SoundFile, known: KnownFiles) -> T_co | None:
        """Return the entry of a file that is as it was, without opening either."""
        ...

    def prepare(self) -> None:
        """Be ready for `try_fetch`."""
        ...

    def try_fetch(self, path: str, file: SoundFile | None, known: KnownFiles | None) -> T_co:
        """Return the entry of a file, which is read."""
        ...


def fetch_files(
    files: Sequence[SoundFile],
    store: Store[T],
    known: KnownFiles,
    workers: int | None,
    peers: Peers | None,
) -> Iterator[tuple[SoundFile, T]]:
    """Yield every file with its entry; only those that are not known are read.

    Args:
        files: distinct files.
        store: of the entries.
        known: receives what is found, and keeps it in its index.
        workers: number of threads; by default the cores that this process may use.
        peers: the processes of a run that all call this with the same files.
    """
    known.load(files)

    def fetch(some: Iterable[SoundFile]) -> Iterator[tuple[SoundFile, T]]:
        missing = []
        for file in some:
            if (entry := store.find(file, known)) is None:
                missing.append(file)
            else:
                yield file, entry
        if missing:
            store.prepare()
        threads = count_cores() if workers is None else workers
        try:
            for file, entry in zip(
                missing,
                map_threads(
                    lambda i: store.try_fetch(missing[i].path, missing[i], known),
                    len(missing),
                    workers=threads,
                ),
                strict=True,
            ):
                yield file, entry
                known.save(at_least=SAVE_EVERY)
        finally:
            known.save()

    if peers is None:
        yield from fetch(files)
        return
    own = [file for file in files if peers.owns(file.path)]
    yield from fetch(own)
    known.exchange(peers, own)
    yield from fetch(file for file in files if not peers.owns(file.path))
