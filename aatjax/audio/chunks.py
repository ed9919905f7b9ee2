"""The structure of sound files made of chunks: WAV, RF64, W64, AIFF, CAF; and of AU."""

import contextlib
import dataclasses
import struct
from collections.abc import Iterator
from io import BufferedIOBase

from aatjax.audio.containers import Container, Piece, compute_share, is_open_ended

_MAX_CHUNKS = 4096
_MAX_FORMAT = 1 << 16
_PLAIN_CODECS = (0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE)  # PCM, float, A-law, mu-law, extensible
_CODECS = (*_PLAIN_CODECS, 0x0002, 0x0011, 0x0031, 0x0038, 0x0040)  # and ADPCM, GSM, NMS
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}
"""Bytes of a sample by the encoding of an AU file."""
_CAF_CHUNKS = {b"data", b"free", b"chan", b"info", b"peak", b"mark", b"regn", b"inst", b"kuki"}
_CAF_CHUNKS |= {b"strg", b"midi", b"ovvw", b"uuid", b"umid", b"edct", b"pakt"}
_LISTS = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"fact", b"JUNK", b"junk", b"cue ", b"PEAK")


def _walk(
    file: BufferedIOBase, at: int, size: int, header: str, align: int, counts_header: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, length) of the body of each chunk, with the file at its body.

    A chunk of odd length whose padding was forgotten is followed too.
    """
    form = struct.Struct(header)
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        name, length = form.unpack(file.read(form.size))
        at += form.size
        length -= form.size if counts_header else 0
        yield name, at, length
        at += max(0, length + -length % align)
        if align == 2 and length % 2 and _is_name(file, at - 1) and not _is_name(file, at):
            at -= 1
        if at >= size:
            return


def _is_name(file: BufferedIOBase, at: int) -> bool:
    """Whether four printable characters, such as the name of a chunk, lie at an offset."""
    file.seek(at)
    name = file.read(4)
    return len(name) == 4 and name.isascii() and name.decode().isprintable()


def _ends_in_chunks(file: BufferedIOBase, at: int, size: int, order: str) -> bool:
    """Whether nothing or a list of chunks lies from an offset to the end."""
    if size - at < 8:
        return True
    try:
        for name, body, length in _walk(file, at, size, order + "4sI", 2):
            if not _is_name(file, body - 8) or (body + length > size and name not in _LISTS):
                return False
    except struct.error:  # fewer bytes than a header are left
        return True
    return True


def inspect_wav(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of RIFF, RIFX and RF64.

    Where libsndfile would read less than there is, it is given a header of its own: for a length
    of 0 (of a streaming writer), for one that ends inside the sound, after forgotten padding.
    """
    file.seek(0)
    order = ">" if file.read(4) == b"RIFX" else "<"
    (outer,) = struct.unpack(order + "I", file.read(4))
    layout, long_length, expected, padded = b"", None, 12, True
    for name, at, length in _walk(file, 12, size, order + "4sI", 2):
        padded = padded and at - 8 == expected
        expected = at + length + length % 2
        if name == b"ds64":
            outer, long_length = struct.unpack("<QQ", file.read(16))
        elif name == b"fmt ":
            layout = file.read(min(length, _MAX_FORMAT))
        elif name == b"data":
            if length == 0xFFFFFFFF and long_length:
                length = long_length
            return _inspect_data(file, size, _Data(order, outer + 8, layout, padded, at, length))
    return Container("wav")


@dataclasses.dataclass(frozen=True)
class _Data:
    """The data chunk of a WAV.

    Attributes:
        order: byte order.
        riff_end: offset at which the RIFF ends by its own length.
        layout: body of the format chunk.
        padded: whether the chunks before are padded to even lengths.
        at: offset of the body.
        length: of the body, as stated.
    """

    order: str
    riff_end: int
    layout: bytes
    padded: bool
    at: int
    length: int

    def make_header(self, length: int) -> bytes:
        """Return the header of a WAV with `length` bytes of the same format and nothing else."""
        form = struct.Struct(self.order + "4sI")
        body = b"WAVE" + form.pack(b"fmt ", len(self.layout)) + self.layout
        body += bytes(len(self.layout) % 2)
        outer = min(0xFFFFFFFF, len(body) + 8 + length)
        magic = b"RIFX" if self.order == ">" else b"RIFF"
        return form.pack(magic, outer) + body + form.pack(b"data", min(0xFFFFFFFF, length))


