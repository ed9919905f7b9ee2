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


@dataclasses.dataclass(frozen=True)
class Container:
    """The structure of one sound.

    Attributes:
        kind: see `aatjax.audio.content.detect_kind`.
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


def compute_share(stated: int, present: int) -> float:
    """Return the part of the stated bytes that is present."""
    return 1.0 if stated <= present else max(present, 0) / stated


def is_open_ended(length: int) -> bool:
    """Whether a length is one that writers to a pipe leave in place of the unknown one."""
    return length >= 0xFFFFFF00 or 0x7FFFF000 <= length <= 0x80000000
