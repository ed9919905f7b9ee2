"""Damaged and hostile sound files: every reader ends in a clip or in one sentence, soon."""

import io
import os
import struct
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fuzzing import Cases, run

from aatjax.audio.decode import decode, decode_blocks, list_audio
from aatjax.audio.streams import DecoderError
from aatjax.doctor.clip_checks import measure_original
from aatjax.errors import DataError, UsageError

COUNT = int(os.environ.get("AATJAX_FUZZ", "40"))
"""Mutations of each format; 2,000 take some 15 minutes of CPU time."""
RATE = 8000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are Linux's"),
]


def read_every_way(path: Path) -> None:
    """Decode a file whole, in blocks, at its start and to measure it; list it by its content."""
    refused = None
    for read in (_read_whole, _read_start, _measure, lambda path: list_audio(path.parent)):
        try:
            read(path)
        except DecoderError as error:
            refused = refused or DataError(str(error))
        except (DataError, UsageError) as error:
            refused = refused or error
    if refused:
        raise refused


def _read_whole(path: Path) -> None:
    clip = decode(path, truncated="keep")
    assert all(note.isprintable() for note in clip.notes)
    blocks = []
    try:
        for block in decode_blocks(path.read_bytes()):
            blocks.append(block)
    except DataError:
        assert any(note.startswith("truncated") for note in clip.notes) or not blocks
    if blocks:
        np.testing.assert_array_equal(np.concatenate(blocks), clip.waveform)


def _read_start(path: Path) -> None:
    decode(path, max_seconds=0.05, channels="left", truncated="keep")


def _measure(path: Path) -> None:
    measure_original(str(path))


def content(kind: str, subtype: str | None = None, channels: int = 1) -> bytes:
    rng = np.random.default_rng(channels)
    samples = 16_000 if kind in ("FLAC", "OGG") else 3200  # several frames or pages
    sound = 0.2 * rng.normal(0, 0.5, (samples, channels)).clip(-2, 2)
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format=kind, subtype=subtype)
    return file.getvalue()


def id3(length: int, stated: int | None = None, flags: int = 0) -> bytes:
    size = length if stated is None else stated
    sizes = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0" + bytes([flags]) + sizes + np.random.default_rng(length).bytes(length)


def adts(frames: int) -> bytes:
    """Frames of raw AAC, random inside."""
    rng = np.random.default_rng(frames)
    data = b""
    for length in rng.integers(107, 307, frames).tolist():
        head = [0xFF, 0xF1, 0x50, 0x80 | length >> 11, length >> 3 & 255, (length & 7) << 5 | 31]
        data += bytes([*head, 0xFC]) + rng.bytes(length - 7)
    return data


