"""A cache of decoded waveforms on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from jaxtyping import Int16

from aatjax.audio.decode import AudioError, decode_blocks
from aatjax.audio.waveform import Channels
from aatjax.data.quarantine import write_quarantine
from aatjax.data.source import Clip, Progress, Reader, Source
from aatjax.errors import AatjaxError, DataError, UsageError, printable
from aatjax.io.atomic import open_output, remove_leftovers, report_write_errors
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.threads import map_threads

FORMAT = 1  # raise it whenever the same file and options give other samples or another layout
CHECKSUM = hashlib.sha256().digest_size
ABANDONED = 3600  # seconds after which the temporary file of a killed run is removed
MOST_SHOWN = 5


def decode_all(
    source: Source,
    cache_dir: str | Path,
    *,
    max_bad: float | int = 0.05,
    quarantine_file: str | Path | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    channels: Channels = "mean",
    truncated: Literal["skip", "keep"] = "skip",
) -> Source:
    """Decode the files of a source into a cache and return the source that reads from there.

    An entry is named after the SHA-256 of the file's bytes and the options: a changed file is
    decoded again, a copy is not. It ends in a checksum that every call verifies, so an entry is
    whole or is replaced. Clips without a file keep their reader.

    Args:
        source: the clips.
        cache_dir: folder of the cache, which any number of sources and runs may share.
        max_bad: how many clips may fail: a share of the clips (float) or a number of them (int).
        quarantine_file: JSON-lines file of the clips that failed, see `write_quarantine`.
        workers: number of threads.
        progress: called after each clip, with the stage `decode`.
        channels: how several channels become one, as in `decode`.
        truncated: whether truncated clips are skipped or kept, as in `decode`.

    Returns:
        The source without the clips that failed (in its `skipped`), with remarks in its `notes`.

    Raises:
        DataError: more clips failed than allowed, or all.
        UsageError: an option out of range.
        WriteError: the cache or the quarantine file cannot be written.
    """
    _count_allowed(max_bad, len(source))
    files = [clip for clip in source.clips if clip.path is not None]
    cache = DecodeCache(Path(cache_dir).expanduser().absolute(), channels, truncated)
    cache.prepare()
    entries: dict[str, CacheEntry] = {}
    bad: list[tuple[Clip, AudioError]] = []
    fetched = map_threads(lambda i: cache.try_fetch(files[i]), len(files), workers=workers)
    for done, (clip, found) in enumerate(zip(files, fetched, strict=True), 1):
        if isinstance(found, AudioError):
            bad.append((clip, found))
        else:
            entries[clip.id] = found
        if progress is not None:
            progress("decode", done, len(files))
    if quarantine_file is not None:
        write_quarantine(Path(quarantine_file), files, bad)
    check_failures(source, [str(error) for _, error in bad], max_bad)
    keys = {id: entry.key for id, entry in entries.items()}
    failed = {clip.id for clip, _ in bad}
    return source.with_clips(
        (clip for clip in source.clips if clip.id not in failed),
        reader=CachedReader(cache.folder, keys, source.reader),
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
        folder: the cache.
        keys: clip id to the key of its entry.
        base: reader of the clips that are not in the cache.
    """

    folder: Path
    keys: dict[str, str]
    base: Reader

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        key = self.keys.get(clip.id)
        if key is None:
            return self.base.read(clip)
        entry = cache_path(self.folder, key)
        try:
            return np.load(entry, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{printable(clip.path or clip.id)}: its decoded copy {entry} cannot be read: "
                f"{error}; start again to replace the copy"
            ) from error

    def key(self, clip: Clip) -> str | None:
        return self.keys.get(clip.id) or self.base.key(clip)


