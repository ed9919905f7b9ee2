"""What the header of a sound file promises, read without decoding it.

libsndfile returns what is left of a cut WAV, RF64, W64, AIFF, AU, OGG or MP3 file without a word.
The lengths written in the file tell whether something is missing. Nothing here trusts the file:
walks are bounded, and sizes are only compared, never allocated.
"""

import dataclasses
import struct
from io import BufferedIOBase

_MAX_CHUNKS = 4096
_MAX_HEADER = 1 << 20
_MP3_SEARCH = 8192
_MANY_MP3_FRAMES = 1 << 24  # five days
_PLAIN_CODECS = (0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE)  # PCM, float, A-law, mu-law, extensible


@dataclasses.dataclass(frozen=True)
class Container:
    """What the file says about itself.

    Attributes:
        kind: 'wav', 'w64', 'aiff', 'au', 'flac', 'ogg', 'mp3' or 'other'.
        share: part of the promised sound data that is in the file, 1.0 when nothing is missing or
            when the file makes no promise.
        frames: sample frames promised, None when that is not known.
        counted: the decoder's own frame count comes from the file and not from an estimate.
        splice: (head, start): the decoder is to read `head` and then the file from `start` on. A
            WAV length of 0 left behind by a streaming writer, or an MP3 without a frame count,
            would make libsndfile stop early.
    """

    kind: str = "other"
    share: float = 1.0
    frames: int | None = None
    counted: bool = False
    splice: tuple[bytes, int] | None = None


def inspect_container(file: BufferedIOBase, size: int) -> Container:
    """Reads the structure of an open sound file of `size` bytes and rewinds it."""
    file.seek(0)
    head = file.read(16)
    try:
        if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
            return _wav(file, size, ">" if head[:4] == b"RIFX" else "<")
        if head[:4] == b"riff" and head[4:16].hex() == "2e91cf11a5d628db04c10000":
            return _w64(file, size)
        if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
            return _aiff(file, size)
        if head[:4] == b".snd":
            return _au(file, size)
        if head[:4] == b"fLaC":
            return Container("flac", counted=True)
        if head[:4] == b"OggS":
            return _ogg(file, size)
        if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
            return _mp3(file, head)
        return Container()
    except struct.error:  # the file ends inside a header
        return Container()
    finally:
        file.seek(0)


def _share(promised: int, present: int) -> float:
    return 1.0 if promised <= present else max(present, 0) / promised


def _open_ended(length: int) -> bool:
    """Lengths that writers to a pipe leave in place of the one they cannot know."""
    return length >= 0xFFFFFF00 or 0x7FFFF000 <= length <= 0x80000000


def _wav(file: BufferedIOBase, size: int, order: str) -> Container:
    file.seek(4)
    (outer,) = struct.unpack(order + "I", file.read(4))
    at, align, codec, long_length = 12, 0, 0, None
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = struct.unpack(order + "4sI", file.read(8))
        if name == b"ds64":
            _, long_length = struct.unpack("<QQ", file.read(16))
        elif name == b"fmt ":
            codec, _, _, _, align = struct.unpack(order + "HHIIH", file.read(14))
        elif name == b"data":
            present = size - at - 8
            if length == 0xFFFFFFFF and long_length:
                length = long_length
            elif length == 0 and present > 0 and outer + 8 != size:
                if at > _MAX_HEADER:
                    return Container("wav")
                file.seek(0)
                return Container("wav", splice=(file.read(at + 4) + b"\xff" * 4, at + 8))
            elif length == 0 or _open_ended(length):
                return Container("wav")
            frames = length // align if align and codec in _PLAIN_CODECS else None
            return Container("wav", _share(length, present), frames)
        at += 8 + length + (length & 1)
        if at >= size:
            break
    return Container("wav")


def _w64(file: BufferedIOBase, size: int) -> Container:
    at, align, codec = 40, 0, 0
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = struct.unpack("<4s12xQ", file.read(24))
        if name == b"fmt ":
            codec, _, _, _, align = struct.unpack("<HHIIH", file.read(14))
        elif name == b"data":
            if length <= 24 or length >= 1 << 62:
                return Container("w64")
            frames = (length - 24) // align if align and codec in _PLAIN_CODECS else None
            return Container("w64", _share(length - 24, size - at - 24), frames)
        at += max(24, length + (-length % 8))
        if at >= size:
            break
    return Container("w64")


def _aiff(file: BufferedIOBase, size: int) -> Container:
    at, frames, share = 12, None, 1.0
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        header = file.read(8)
        if len(header) < 8:
            break
        name, length = struct.unpack(">4sI", header)
        if name == b"COMM":
            _, frames = struct.unpack(">HI", file.read(6))
        elif name == b"SSND" and length and not _open_ended(length):
            share = _share(length, size - at - 8)
        at += 8 + length + (length & 1)
        if at >= size:
            break
    return Container("aiff", share, frames if share < 1.0 else None)


def _au(file: BufferedIOBase, size: int) -> Container:
    file.seek(4)
    start, length = struct.unpack(">II", file.read(8))
    if length == 0 or _open_ended(length):
        return Container("au")
    return Container("au", _share(length, size - start))


def _ogg(file: BufferedIOBase, size: int) -> Container:
    """The last page must be whole and flagged as the end of its stream (RFC 3533, section 6).

    How much is missing cannot be told, so the share is 0 when anything is.
    """
    file.seek(max(0, size - 2 * 65307))  # a page has at most 65307 bytes
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return Container("ogg")
    page = tail[at:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return Container("ogg", 0.0)
    whole = len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return Container("ogg", 1.0 if whole and page[5] & 4 else 0.0)


def _mp3(file: BufferedIOBase, head: bytes) -> Container:
    """Looks for a frame count (Xing, Info or VBRI) in the first frame after an ID3v2 tag.

    Without one libsndfile trusts an estimate from the first bit rate and drops what is beyond it,
    half of a clip of variable bit rate for example. An empty first frame with a count that is far
    too high lets it read to the end of the file.
    """
    at = 0
    if head[:3] == b"ID3":
        a, b, c, d = head[6:10]
        at = 10 + (a << 21 | b << 14 | c << 7 | d)
    file.seek(at)
    data = file.read(_MP3_SEARCH)
    for i in range(len(data) - 4):
        if data[i] == 0xFF and (frame := _empty_mp3_frame(data[i : i + 4])):
            if any(tag in data[i : i + 64] for tag in (b"Xing", b"Info", b"VBRI")):
                return Container("mp3", counted=True)
            return Container("mp3", splice=(frame, at + i))
    return Container("mp3")


def _empty_mp3_frame(header: bytes) -> bytes:
    """A Xing frame of the same version, rate and mode; b'' if this is no layer III header."""
    _, b, c, d = header
    version, sampling = b >> 3 & 3, c >> 2 & 3
    if b & 0xE6 != 0xE2 or version == 1 or c >> 4 in (0, 15) or sampling == 3:
        return b""
    rate = (44100, 48000, 32000)[sampling] >> (0, 1, 2)[(3, 2, 0).index(version)]
    mono = d >> 6 == 3
    if version == 3:
        length, side = 144 * 128000 // rate, 17 if mono else 32
    else:
        length, side = 72 * 80000 // rate, 9 if mono else 17
    frame = bytes([0xFF, b | 1, 0x90 | sampling << 2, d]) + bytes(side)
    frame += b"Xing" + struct.pack(">II", 1, _MANY_MP3_FRAMES)
    return frame.ljust(length, b"\0")
