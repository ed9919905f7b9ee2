"""Recognises sound files by their content."""

import dataclasses
import struct
from io import BufferedIOBase

from aatjax.audio.chunks import (
    inspect_aiff,
    inspect_au,
    inspect_caf,
    inspect_w64,
    inspect_wav,
)
from aatjax.audio.containers import Container, SplicedFile, detect_kind
from aatjax.audio.mp3 import SEARCH, find_frames, inspect_mp3
from aatjax.audio.pages import find_flac_end, find_ogg_end, inspect_ogg
from aatjax.audio.tags import skip_tags

_INSPECTORS = {
    "wav": inspect_wav,
    "w64": inspect_w64,
    "aiff": inspect_aiff,
    "au": inspect_au,
    "caf": inspect_caf,
    "ogg": inspect_ogg,
    "flac": lambda file, size: Container("flac", counted=True),
}


def find_sound(file: BufferedIOBase, size: int, at: int = 0) -> tuple[str, int]:
    """Return the kind of the sound that begins at an offset, or behind tags there, and where.

    The frames of an MP3 may also begin behind up to 64 kB of other data.

    Args:
        file: an open file, of `size` bytes.
        at: offset to begin at.
    """
    file.seek(at)
    is_known = detect_kind(file.read(16)) != "other"  # an MP4 begins with zeros too
    start = at if is_known else skip_tags(file, at, size)
    file.seek(start)
    data = file.read(SEARCH)
    kind = detect_kind(data[:16])
    if kind == "other" and _is_adts(data):
        kind = "aac"
    if kind == "other" and (first := find_frames(data, start + len(data) >= size)) >= 0:
        return "mp3", start + first
    return kind, start


def _is_adts(data: bytes) -> bool:
    """Whether two headers of raw AAC lie a frame length apart (ISO/IEC 13818-7, ADTS)."""
    at = 0
    for _ in range(2):
        head = data[at : at + 7]
        if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
            return False
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if length < 7:
            return False
        at += length
        if at == len(data):
            return True
    return True


def inspect_container(
    file: BufferedIOBase, size: int, kind: str, start: int = 0, seconds: float | None = None
) -> Container:
    """Read the structure of the sound that begins at an offset, and rewind the file.

    Args:
        file: an open file, of `size` bytes.
        kind, start: from `find_sound`.
        seconds: length after which decoding ends, if any.

    Returns:
        Its offsets are those of the file.
    """
    try:
        if kind == "mp3":
            return inspect_mp3(file, size, start, seconds)
        inside = SplicedFile(file, ((start, size),)) if start else file
        inspect = _INSPECTORS.get(kind)
        found = inspect(inside, size - start) if inspect else Container(kind)
        return _shift(found, start, size) if start else found
    except struct.error:  # the file ends inside a header
        return Container(pieces=((start, size),))
    finally:
        file.seek(0)


def _shift(container: Container, start: int, size: int) -> Container:
    """The structure of a sound that begins at `start`, from one measured from there."""
    pieces = container.pieces or ((0, size - start),)
    moved = (p if isinstance(p, bytes) else (p[0] + start, p[1] + start) for p in pieces)
    end = None if container.end is None else container.end + start
    return dataclasses.replace(container, pieces=tuple(moved), end=end)


def find_end(
    file: BufferedIOBase, size: int, container: Container, start: int, position: int
) -> int:
    """Return the offset behind the sound that begins at `start`.

    Args:
        file: an open file, of `size` bytes.
        container: the structure of the sound.
        start: its offset.
        position: bytes of it that its decoder has read.
    """
    if container.end is not None:
        return container.end
    inside = SplicedFile(file, ((start, size),))
    if container.kind == "ogg":
        return start + find_ogg_end(inside, size - start)
    if container.kind == "flac":
        return start + find_flac_end(inside, size - start, position)
    return size
