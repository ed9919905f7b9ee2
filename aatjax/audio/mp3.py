"""The frames of an MP3: where they lie, how many are missing, and where another MP3 begins."""

import dataclasses
import functools
import math
import re
import struct
from io import BufferedIOBase

from aatjax.audio.containers import Container, Piece, compute_share
from aatjax.audio.tags import skip_tags

SEARCH = 1 << 16
"""Bytes after the tags in which the first frame must begin."""
_CHUNK = 1 << 20
_MANY_FRAMES = 1 << 24  # five days
_COUNT_SLACK = 2
"""Frames by which the counts of encoders differ: with the one that holds the count, or without."""
_XING_FIELDS = {1: 4, 2: 4, 4: 100, 8: 4}
"""Bytes of the fields of a Xing header by the bit of its flags."""
_SYNC = re.compile(rb"\xff[\xe2-\xff]", re.DOTALL)
_BIT_RATES = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclasses.dataclass(frozen=True)
class Header:
    """What the four bytes at the start of an MPEG audio frame state.

    Attributes:
        form: version, layer, sampling rate and whether it is mono: equal in all frames of a file.
        length: bytes of the frame.
        samples: sample frames in it.
        side: bytes of side information, after which a frame count may lie.
    """

    form: tuple[int, int, int, bool]
    length: int
    samples: int
    side: int


