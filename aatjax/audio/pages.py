"""The structure of sound files that state no length: Ogg and FLAC."""

import re
from io import BufferedIOBase

from aatjax.audio.containers import Container

_CHUNK = 1 << 20
_LONGEST_PAGE = 65307
_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)


def inspect_ogg(file: BufferedIOBase, size: int) -> Container:
    """Look at the last page, which must be whole and flagged as an end (RFC 3533, section 6).

    How much is missing is not known, so the share is 0 when anything is.
    """
    file.seek(max(0, size - 2 * _LONGEST_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return Container("ogg")
    page = tail[at:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return Container("ogg", 0.0)
    whole = len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return Container("ogg", 1.0 if whole and page[5] & 4 else 0.0, counted=True)


def find_ogg_end(file: BufferedIOBase, size: int) -> int:
    """Return the offset behind the first Ogg of a chain: of the next page that begins a stream."""
    at, has_sound = 0, False
    while at < size:
        file.seek(at)
        head = file.read(27)
        if head[:4] != b"OggS":
            at = _search(file, at + 1, size, re.compile(b"OggS"))
            continue
        begins = len(head) == 27 and bool(head[5] & 2)
        if begins and has_sound:
            return at
        has_sound = has_sound or not begins
        segments = file.read(head[26]) if len(head) == 27 else b""
        at += len(head) + len(segments) + sum(segments)
    return size


def find_flac_end(file: BufferedIOBase, size: int) -> int:
    """Return the offset of the next FLAC in a file that begins with one; its size without one."""
    return _search(file, 4, size, _FLAC_START)


def _search(file: BufferedIOBase, at: int, size: int, pattern: re.Pattern[bytes]) -> int:
    """Return the offset of the next match, which is at most 8 bytes long; `size` without one."""
    while at < size:
        file.seek(at)
        data = file.read(_CHUNK)
        if match := pattern.search(data):
            return at + match.start()
        if len(data) < _CHUNK:
            break
        at += _CHUNK - 8
    return size