@dataclass(frozen=True)
class DecodeCache:
    """A folder of decoded waveforms, and the options they were decoded with."""

    folder: Path
    channels: Channels
    truncated: Literal["skip", "keep"]

    def prepare(self) -> None:
        """Make the folder and remove what killed runs left behind."""
        with report_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, older_than=ABANDONED)

    def try_fetch(self, clip: Clip) -> CacheEntry | AudioError:
        """Return the entry of a clip's file, or the error of a file that cannot be decoded."""
        try:
            return self.fetch(str(clip.path))
        except AudioError as error:
            return error

    def fetch(self, path: str) -> CacheEntry:
        """Return the entry of a file; write it unless a whole one is there.

        Raises:
            AudioError: the file cannot be decoded.
            DataError: an unexpected error while reading; the message names the file.
            WriteError: the entry cannot be written.
        """
        try:
            key = self._compute_key(path)
            entry = cache_path(self.folder, key)
            notes = read_notes(entry)
            if notes is None:
                notes = self._store(entry, path)
            return CacheEntry(key, notes)
        except (AatjaxError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"{printable(path)}: reading it failed: {error!r}") from error

    def _store(self, entry: Path, path: str) -> tuple[str, ...]:
        """Decode a file into its entry, block by block, and return its notes."""
        notes: list[str] = []
        with report_write_errors(entry), open_output(entry, durable=False) as file:
            file.write(_make_header(0))
            samples = 0
            try:
                for block in self._read(path, notes):
                    file.write(block.tobytes())
                    samples += block.size
            except AudioError as error:
                # Read to the damage: the notes are complete, and the reason is the last one.
                if error.reason != "truncated" or not samples:
                    raise
                if self.truncated == "skip":
                    raise AudioError(
                        "truncated", f"{error}; data.truncated='keep' uses the rest"
                    ) from None
                notes.append(str(error).rpartition(": ")[2])
            text = json.dumps(notes).encode()
            file.write(text + struct.pack("<I", len(text)))
            size = file.tell()
            file.seek(0)
            file.write(_make_header(samples))
            file.seek(0)
            checksum = _hash_start(file, size)
            file.write(checksum)
        return tuple(notes)

    def _read(self, path: str, notes: list[str]) -> Iterator[Int16[np.ndarray, " n"]]:
        try:
            yield from decode_blocks(path, channels=self.channels, notes=notes)
        except OSError as error:  # of the sound, not of the cache
            text = f"{printable(path)}: {error.strerror or error}"
            raise AudioError("unreadable", text) from error

    def _compute_key(self, path: str) -> str:
        options = json.dumps([FORMAT, 16000, self.channels, self.truncated])
        try:
            if not os.path.isfile(path):
                raise AudioError("not a regular file", f"{printable(path)}: is not a regular file")
            content = hash_file(Path(path))
        except OSError as error:
            why = error.strerror or error
            raise AudioError("unreadable", f"{printable(path)}: {why}") from error
        return hash_bytes(f"{content} {options}")


def cache_path(folder: Path, key: str) -> Path:
    """Return the file of a key's entry."""
    return folder / key[:2] / f"{key}.npy"


def read_notes(entry: Path) -> tuple[str, ...] | None:
    """Return the notes kept with an entry; None if it is absent or its checksum does not fit.

    An entry is a .npy file, followed by the notes as JSON, their length (4 bytes, little endian)
    and the SHA-256 of everything before.
    """
    with (
        report_write_errors(entry),
        contextlib.suppress(FileNotFoundError),
        entry.open("rb") as file,
    ):
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


def _make_header(samples: int) -> bytes:
    """Return the head of a .npy file of int16 samples; it is as long for any number of them."""
    head = io.BytesIO()
    fields = {"descr": "<i2", "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


def check_failures(source: Source, errors: Sequence[str], max_bad: float | int) -> None:
    """Refuse a set of which too many clips cannot be used.

    Args:
        source: the set.
        errors: why, for each clip that cannot.
        max_bad: how many may fail, as in `decode_all`.

    Raises:
        DataError: more than `max_bad`, or all.
        UsageError: `max_bad` out of range.
    """
    allowed = _count_allowed(max_bad, len(source))
    if len(errors) > allowed or len(errors) == len(source):
        shown = "; ".join(errors[:MOST_SHOWN])
        more = f"; and {len(errors) - MOST_SHOWN} more" if len(errors) > MOST_SHOWN else ""
        raise DataError(
            f"{source.name}: {len(errors)} of {len(source)} clips cannot be used and "
            f"{min(allowed, len(source) - 1)} may fail: {shown}{more}; fix or remove them, or "
            "raise --data.max-bad"
        )


def _count_allowed(max_bad: float | int, clips: int) -> int:
    number = isinstance(max_bad, int) and not isinstance(max_bad, bool)
    if isinstance(max_bad, bool) or max_bad < 0 or (not number and not max_bad <= 1):
        raise UsageError(
            f"max_bad is {max_bad!r}; give a share from 0.0 to 1.0 or a whole number of clips"
        )
    return int(max_bad) if number else int(round(max_bad * clips, 9))