def wav(layout: bytes, data: bytes = bytes(2000), stated: int | None = None, extra: bytes = b""):
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout + extra
    chunks += b"data" + struct.pack("<I", len(data) if stated is None else stated) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def make_wav_attacks() -> tuple[bytes, ...]:
    """Every field of a WAV at its limits, and chunks inside and after each other."""
    fields = {
        "codec": (0, 1, 2, 3, 0x11, 0x31, 0x55, 0x161, 0xFFFE, 0xFFFF),
        "channels": (0, 1, 2, 255, 1024, 0xFFFF),
        "rate": (0, 1, 8000, 2**31, 2**32 - 1),
        "align": (0, 1, 2, 0xFFFF),
        "bits": (0, 1, 8, 16, 24, 32, 64, 0xFFFF),
    }
    usual = {"codec": 1, "channels": 1, "rate": RATE, "align": 2, "bits": 16}
    layouts = [usual]
    for (a, first), (b, second) in product(fields.items(), fields.items()):
        if a < b:
            layouts += [{**usual, a: x, b: y} for x, y in product(first, second)]
    packed = [
        struct.pack(
            "<HHIIHH", x["codec"], x["channels"], x["rate"], RATE * 2, x["align"], x["bits"]
        )
        for x in layouts
    ]
    plain = packed[0]
    whole = wav(plain)
    sizes = (0, 1, 1999, 2001, 4000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
    attacks = [wav(layout) for layout in packed]
    attacks += [wav(plain, stated=size) for size in sizes]
    attacks += [whole[:4] + struct.pack("<I", size) + whole[8:] for size in sizes]
    attacks += [wav(plain, extra=b"note" + struct.pack("<I", size) + b"hello") for size in sizes]
    attacks += [wav(plain, extra=b"LIST\0\0\0\0" * 5000), wav(plain, whole), wav(b"", whole)]
    attacks += [whole * 3000, wav(plain, b"") * 5000, wav(plain[:3]), wav(plain * 4000)]
    long_sizes = struct.pack("<QQQI", 2**64 - 1, 2**64 - 1, 2**64 - 1, 0)
    ds64 = b"ds64" + struct.pack("<I", 28) + long_sizes
    attacks += [b"RF64" + b"\xff" * 4 + b"WAVE" + ds64 + wav(plain, stated=2**32 - 1)[12:]]
    return tuple(attacks)


def make_flac_attacks() -> tuple[bytes, ...]:
    """Metadata that lies about its length, the rate, the channels and the number of samples."""
    whole = content("FLAC")
    attacks = [whole * 100, whole[:42] + b"\x01\0\0\0" * 5000 + whole[42:]]
    attacks += [whole[:5] + size + whole[8:] for size in (b"\0\0\0", b"\0\0\1", b"\xff\xff\xff")]
    for at, width in product(range(8, 42), (1, 4)):
        attacks += [whole[:at] + value * width + whole[at + width :] for value in (b"\0", b"\xff")]
    for kind in range(1, 128, 9):
        attacks.append(whole[:42] + bytes([kind]) + b"\xff\xff\xff" + whole[42:])
    return tuple(attacks)


def make_ogg_attacks(whole: bytes) -> tuple[bytes, ...]:
    """Pages that lie about their position, stream, number, checksum and length."""
    pages = [i for i in range(len(whole)) if whole[i : i + 4] == b"OggS"]
    attacks = [whole * 100, whole[: pages[-1]] * 50, b"OggS" * 20000, whole + b"OggS"]
    attacks += [whole[: pages[-1] + 27], b"".join(whole[i : i + 28] for i in pages)]
    for page, (at, width) in product(pages, ((4, 1), (5, 1), (6, 8), (14, 4), (18, 4), (26, 1))):
        for value in (b"\0", b"\x01", b"\x7f", b"\xff"):
            attacks.append(whole[: page + at] + value * width + whole[page + at + width :])
    return tuple(attacks)


def make_mp3_attacks() -> tuple[bytes, ...]:
    """Tags and frame counts that lie, headers of every kind, frames without content."""
    whole = content("MP3")
    first = whole.index(whole[:2], 10)
    attacks = [whole * 300, whole[:first] * 5000, whole[first:], b"\xff" * 50_000]
    for stated, flags in product((0, 1, 100, 2**28 - 1), (0, 0x10, 0xFF)):
        attacks += [id3(100, stated, flags) + whole, id3(100, stated, flags)]
    attacks += [id3(10) * 3000 + whole, id3(0) * 30_000, whole + id3(10, 2**28 - 1)]
    attacks += [b"APETAGEX" + b"\xff" * 24 + whole, whole + b"APETAGEX" + bytes(24)]
    at = whole.index(b"Xing")
    for offset, value in product((4, 8, 12, 120, 141), (0, 1, 2**31, 2**32 - 1)):
        changed = struct.pack(">I", value)
        attacks.append(whole[: at + offset] + changed + whole[at + offset + 4 :])
    for second, third in product(range(0xE0, 0x100), range(0, 256, 5)):
        attacks.append(bytes([0xFF, second, third, 0xC0]).ljust(144, b"\0") * 6)
    return tuple(attacks)


def make_other_attacks(kind: str) -> tuple[bytes, ...]:
    """Each aligned field of a header at its limits, in both byte orders."""
    whole = content(kind)
    attacks = [whole * 300]
    for at, width in product(range(4, 96, 2), (2, 4, 8)):
        for value in (0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1):
            field = value.to_bytes(width, "big")
            attacks.append(whole[:at] + field + whole[at + width :])
    return tuple(attacks)


SAMPLES = {
    "wav": [content("WAV"), content("WAV", "FLOAT", 2), content("WAV", "IMA_ADPCM", 2)],
    "wav-codecs": [content("WAV", kind) for kind in ("ULAW", "MS_ADPCM", "GSM610", "PCM_24")],
    "rf64": [content("RF64"), content("RF64", "PCM_24", 2)],
    "w64": [content("W64"), content("W64", "DOUBLE", 2)],
    "flac": [content("FLAC"), content("FLAC", "PCM_24", 2)],
    "vorbis": [content("OGG", "VORBIS"), content("OGG", "VORBIS", 2)],
    "opus": [content("OGG", "OPUS"), content("OGG", "OPUS", 2)],
    "mp3": [content("MP3"), id3(300) + content("MP3", channels=2), content("MP3")[216:]],
    "aiff": [content("AIFF"), content("AIFF", "FLOAT", 2), content("AIFF", "IMA_ADPCM")],
    "au": [content("AU"), content("AU", "ULAW", 2)],
    "caf": [content("CAF"), content("CAF", "ALAC_16", 2)],
    "aac": [adts(20), id3(30) + adts(20)],
    "mp4": [b"\0\0\0\x20ftypM4A " + bytes(24) + b"\0\0\1\0moov" + bytes(248)],
    "rare": [content(k) for k in ("VOC", "NIST", "IRCAM", "SVX", "PAF", "PVF", "MAT4", "MAT5")]
    + [content(k) for k in ("HTK", "AVR")],
    "all": [id3(20) + content("FLAC"), content("WAV") + content("OGG"), content("MP3") * 2],
}
ATTACKS = {
    "wav": make_wav_attacks,
    "flac": make_flac_attacks,
    "vorbis": lambda: make_ogg_attacks(content("OGG", "VORBIS")),
    "opus": lambda: make_ogg_attacks(content("OGG", "OPUS")),
    "mp3": make_mp3_attacks,
    "aiff": lambda: make_other_attacks("AIFF"),
    "au": lambda: make_other_attacks("AU"),
    "caf": lambda: make_other_attacks("CAF"),
    "w64": lambda: make_other_attacks("W64"),
    "rf64": lambda: make_other_attacks("RF64"),
}


GROUPS = {
    "chunks": ("wav", "wav-codecs", "rf64", "w64", "aiff", "au", "caf"),
    "frames": ("flac", "vorbis", "opus", "mp3"),
    "others": ("aac", "mp4", "rare", "all"),
}
"""Kinds whose cases are read by one process; samples of a group are spliced with each other."""


@pytest.mark.parametrize("group", GROUPS)
def test_damaged_sounds_end_in_a_clip_or_a_sentence(group: str) -> None:
    kinds = GROUPS[group]
    step = 1 if COUNT >= 1000 else 13  # every thirteenth attack in the sample
    samples = tuple(sample for kind in kinds for sample in SAMPLES[kind])
    attacks = tuple(a for kind in kinds if kind in ATTACKS for a in ATTACKS[kind]()[::step])
    report = run(read_every_way, Cases(samples, attacks, COUNT * len(kinds), seed=20), name="case")
    print(f"{group}: {report}")  # shown by pytest -s
    assert not report.problems, "\n".join(report.problems)
    assert report.accepted > report.calls / 10


def test_every_kind_is_in_a_group() -> None:
    assert sorted(SAMPLES) == sorted(kind for kinds in GROUPS.values() for kind in kinds)


class LongError(DataError):
    """An error whose message is not made one line, as those of the package are."""

    def __str__(self) -> str:
        return "two\nlines"


def misbehave(path: Path) -> None:
    """Do what the runner must notice, by the first letter of the file."""
    match path.read_bytes()[:1]:
        case b"e":
            raise KeyError("foreign")
        case b"m":
            np.ones(1 << 28)
        case b"p":
            os.write(2, b"printed")
        case b"t":
            while True:
                pass
        case b"d":
            os._exit(7)
        case b"l":
            raise LongError


def test_the_runner_notices_every_kind_of_misbehaviour() -> None:
    report = run(misbehave, Cases(tuple(letter.encode() for letter in "fempldt"), count=0))
    texts = ["KeyError", "MemoryError", "printed", "several lines", "code 7", "CPU s"]
    assert report.calls == 7 and report.accepted == 2
    assert len(report.problems) == 6
    for number, (problem, text) in enumerate(zip(report.problems, texts, strict=True), 1):
        assert problem.startswith(f"case {number}: ") and text in problem
