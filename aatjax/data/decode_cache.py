"""A cache of decoded waveforms on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Int16

from aatjax.audio.decode import AudioError, decode_blocks
from aatjax.audio.waveform import Channels
from aatjax.data.known_files import KnownFiles, Peers, SoundFile, fetch_files, group_files
from aatjax.data.quarantine import check_failures, count_allowed, write_quarantine
from aatjax.data.source import Clip, Progress, Reader, Source
from aatjax.errors import AatjaxError, DataError, WriteError, printable
from aatjax.io.atomic import open_output, remove_leftovers, report_write_errors
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.index import Index

FORMAT = 2  # raise it whenever the same file and options give other samples or another layout
CHECKSUM = hashlib.sha256().digest_size
ABANDONED = 3600  # seconds after which the temporary file of a killed run is removed


UNREAD = AudioError("unreadable", "not read")


def decode_all(
    source: Source,
    cache_dir: str | Path,
    *,
    max_bad: float | int = 0.05,
    quarantine_file: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    channels: Channels = "mean",
    truncated: Literal["skip", "keep"] = "skip",
    peers: Peers | None = None,
) -> Source:
    """Decode the files of a source into a cache and return the source that reads from there.

    An entry is named after the SHA-256 of the file's bytes and the options: a changed file is
    decoded again, a copy is not. A file with the size, times and inode that it had is not opened:
    an index in the cache holds its digest. An entry ends in a checksum, which is verified when the
    entry is first read; a damaged one is decoded again. Clips without a file keep their reader.

    A cache that cannot be written costs time only: a warning says so, and the files are decoded
    each time they are read.

    Args:
        source: the clips.
        cache_dir: folder of the cache, which any number of sources and runs may share.
        max_bad: how many clips may fail: a share of the clips (float) or a number of them (int).
        quarantine_file: JSON-lines file of the clips that failed, see `write_quarantine`.
        workers: number of threads; by default the cores that this process may use.
        progress: called with the stage `decode` and the clips done.
        channels: how several channels become one, as in `decode`.
        truncated: whether truncated clips are skipped or kept, as in `decode`.
        peers: the processes of a run that all call this: each reads a share of the files, and all
            have what each found.

    Returns:
        The source without the clips that failed (in its `skipped`), with remarks in its `notes`.

    Raises:
        DataError: more clips failed than allowed, or all.
        UsageError: an option out of range.
        WriteError: the quarantine file cannot be written.
    """
    count_allowed(max_bad, len(source))
    files = [clip for clip in source.clips if clip.path is not None]
    cache = DecodeCache(Path(cache_dir).expanduser().absolute(), channels, truncated)
    known = KnownFiles(cache.index, cache.make_key)
    paths = [str(clip.path) for clip in files]
    found: list[CacheEntry | AudioError] = [UNREAD] * len(files)
    done = 0
    for file, result in fetch_files(group_files(paths), cache, known, workers, peers):
        for number in file.clips:
            again = isinstance(result, AudioError) and paths[number] != file.path
            found[number] = cache.try_fetch(paths[number]) if again else result
        done += len(file.clips)
        if progress is not None:
            progress("decode", done, len(files))
    for failure, cost in (
        (cache.failure, "sounds are decoded each time they are read"),
        (known.failure, "the next start reads every sound again"),
    ):
        if failure is not None:
            warnings.warn(f"{failure}; until then {cost}", stacklevel=2)
            break
    bad = [(c, e) for c, e in zip(files, found, strict=True) if isinstance(e, AudioError)]
    entries = {
        clip.id: entry
        for clip, entry in zip(files, found, strict=True)
        if not isinstance(entry, AudioError)
    }
    if quarantine_file is not None:
        write_quarantine(Path(quarantine_file), files, bad)
    check_failures(source, [str(error) for _, error in bad], max_bad)
    keys = {id: entry.key for id, entry in entries.items()}
    failed = {clip.id for clip, _ in bad}
    return source.with_clips(
        (clip for clip in source.clips if clip.id not in failed),
        reader=CachedReader(cache, keys, source.reader),
        skipped=[*source.skipped, *((clip.id, error.reason) for clip, error in bad)],
        notes=[*source.notes, *((id, note) for id, e in entries.items() for note in e.notes)],
    )


@dataclass(frozen=True)
class CacheEntry:
    """One decoded file: its key in the cache, and what was odd about it."""

    key: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CachedReader(Reader):
    """Reads waveforms from the cache, memory-mapped, and clips that are not in it as before.

    Attributes:
        cache: the cache.
        keys: clip id to the key of its entry.
        base: reader of the clips that are not in the cache.
    """

    cache: DecodeCache
    keys: dict[str, str]
    base: Reader

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        key = self.keys.get(clip.id)
        return self.base.read(clip) if key is None else self.cache.read(str(clip.path), key)

    def key(self, clip: Clip) -> str | None:
        return self.keys.get(clip.id) or self.base.key(clip)

    def recall(self, name: str, clips: Iterable[Clip]) -> dict[str, Any]:
        keys = {clip.id: self.keys[clip.id] for clip in clips if clip.id in self.keys}
        found = self.cache.index.load(name, set(keys.values()))
        return {id: found[key] for id, key in keys.items() if key in found}

    def remember(self, name: str, values: Mapping[str, Any]) -> None:
        facts = {self.keys[id]: value for id, value in values.items() if id in self.keys}
        with contextlib.suppress(WriteError):
            self.cache.index.save(name, facts)


@dataclass
class DecodeCache:
    """A folder of decoded waveforms, and the options they were decoded with.

    Attributes:
        folder: where they are.
        channels, truncated: as in `decode_all`.
        failure: why nothing can be kept, once that was tried.
        verified: keys of the entries whose checksum was found right.
    """

    folder: Path
    channels: Channels
    truncated: Literal["skip", "keep"]
    failure: WriteError | None = None
    verified: set[str] = field(default_factory=set)

    @property
    def index(self) -> Index:
        """What is known of files and entries."""
        return Index(self.folder / "index.sqlite")

    def prepare(self) -> None:
        """Make the folder and remove what killed runs left behind."""
        try:
            with report_write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except WriteError as error:
            self.failure = error
        with contextlib.suppress(WriteError):
            remove_leftovers(self.folder, older_than=ABANDONED)

    def find(self, file: SoundFile, known: KnownFiles) -> CacheEntry | None:
        """Return the entry of a file that is as it was, without opening either."""
        if (digest := known.find_digest(file)) is None:
            return None
        key = self.make_key(digest)
        size, notes = known.entries.get(key, (None, ()))
        try:
            there = size is not None and os.stat(cache_path(self.folder, key)).st_size == size
        except OSError:
            there = False
        return CacheEntry(key, tuple(notes)) if there else None

    def try_fetch(
        self, path: str, file: SoundFile | None = None, known: KnownFiles | None = None
    ) -> CacheEntry | AudioError:
        """Return what `fetch` does, or the error of a file that cannot be decoded."""
        try:
            return self.fetch(path, file, known)
        except AudioError as error:
            return error

    def fetch(
        self, path: str, file: SoundFile | None = None, known: KnownFiles | None = None
    ) -> CacheEntry:
        """Return the entry of a file; write it unless a whole one is there.

        Args:
            path: the file.
            file: the same, as it was found.
            known: may have its digest, and is given what is found.

        Raises:
            AudioError: the file cannot be decoded.
            DataError: an unexpected error while reading; the message names the file.
        """
        try:
            began = time.time_ns()
            digest = known.find_digest(file) if known and file else None
            digest = digest or self._hash(path)
            key = self.make_key(digest)
            entry = cache_path(self.folder, key)
            notes = read_notes(entry)
            if notes is None:
                notes = self._keep(entry, path)
            self.verified.add(key)
            if known is not None and file is not None:
                facts = [] if self.failure else [entry.stat().st_size, notes]
                known.add(file, began, digest, key, facts)
            return CacheEntry(key, notes)
        except (AatjaxError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"{printable(path)}: reading it failed: {error!r}") from error

    def read(self, path: str, key: str) -> Int16[np.ndarray, " s"]:
        """Return the samples of an entry, memory-mapped; a damaged one is decoded again.

        Args:
            path: the file that the entry was decoded from.
            key: of the entry.

        Raises:
            DataError: neither the entry nor the file can be read, or the file has changed.
        """
        entry = cache_path(self.folder, key)
        if key not in self.verified:
            if read_notes(entry) is None:
                self._restore(entry, path, key)
            self.verified.add(key)
        if self.failure is None or entry.exists():
            with contextlib.suppress(OSError, ValueError, struct.error):
                return _map_samples(entry)
        return np.concatenate(list(self._decode(path, [])))

    def _restore(self, entry: Path, path: str, key: str) -> None:
        """Decode the file of a damaged or missing entry again."""
        try:
            if self.make_key(self._hash(path)) != key:
                raise DataError(f"{printable(path)}: has changed since the run was started")
            self._keep(entry, path)
        except DataError as error:
            raise DataError(
                f"{printable(path)}: its decoded copy {entry} cannot be read, and it cannot be "
                f"made again: {error}"
            ) from error

    def _keep(self, entry: Path, path: str) -> tuple[str, ...]:
        """Store a file's entry if possible, and return its notes."""
        if self.failure is None:
            try:
                return self._store(entry, path)
            except WriteError as error:
                self.failure = error
        notes: list[str] = []
        for _ in self._decode(path, notes):
            pass
        return tuple(notes)

    def _store(self, entry: Path, path: str) -> tuple[str, ...]:
        """Decode a file into its entry, block by block, and return its notes."""
        notes: list[str] = []
        with report_write_errors(entry), open_output(entry, durable=False) as file:
            file.write(_make_header(0))
            samples = 0
            for block in self._decode(path, notes):
                file.write(block.tobytes())
                samples += block.size
            text = json.dumps(notes).encode()
            file.write(text + struct.pack("<I", len(text)))
            size = file.tell()
            file.seek(0)
            file.write(_make_header(samples))
            file.seek(0)
            checksum = _hash_start(file, size)
            file.write(checksum)
        return tuple(notes)

    def _decode(self, path: str, notes: list[str]) -> Iterator[Int16[np.ndarray, " n"]]:
        """Yield the samples of a file in blocks; of a damaged one up to the damage, or none."""
        samples = 0
        try:
            for block in decode_blocks(path, channels=self.channels, notes=notes):
                samples += block.size
                yield block
        except OSError as error:  # of the sound, not of the cache
            text = f"{printable(path)}: {error.strerror or error}"
            raise AudioError("unreadable", text) from error
        except AudioError as error:
            # Read to the damage: the notes are complete, and the reason is the last one.
            if error.reason != "truncated" or not samples:
                raise
            if self.truncated == "skip":
                raise AudioError(
                    "truncated", f"{error}; data.truncated='keep' uses the rest"
                ) from None
            notes.append(str(error).rpartition(": ")[2])

    def make_key(self, digest: str) -> str:
        """Return the key of the entry of a file with this SHA-256."""
        return hash_bytes(f"{digest} {self._options}")

    @functools.cached_property
    def _options(self) -> str:
        return json.dumps([FORMAT, 16000, self.channels, self.truncated])

    def _hash(self, path: str) -> str:
        try:
            if not os.path.isfile(path):
                raise AudioError("not a regular file", f"{printable(path)}: is not a regular file")
            return hash_file(Path(path))
        except OSError as error:
            why = error.strerror or error
            raise AudioError("unreadable", f"{printable(path)}: {why}") from error