def _inspect_data(file: BufferedIOBase, size: int, data: _Data) -> Container:
    """Decide where the sound of a WAV ends."""
    at, length = data.at, data.length
    riff_end = data.riff_end if at < data.riff_end <= size else size
    end = at + length
    notes: tuple[str, ...] = ()
    if length == 0:
        if _starts_riff(file, at):
            return Container("wav", frames=0, end=at, pieces=((0, at),))
        if _ends_in_chunks(file, at, size, data.order):
            return Container("wav", frames=0)
        data_end = end = riff_end
    elif is_open_ended(length):
        data_end = end = size
    else:
        data_end, end = end, end + length % 2
        if _starts_riff(file, data_end):
            end = data_end
        elif end < riff_end and not _starts_riff(file, end):
            if _ends_in_chunks(file, end, riff_end, data.order):
                end = riff_end
            else:
                data_end = end = riff_end
                notes = (f"data chunk of {end - at} bytes states {length}",)
    stated = data_end - at
    pieces: tuple[Piece, ...] | None = None
    if data.layout and (not data.padded or stated != length):
        pieces = (data.make_header(stated), (at, data_end))
    elif end < size:
        pieces = ((0, end),)
    codec, _, _, _, align = struct.unpack(data.order + "HHIIH", data.layout[:14])
    return Container(
        "wav",
        compute_share(stated, size - at),
        stated // align if align and codec in _PLAIN_CODECS else None,
        pieces=pieces,
        end=min(end, size),
        notes=notes,
        needs_ffmpeg=codec not in _CODECS,
    )


def _starts_riff(file: BufferedIOBase, at: int) -> bool:
    """Whether another WAV begins at an offset."""
    file.seek(at)
    head = file.read(12)
    return head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE"


def inspect_w64(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of W64."""
    file.seek(16)
    (outer,) = struct.unpack("<Q", file.read(8))
    layout = b""
    for name, at, length in _walk(file, 40, size, "<4s12xQ", 8, counts_header=True):
        if name == b"fmt ":
            layout = file.read(14)
        elif name == b"data":
            if length <= 0 or length >= 1 << 61:
                break
            codec, _, _, _, align = struct.unpack("<HHIIH", layout)
            end = max(outer, at + length) if outer <= size else at + length
            return Container(
                "w64",
                compute_share(length, size - at),
                length // align if align and codec in _PLAIN_CODECS else None,
                pieces=((0, at + length),) if at + length < size else None,
                end=min(end, size),
            )
    return Container("w64")


def inspect_aiff(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of AIFF and AIFC."""
    file.seek(4)
    (outer,) = struct.unpack(">I", file.read(4))
    end = outer + 8 if 12 < outer + 8 <= size else size
    frames, share = None, 1.0
    with contextlib.suppress(struct.error):  # the last chunk may lack its padding
        for name, at, length in _walk(file, 12, end, ">4sI", 2):
            if name == b"COMM":
                _, frames = struct.unpack(">HI", file.read(6))
            elif name == b"SSND" and length and not is_open_ended(length):
                if at + length > end:
                    end = size
                share = compute_share(length, size - at)
    pieces: tuple[Piece, ...] | None = ((0, end),) if end < size else None
    return Container("aiff", share, frames if share < 1.0 else None, pieces=pieces, end=end)


def inspect_au(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of AU."""
    file.seek(4)
    start, length, encoding, _, channels = struct.unpack(">5I", file.read(20))
    if length == 0 or is_open_ended(length):
        return Container("au")
    frame = channels * _AU_BYTES.get(encoding, 0)
    return Container(
        "au",
        compute_share(length, size - start),
        length // frame if frame else None,
        end=min(start + length, size),
    )


def inspect_caf(file: BufferedIOBase, size: int) -> Container:
    """Read the structure of CAF; libsndfile is given the right length of a truncated one."""
    per_packet, in_packet = 0, 0
    found = Container("caf", end=size)
    with contextlib.suppress(struct.error):
        for name, at, length in _walk(file, 8, size, ">4sQ", 1):
            if name == b"desc":
                per_packet, in_packet = struct.unpack(">16xII", file.read(24))
            elif name == b"data" and length < 1 << 61:  # else -1: to the end of the file
                frames = (length - 4) // per_packet * in_packet if per_packet else None
                share = compute_share(length, size - at)
                cut: tuple[Piece, ...] = ((0, at - 8), struct.pack(">Q", size - at), (at, size))
                found = Container("caf", share, frames, pieces=cut if share < 1 else None, end=size)
            elif name not in _CAF_CHUNKS:
                return dataclasses.replace(found, end=at - 12)
    return found
