"""The structure of a sound file: what its decoder needs to know, and what is checked after it.

libsndfile returns the rest of a truncated file without an error, and the first part of joined
files; the lengths in the file show whether something is missing, and where another sound begins.
Files are not trusted: walks are bounded, and sizes are only compared, never allocated.
"""

import bisect
import dataclasses
import io
from io import BufferedIOBase
from typing import Any

Piece = bytes | tuple[int, int]
"""Bytes as they are, or a range of a file: offset of its first byte, and of the one behind it."""


FFMPEG = {"mp4": "MP4", "matroska": "Matroska", "asf": "WMA", "aac": "AAC"}
"""Kinds that only ffmpeg reads, with their names."""


@dataclasses.dataclass(frozen=True)
class Container:
    """The structure of one sound.

    Attributes:
        kind: see `detect_kind`.
        share: part of the stated sound data that is in the file; 1.0 if nothing is missing or no
            length is stated.
        frames: sample frames stated, None if not known.
        counted: the decoder's own frame count comes from the file and is not an estimate.
        pieces: what the decoder reads in place of the file.
        end: offset behind this sound, where another one may begin; None if not known.
        notes: what is wrong with the lengths in the file.
        needs_ffmpeg: no other decoder reads it.
    """

    kind: str = "other"
    share: float = 1.0
    frames: int | None = None
    counted: bool = False
    pieces: tuple[Piece, ...] | None = None
    end: int | None = None
    notes: tuple[str, ...] = ()
    needs_ffmpeg: bool = False


class SplicedFile(BufferedIOBase):
    """A file made of pieces: bytes, and ranges of another file.

    It never raises for a bad offset: libsndfile seeks to some in damaged files, and an exception
    cannot pass through its callbacks.
    """

    def __init__(self, file: BufferedIOBase, pieces: tuple[Piece, ...]) -> None:
        self._file = file
        size = file.seek(0, io.SEEK_END)
        self._pieces: list[Piece] = []
        self._starts = [0]
        for piece in pieces:
            if not isinstance(piece, bytes):
                piece = (min(piece[0], size), min(piece[1], size))
            length = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            if length > 0:
                self._pieces.append(piece)
                self._starts.append(self._starts[-1] + length)
        self._size = self._starts[-1]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_CUR: self._at, io.SEEK_END: self._size}.get(whence, 0)
        self._at = min(max(0, base + offset), self._size)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        rest = self._size - self._at
        wanted = rest if size is None or size < 0 else min(size, rest)
        parts = []
        while wanted > 0:
            index = bisect.bisect_right(self._starts, self._at) - 1
            piece, inside = self._pieces[index], self._at - self._starts[index]
            if isinstance(piece, bytes):
                data = piece[inside : inside + wanted]
            else:
                self._file.seek(piece[0] + inside)
                data = self._file.read(min(wanted, piece[1] - piece[0] - inside))
            if not data:  # the file has become shorter
                break
            parts.append(data)
            self._at += len(data)
            wanted -= len(data)
        return b"".join(parts)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)


def detect_kind(head: bytes) -> str:
    """Return the kind of a sound file from its first 16 bytes, behind any tag.

    One of 'wav' (also RF64), 'w64', 'aiff', 'au', 'flac', 'ogg', 'caf', those of `FFMPEG` but
    'aac', and 'other'. 'mp3' and 'aac' are found by `aatjax.audio.content.find_sound`.
    """
    kinds = {b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"caff": "caf"}
    kinds |= {b"\x1a\x45\xdf\xa3": "matroska", b"\x30\x26\xb2\x75": "asf"}
    if head[:4] in kinds:
        return kinds[head[:4]]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"riff" and head[4:16].hex() == "2e91cf11a5d628db04c10000":
        return "w64"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    return "mp4" if head[4:8] == b"ftyp" else "other"


def compute_share(stated: int, present: int) -> float:
    """Return the part of the stated bytes that is present."""
    return 1.0 if stated <= present else max(present, 0) / stated


def is_open_ended(length: int) -> bool:
    """Whether a length is one that writers to a pipe leave in place of the unknown one."""
    return length >= 0xFFFFFF00 or 0x7FFFF000 <= length <= 0x80000000
