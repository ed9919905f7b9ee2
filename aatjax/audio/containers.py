"""The length that the header of a sound file states, read without decoding the file.

libsndfile returns the rest of a truncated WAV, RF64, W64, AIFF, AU, OGG or MP3 file without an
error; the lengths in the file show whether something is missing. Files are not trusted: walks are
bounded, and sizes are only compared, never allocated.
"""

import contextlib
import dataclasses
import struct
from collections.abc import Iterator
from io import BufferedIOBase

_MAX_CHUNKS = 4096
_MAX_HEADER = 1 << 20
_MP3_SEARCH = 8192
_MANY_MP3_FRAMES = 1 << 24  # five days
_PLAIN_CODECS = (0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE)  # PCM, float, A-law, mu-law, extensible


@dataclasses.dataclass(frozen=True)
class Container:
    """The structure of a sound file.

    Attributes:
        kind: see `detect_kind`.
        share: part of the stated sound data that is in the file; 1.0 if nothing is missing or no
            length is stated.
        frames: sample frames stated, None if not known.
        counted: the decoder's own frame count comes from the file and is not an estimate.
        splice: (head, start): decode `head`, then the file from `start` on; libsndfile would stop
            early at a WAV length of 0 (of a streaming writer) or in an MP3 without a frame count.
    """

    kind: str = "other"
    share: float = 1.0
    frames: int | None = None
    counted: bool = False
    splice: tuple[bytes, int] | None = None


def detect_kind(head: bytes) -> str:
    """Return the kind of a sound file from its first 16 bytes.

    One of 'wav' (also RF64), 'w64', 'aiff', 'au', 'flac', 'ogg', 'mp3', 'caf', 'other'.
    """
    kinds = {b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"caff": "caf"}
    if head[:4] in kinds:
        return kinds[head[:4]]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"riff" and head[4:16].hex() == "2e91cf11a5d628db04c10000":
        return "w64"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    synced = len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0
    return "mp3" if synced or head[:3] == b"ID3" else "other"


def inspect_container(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of an open sound file of `size` bytes and rewind it."""
    file.seek(0)
    kind = detect_kind(file.read(16))
    readers = {"wav": _wav, "w64": _w64, "aiff": _aiff, "au": _au, "ogg": _ogg, "mp3": _mp3}
    read = readers.get(kind, lambda *_: Container(kind, counted=kind == "flac"))
    try:
        return read(file, size)
    except struct.error:  # the file ends inside a header
        return Container()
    finally:
        file.seek(0)


def _share(stated: int, present: int) -> float:
    return 1.0 if stated <= present else max(present, 0) / stated


def _open_ended(length: int) -> bool:
    """Whether a length is one that writers to a pipe leave in place of the unknown one."""
    return length >= 0xFFFFFF00 or 0x7FFFF000 <= length <= 0x80000000


def _walk(
    file: BufferedIOBase, at: int, size: int, header: str, align: int, counts_header: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, length) of the body of each chunk, with the file at its body."""
    form = struct.Struct(header)
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = form.unpack(file.read(form.size))
        at += form.size
        length -= form.size if counts_header else 0
        yield name, at, length
        at += max(0, length + -length % align)
        if at >= size:
            return


def _count(length: int, codec: int, align: int) -> int | None:
    """Return the sample frames of a WAV body whose codec has frames of a fixed size."""
    return length // align if align and codec in _PLAIN_CODECS else None


def _wav(file: BufferedIOBase, size: int) -> Container:
    file.seek(0)
    order = ">" if file.read(4) == b"RIFX" else "<"
    (outer,) = struct.unpack(order + "I", file.read(4))
    align, codec, long_length = 0, 0, None
    for name, at, length in _walk(file, 12, size, order + "4sI", 2):
        if name == b"ds64":
            _, long_length = struct.unpack("<QQ", file.read(16))
        elif name == b"fmt ":
            codec, _, _, _, align = struct.unpack(order + "HHIIH", file.read(14))
        elif name == b"data":
            present = size - at
            if length == 0xFFFFFFFF and long_length:
                length = long_length
            elif length == 0 and present > 0 and outer + 8 != size:
                if at > _MAX_HEADER:
                    break
                file.seek(0)
                return Container("wav", splice=(file.read(at - 4) + b"\xff" * 4, at))
            elif length == 0 or _open_ended(length):
                break
            return Container("wav", _share(length, present), _count(length, codec, align))
    return Container("wav")


def _w64(file: BufferedIOBase, size: int) -> Container:
    align, codec = 0, 0
    for name, at, length in _walk(file, 40, size, "<4s12xQ", 8, counts_header=True):
        if name == b"fmt ":
            codec, _, _, _, align = struct.unpack("<HHIIH", file.read(14))
        elif name == b"data":
            if length <= 0 or length >= 1 << 61:
                break
            return Container("w64", _share(length, size - at), _count(length, codec, align))
    return Container("w64")


def _aiff(file: BufferedIOBase, size: int) -> Container:
    frames, share = None, 1.0
    with contextlib.suppress(struct.error):  # the last chunk may lack its padding
        for name, at, length in _walk(file, 12, size, ">4sI", 2):
            if name == b"COMM":
                _, frames = struct.unpack(">HI", file.read(6))
            elif name == b"SSND" and length and not _open_ended(length):
                share = _share(length, size - at)
    return Container("aiff", share, frames if share < 1.0 else None)


def _au(file: BufferedIOBase, size: int) -> Container:
    file.seek(4)
    start, length = struct.unpack(">II", file.read(8))
    if length == 0 or _open_ended(length):
        return Container("au")
    return Container("au", _share(length, size - start))


def _ogg(file: BufferedIOBase, size: int) -> Container:
    """The last page must be whole and flagged as the end of its stream (RFC 3533, section 6).

    How much is missing is not known, so the share is 0 when anything is.
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


def _mp3(file: BufferedIOBase, size: int) -> Container:
    """Look for a frame count (Xing, Info or VBRI) in the first frame after an ID3v2 tag.

    Without one libsndfile estimates the length from the first bit rate and drops what follows,
    such as half of a clip of variable bit rate. An empty first frame with a count that is far too
    high makes it read to the end of the file.
    """
    file.seek(0)
    magic, *_, a, b, c, d = struct.unpack("3s7B", file.read(10))
    at = 10 + (a << 21 | b << 14 | c << 7 | d) if magic == b"ID3" else 0
    file.seek(at)
    data = file.read(_MP3_SEARCH)
    for i in range(len(data) - 4):
        if data[i] == 0xFF and (frame := _empty_mp3_frame(data[i : i + 4])):
            if any(tag in data[i : i + 64] for tag in (b"Xing", b"Info", b"VBRI")):
                return Container("mp3", counted=True)
            return Container("mp3", splice=(frame, at + i))
    return Container("mp3")


def _empty_mp3_frame(header: bytes) -> bytes:
    """Return a Xing frame of the same version, rate and mode; b'' for other than layer III."""
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
