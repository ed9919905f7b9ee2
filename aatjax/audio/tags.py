"""Tags of metadata before, between and behind sounds: ID3v2, ID3v1 and APE."""

import struct
from io import BufferedIOBase

_MOST_TAGS = 100
_ZEROS = 1 << 20


def skip_tags(file: BufferedIOBase, at: int, size: int) -> int:
    """Return the offset behind the tags and zero bytes that begin at an offset.

    Of a tag whose length cannot be right only the header is skipped.

    Args:
        file: an open file.
        at: offset to begin at.
        size: bytes of the file, the greatest offset that is returned.
    """
    for _ in range(_MOST_TAGS):
        length = _measure_tag(file, at, size)
        if length == 0:
            break
        at += length
    return at


def _measure_tag(file: BufferedIOBase, at: int, size: int) -> int:
    """Return the bytes of the tag or of the zeros at an offset, 0 without any."""
    file.seek(at)
    head = file.read(32)
    rest = size - at
    if head[:3] == b"ID3" and len(head) >= 10:
        a, b, c, d = head[6:10]
        length = 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
        return length if max(a, b, c, d) < 0x80 and length <= rest else 10
    if head[:8] == b"APETAGEX" and len(head) == 32:
        length, _, flags = struct.unpack("<III", head[12:24])
        length += 32 if flags >> 29 & 1 else 0  # a header, with its footer in the length
        return length if 32 <= length <= rest else 32
    if head[:3] == b"TAG" and rest == 128:
        return 128
    if head[:1] == b"\0":
        file.seek(at)
        zeros = file.read(_ZEROS)
        return len(zeros) - len(zeros.lstrip(b"\0"))
    return 0