def cache_path(folder: Path, key: str) -> Path:
    """Return the file of a key's entry."""
    return folder / key[:2] / f"{key}.npy"


def read_notes(entry: Path) -> tuple[str, ...] | None:
    """Return the notes kept with an entry; None if it is absent or its checksum does not fit.

    An entry is a .npy file, followed by the notes as JSON, their length (4 bytes, little endian)
    and the SHA-256 of everything before.
    """
    with contextlib.suppress(OSError), entry.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= CHECKSUM + 4 or _hash_start(file, size - CHECKSUM) != file.read(CHECKSUM):
            return None
        file.seek(size - CHECKSUM - 4)
        (length,) = struct.unpack("<I", file.read(4))
        file.seek(size - CHECKSUM - 4 - length)
        return tuple(json.loads(file.read(length)))
    return None


def _hash_start(file: BinaryIO, size: int) -> bytes:
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _map_samples(entry: Path) -> Int16[np.ndarray, " s"]:
    """Return the samples of an entry, memory-mapped.

    `np.load` reads the head of the file as Python: in two threads at once this fails now and then
    on Python 3.11 ("AST constructor recursion depth mismatch", CPython issue 106905).
    """
    with entry.open("rb") as file:
        head = file.read(len(_make_header(0)))
        size = os.fstat(file.fileno()).st_size
        file.seek(size - CHECKSUM - 4)
        (notes,) = struct.unpack("<I", file.read(4))
    samples = (size - CHECKSUM - 4 - notes - len(head)) // 2
    if samples < 0 or head != _make_header(samples):
        raise ValueError(f"{entry}: not the head of {samples} samples")
    return np.memmap(entry, "<i2", "r", len(head), (samples,)) if samples else np.zeros(0, np.int16)


@functools.lru_cache(4096)
def _make_header(samples: int) -> bytes:
    """Return the head of a .npy file of int16 samples; it is as long for any number of them."""
    head = io.BytesIO()
    fields = {"descr": "<i2", "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()
