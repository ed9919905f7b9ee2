"""The structure of sound files that state no length: Ogg and FLAC."""

from collections.abc import Mapping
from io import BufferedIOBase

from aatjax.audio.containers import Container, detect_kind

_CHUNK = 1 << 20
_LONGEST_PAGE = 65307
_READ_AHEAD = 1 << 16
_STARTS = {b"fLaC\0\0\0\x22": 0, b"OggS\0\2" + bytes(8): 0, b"WAVEfmt ": 8, b"WAVEJUNK": 8}
"""Bytes that other data hardly has, and how far behind the start of a sound they lie."""


def inspect_ogg(file: BufferedIOBase, size: int) -> Container:
    """Look at the last page, which must be whole and flagged as an end (RFC 3533, section 6).

    How much is missing is not known, so the share is 0 when anything is.
    """
    start = max(0, size - 2 * _LONGEST_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return Container("ogg")
    page = tail[at:]
    length = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) >= 27 else 27
    is_last = len(page) >= length and bool(page[5] & 4)
    if len(page) <= length:
        return Container("ogg", float(is_last), counted=is_last)
    end = find_ogg_end(file, size)  # libsndfile looks for the last page at the end of the file
    return Container("ogg", float(is_last), counted=is_last, pieces=((0, end),), end=end)


def find_ogg_end(file: BufferedIOBase, size: int) -> int:
    """Return the offset behind the first Ogg of a chain: of the next page that begins a stream."""
    at, end, has_sound = 0, size, False
    while at < size:
        file.seek(at)
        head = file.read(27)
        if head[:4] != b"OggS":
            if has_sound and (detect_kind(head) != "other" or head[:3] == b"ID3"):
                return at
            at = _search(file, at + 1, size, {b"OggS": 0})
            continue
        begins = len(head) == 27 and bool(head[5] & 2)
        if begins and has_sound:
            return at
        has_sound = has_sound or not begins
        segments = file.read(head[26]) if len(head) == 27 else b""
        at += len(head) + len(segments) + sum(segments)
        end = min(at, size)
    return end


def find_flac_end(file: BufferedIOBase, size: int, position: int) -> int:
    """Return the offset behind a FLAC, which states the number of its samples but no length.

    It is that of the next FLAC, Ogg or WAV, else of what the decoder did not come to.

    Args:
        file: a file that begins with a FLAC.
        size: its bytes.
        position: up to which its decoder has read; that is at most 64 kB behind the last frame.
    """
    end = _search(file, max(4, position - _READ_AHEAD), size, _STARTS)
    return position if end == size > position + _READ_AHEAD else end


def _search(file: BufferedIOBase, at: int, size: int, starts: Mapping[bytes, int]) -> int:
    """Return the first offset at which a sound starts; `size` without one."""
    while at < size:
        file.seek(at)
        data = file.read(_CHUNK)
        places = ((data.find(magic), before) for magic, before in starts.items())
        if found := [place - before for place, before in places if place >= before]:
            return at + min(found)
        if len(data) < _CHUNK:
            break
        at += _CHUNK - 16
    return size