@functools.lru_cache(1024)
def parse_header(four: bytes) -> Header | None:
    """Return the header of a frame of MPEG 1, 2 or 2.5, layer I to III; None for other bytes.

    Frames of free format (without a bit rate) are not supported, nor is AAC (layer 0).
    """
    if len(four) < 4 or four[0] != 0xFF or four[1] & 0xE0 != 0xE0:
        return None
    _, b, c, d = four
    version, layer = b >> 3 & 3, 4 - (b >> 1 & 3)
    if version == 1 or layer == 4 or c >> 4 in (0, 15) or c >> 2 & 3 == 3 or d & 3 == 2:
        return None
    first = version == 3
    rate = (44100, 48000, 32000)[c >> 2 & 3] >> (0 if first else 1 if version == 2 else 2)
    bits = 1000 * _BIT_RATES[first, layer][(c >> 4) - 1]
    padding, mono = c >> 1 & 1, d >> 6 == 3
    if layer == 1:
        length, samples = 4 * (12 * bits // rate + padding), 384
    else:
        samples = 1152 if layer == 2 or first else 576
        length = samples // 8 * bits // rate + padding
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Header((version, layer, rate, mono), length, samples, side)


def find_frames(data: bytes, whole: bool, form: object = None, start: int = 0) -> int:
    """Return the offset of the first frame that another one follows, or -1.

    Headers are a few bits, which other data holds by chance: two are required, a frame length
    apart, and three where there is room for them.

    Args:
        data: bytes to search.
        whole: `data` goes to the end of the file, so that the last frame may be near.
        form: of the frames, by default any.
        start: offset to search from.
    """
    for match in _SYNC.finditer(data, start):
        at = match.start()
        head = parse_header(data[at : at + 4])
        if head is None or form not in (None, head.form):
            continue
        chain, next_at = 1, at + head.length
        while chain < 3 and next_at + 4 <= len(data):
            other = parse_header(data[next_at : next_at + 4])
            if other is None or other.form != head.form:
                break
            chain, next_at = chain + 1, next_at + other.length
        if chain == 3 or (chain == 2 and whole and next_at + 4 > len(data)):
            return at
    return -1


@dataclasses.dataclass
class _Walk:
    """The frames from an offset on.

    Attributes:
        pieces: ranges of the file in which frame follows frame.
        frames: number of frames.
        skipped: bytes between them that are neither frames nor tags.
        end: offset of the first byte behind them.
        form: see `Header`.
    """

    pieces: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    frames: int = 0
    skipped: int = 0
    end: int = 0
    form: object = None


def inspect_mp3(file: BufferedIOBase, size: int, start: int, seconds: float | None) -> Container:
    """Read the structure of an MP3.

    A frame count (Xing, Info or VBRI) in the first frame is compared with the frames there are.
    Without one libsndfile estimates the length from the first bit rate and drops what follows,
    such as half of a clip of variable bit rate: then an empty first frame with a count that is far
    too high makes it read to the end.

    Args:
        file: an open file.
        size: bytes of the file.
        start: offset of the first frame.
        seconds: length after which decoding ends; frames after it are not looked at.
    """
    file.seek(start)
    first = file.read(4096)
    head = parse_header(first[:4])
    if head is None:
        return Container("mp3")
    layer, rate = head.form[1:3]
    most = _MANY_FRAMES if seconds is None else int((seconds + 1) * rate / head.samples) + 2
    walk = _walk_frames(file, start, size, most)
    pieces: list[Piece] = list(walk.pieces)
    if stopped := walk.frames >= most:
        pieces[-1] = (walk.pieces[-1][0], size)
    count = _read_count(first, head) if layer == 3 else None
    if count is None:
        mean = max(1, sum(end - at for at, end in walk.pieces) // walk.frames)
        found, stated = walk.frames, walk.frames + math.ceil(walk.skipped / mean)
    else:
        found, stated = walk.frames - 1, count
        if abs(stated - found) <= _COUNT_SLACK and not walk.skipped:
            stated = found
    if layer == 3 and (count is None or found != stated) and not (stopped and count is not None):
        if count is not None:
            pieces[0] = (start + head.length, walk.pieces[0][1])
        pieces.insert(0, _make_empty_frame(first, head))
    trimmed = sum(_read_delays(first, head) or (0, 0))
    return Container(
        "mp3",
        1.0 if stopped else compute_share(stated, found),
        None if count is None else stated * head.samples - trimmed,
        pieces=tuple(pieces),
        end=size if stopped else walk.end,
    )


def _walk_frames(file: BufferedIOBase, start: int, size: int, most: int) -> _Walk:
    """Follow the frames of one form, until another MP3 begins; damage between them is skipped."""
    walk = _Walk(end=start)
    at, base, data = start, start, b""
    while walk.frames < most and at + 4 <= size:
        if at < base or at + 4096 > base + len(data) < size:
            file.seek(at)
            base, data = at, file.read(_CHUNK)
        head = parse_header(data[at - base : at - base + 4])
        if head is not None and walk.form in (None, head.form) and at + head.length <= size:
            if walk.frames and _read_count(data, head, at - base) is not None:
                break
            if walk.end == at and walk.pieces:
                walk.pieces[-1] = (walk.pieces[-1][0], at + head.length)
            else:
                walk.pieces.append((at, at + head.length))
            walk.form, walk.frames = head.form, walk.frames + 1
            at = walk.end = at + head.length
            continue
        after = skip_tags(file, at, size)
        if after > at:
            at = after
            continue
        found = _find_again(file, at + 1, size)
        if found < 0:
            is_frame = head is not None and head.form == walk.form  # the last one, cut
            if is_frame:
                walk.skipped, walk.end = walk.skipped + size - at, size
            break
        file.seek(found)
        other = parse_header(file.read(4))
        if other is None or other.form != walk.form:
            break
        walk.skipped += found - at
        at = found
    return walk


def _find_again(file: BufferedIOBase, at: int, size: int) -> int:
    """Return the offset of the next frames of any form, or -1."""
    while at + 4 <= size:
        file.seek(at)
        data = file.read(_CHUNK)
        if (found := find_frames(data, at + len(data) >= size)) >= 0:
            return at + found
        if len(data) < _CHUNK:
            break
        at += _CHUNK - 2 * 4096
    return -1


def _read_count(data: bytes, head: Header, start: int = 0) -> int | None:
    """Return the number of frames that a first frame states; None where it states none."""
    at = start + 4 + head.side
    if data[at : at + 4] in (b"Xing", b"Info") and len(data) >= at + 12:
        flags, count = struct.unpack(">II", data[at + 4 : at + 12])
        return count if flags & 1 else 0
    if data[start + 36 : start + 40] == b"VBRI" and len(data) >= start + 54:
        return int(struct.unpack(">I", data[start + 50 : start + 54])[0])
    return None


def _make_empty_frame(first: bytes, head: Header) -> bytes:
    """Return a Xing frame with a very high count, of the form of a first frame.

    The encoder's delay, which decoders remove, is taken from the first frame if it states one.
    """
    version, layer, rate, _ = head.form
    bits = 128 if version == 3 else 80
    index = _BIT_RATES[version == 3, layer].index(bits) + 1
    length = head.samples // 8 * 1000 * bits // rate
    header = bytes([0xFF, first[1] | 1, index << 4 | first[2] & 0x0C, first[3]])
    frame = header + bytes(head.side) + b"Xing" + struct.pack(">II", 1, _MANY_FRAMES)
    if delays := _read_delays(first, head):
        frame += b"LAME".ljust(21, b"\0") + (delays[0] << 12).to_bytes(3, "big")
    return frame.ljust(length, b"\0")


def _read_delays(first: bytes, head: Header) -> tuple[int, int] | None:
    """Return the sample frames that an encoder added at the start and the end, where stated."""
    at = 4 + head.side
    if first[at : at + 4] not in (b"Xing", b"Info") or len(first) < at + 200:
        return None
    flags = first[at + 7]
    tag = at + 8 + sum(length for bit, length in _XING_FIELDS.items() if flags & bit)
    if first[tag : tag + 4] not in (b"LAME", b"Lavc", b"Lavf"):
        return None
    both = int.from_bytes(first[tag + 21 : tag + 24], "big")
    return both >> 12, both & 0xFFF
