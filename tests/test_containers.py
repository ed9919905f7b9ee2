"""Sound files by their content: tags, joined files, wrong lengths, damage, and what is no sound."""

import ctypes
import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aatjax.audio.content import find_sound
from aatjax.audio.decode import AudioError, decode, decode_blocks
from aatjax.audio.listing import list_audio
from aatjax.audio.quiet import silence_libraries
from aatjax.doctor.clip_checks import measure_original

RATE = 16000
KINDS = ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "VORBIS", "OPUS", "MP3"]


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a slow envelope: no two seconds are alike."""
    rng = np.random.default_rng(seed)
    envelope = 0.1 + 0.1 * np.sin(np.arange(samples) / 3000)
    return np.round(envelope * rng.normal(0, 0.5, samples).clip(-2, 2) * 32768) / 32768


def content(samples: np.ndarray, kind: str = "WAV", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    subtype = kind if kind in ("VORBIS", "OPUS") else None
    soundfile.write(file, samples, rate, format="OGG" if subtype else kind, subtype=subtype)
    return file.getvalue()


def id3(length: int, flags: int = 0) -> bytes:
    """An ID3v2 tag with random bytes in it."""
    sizes = bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0))
    footer = bytes(10) if flags & 0x10 else b""
    return (
        b"ID3\4\0" + bytes([flags]) + sizes + np.random.default_rng(length).bytes(length) + footer
    )


def adts(frames: int, seed: int = 0) -> bytes:
    """Frames of raw AAC, random inside."""
    rng = np.random.default_rng(seed)
    data = b""
    for length in rng.integers(107, 307, frames).tolist():
        head = [0xFF, 0xF1, 0x50, 0x80 | length >> 11, length >> 3 & 255, (length & 7) << 5 | 31]
        data += bytes([*head, 0xFC]) + rng.bytes(length - 7)
    return data


def wav(
    pcm: bytes, data: int | None = None, riff: int | None = None, before: bytes = b"", after=b""
) -> bytes:
    """A WAV with lengths of its own."""
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16) + before
    body += b"data" + struct.pack("<I", len(pcm) if data is None else data) + pcm + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def refusal(source: bytes | Path) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode(source)
    assert "\n" not in str(caught.value)
    return caught.value


# --- tags and kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_behind_tags_is_decoded_as_what_it_is(kind: str) -> None:
    whole = content(speech(8000), kind)
    expected = decode(whole)
    assert expected.frames == 8000
    for tags in (id3(20), id3(20) + id3(300), id3(50, flags=0x10), id3(9) + bytes(64)):
        for end in (b"", b"TAG" + bytes(range(125))):
            clip = decode(tags + whole + end)
            np.testing.assert_array_equal(clip.waveform, expected.waveform)
            assert clip.notes == ()


def test_any_tag_before_a_flac() -> None:
    whole = content(speech(1000), "FLAC")
    for length in range(10, 210, 5):
        clip = decode(id3(length) + whole)
        assert (clip.frames, clip.notes) == (1000, ()), length


def test_tags_of_a_wrong_length_do_not_hide_an_mp3() -> None:
    whole = content(speech(8000), "MP3")
    for stated in (0, 5, 2**28 - 1):
        sizes = bytes(stated >> shift & 0x7F for shift in (21, 14, 7, 0))
        assert decode(b"ID3\4\0\0" + sizes + bytes(range(1, 60)) + whole).frames == 8000
    assert "no sound behind its ID3 tag" in str(refusal(id3(500)))


@pytest.mark.parametrize("tag", [b"", id3(30)])
def test_raw_aac_is_no_mp3(tag: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for seed in range(50):
        data = tag + adts(30, seed)
        assert find_sound(io.BytesIO(data), len(data)) == ("aac", len(tag))
    (tmp_path / "clip.mp3").write_bytes(data)
    assert "AAC needs ffmpeg: install it" in str(refusal(tmp_path / "clip.mp3"))


def test_an_mp3_needs_two_frames_a_frame_length_apart() -> None:
    whole = content(speech(8000), "MP3")
    frame = whole[:216]  # 24 kbit/s at 16 kHz
    for data in (whole[:4] + bytes(5000), whole[:2] * 3000, frame[:150], b"\xff\xfb" * 2000):
        assert refusal(data).reason == "undecodable", data[:8]
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytes([0xFF, *rng.integers(0xE0, 0x100, 1).tolist()]) + rng.bytes(3000)
        assert find_sound(io.BytesIO(data), len(data))[0] == "other"
    # The rest of a frame, as in a recording of a stream, may come first.
    assert decode(whole[300:]).frames == pytest.approx(8000, abs=1200)


def test_a_file_without_extension_is_listed_by_the_same_rule(tmp_path: Path) -> None:
    sounds = {"a": id3(20) + content(speech(500), "FLAC"), "b": adts(5), "c": id3(900)}
    for name, data in {**sounds, "d": b"\xff\xfb" * 300}.items():
        (tmp_path / name).write_bytes(data)
    assert [file.name for file in list_audio(tmp_path)[0]] == ["a", "b"]


FOREIGN = [
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
        "a Git LFS pointer, not a sound: run `git",
    ),
    (b"<!DOCTYPE html><html><body>404</body></html>", "a web page, not a sound: .* fetch it again"),
    (b"\xef\xbb\xbf\n <HTML>", "a web page"),
    (b'{"error": "not found"}', "JSON, not a sound"),
    (b"\x1f\x8b\x08" + bytes(range(100)), "a compressed file, not a sound: unpack it"),
    (b"PK\3\4" + bytes(range(100)), "an archive, not a sound"),
    (b"x" * 257 + b"ustar\x0000", "an archive"),
    (b"path,label\na.wav,dog\n" * 50, "text, not a sound"),
    (b"#EXTM3U\na.mp3\n", "a playlist"),
    (b"MThd\0\0\0\6", "a MIDI file"),
    (b"\x89PNG\r\n\x1a\n", "a picture"),
    (bytes(5000), "filled with zeros"),
]


@pytest.mark.parametrize(("data", "message"), FOREIGN)
def test_what_is_no_sound_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.wav", "a.mp3"):
        (tmp_path / name).write_bytes(data)
        error = refusal(tmp_path / name)
        assert error.reason == "undecodable"
        with pytest.raises(AudioError, match=f"{name}: {message}"):
            raise error


# --- joined files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_joined_files_are_decoded_whole(kind: str, tmp_path: Path) -> None:
    parts = [content(speech(8000, seed), kind) for seed in range(3)]
    expected = np.concatenate([decode(part).waveform for part in parts])
    clip = decode(b"".join(parts))
    assert clip.notes == ()
    np.testing.assert_array_equal(clip.waveform, expected)
    np.testing.assert_array_equal(np.concatenate(list(decode_blocks(b"".join(parts)))), expected)
    np.testing.assert_array_equal(
        decode(b"".join(parts), max_seconds=0.7).waveform, expected[: round(0.7 * RATE)]
    )
    tagged = id3(50).join([b"", *parts]) + b"TAG" + bytes(range(125))
    np.testing.assert_array_equal(decode(tagged).waveform, expected)


def test_joined_files_of_several_kinds() -> None:
    parts = [content(speech(5000, i), kind) for i, kind in enumerate(KINDS)]
    expected = np.concatenate([decode(part).waveform for part in parts])
    clip = decode(b"".join(parts))
    assert clip.notes == ()
    np.testing.assert_array_equal(clip.waveform, expected)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "VORBIS", "MP3"])
def test_a_note_says_what_of_a_joined_file_is_not_decoded(kind: str) -> None:
    first, other = content(speech(8000), kind), content(speech(8000), kind, 44100)
    clip = decode(first + other)
    assert clip.frames == 8000
    assert clip.notes == (
        f"{len(other):,} bytes of another sound joined to this one not decoded "
        "(44100 Hz, 1 channel)",
    )
    stereo = content(np.stack([speech(8000)] * 2, axis=1), kind)
    (note,) = decode(first + stereo).notes
    assert note.endswith("(16000 Hz, 2 channels)")


def test_other_data_after_a_sound_is_a_note() -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for kind in ("WAV", "AIFF", "AU", "W64", "MP3"):
        clip = decode(content(speech(8000), kind) + noise)
        assert (clip.frames, clip.notes) == (8000, ("5,000 bytes after the sound not decoded",))


def test_only_so_many_parts_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(content(speech(40)) * 100).frames == 4000
    monkeypatch.setattr("aatjax.audio.sound._MOST_PARTS", 3)
    clip = decode(content(speech(4000)) * 5)
    (note,) = clip.notes
    assert clip.frames == 12000 and "(more than 3 parts)" in note


# --- wrong lengths -----------------------------------------------------------------------------


PCM = np.round(speech(16000) * 32768).astype("<i2").tobytes()
ODD = b"note" + struct.pack("<I", 5) + b"hello"


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (wav(PCM, len(PCM) + 2), ("1 of 16001 frames missing",)),
        (wav(PCM, 0), ()),
        (wav(PCM, 0, riff=0), ()),
        (wav(PCM, 0, riff=36), ()),
        (wav(PCM, len(PCM) // 2), ("data chunk of 32000 bytes states 16000",)),
        (wav(PCM, 2), ("data chunk of 32000 bytes states 2",)),
        (wav(PCM, before=ODD), ()),
        (wav(PCM, before=ODD + b"\0"), ()),
        (wav(PCM, before=ODD + ODD), ()),
        (wav(PCM, 0, before=ODD), ()),
        (wav(PCM, riff=0), ()),
        (wav(PCM, riff=2**31), ()),
        (wav(PCM, after=b"LIST" + struct.pack("<I", 4) + b"INFO"), ()),
        (wav(PCM, after=b"LIST" + struct.pack("<I", 400) + b"INFO"), ()),
        (wav(PCM + b"x"), ()),
        (wav(PCM)[:-2], ("1 of 16000 frames missing",)),
    ],
)
def test_all_of_a_wav_with_a_wrong_header_is_read(data: bytes, notes: tuple[str, ...]) -> None:
    clip = decode(data)
    assert clip.notes == notes
    np.testing.assert_array_equal(clip.waveform, np.frombuffer(PCM, "<i2")[: clip.frames])
    assert clip.frames >= 15999


def test_an_empty_wav_stays_empty() -> None:
    for data in (wav(b""), wav(b"", after=b"LIST" + struct.pack("<I", 4) + b"INFO")):
        assert refusal(data).reason == "empty"
    assert decode(wav(b"") + wav(PCM)).frames == 16000


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_a_small_shortage_is_a_note_and_a_large_one_a_truncation(kind: str) -> None:
    whole = content(speech(16000), kind)
    for lost, is_small in ((1, True), (160, True), (161, False)):
        data = whole[: len(whole) - 2 * lost]
        if is_small:
            assert decode(data).notes == (f"{lost} of 16000 frames missing",)
            notes: list[str] = []
            assert sum(block.size for block in decode_blocks(data, notes=notes)) == 16000 - lost
            assert notes == [f"{lost} of 16000 frames missing"]
        else:
            assert f"truncated {16000 - lost}/16000 frames" in str(refusal(data))
            with pytest.raises(AudioError, match="truncated"):
                list(decode_blocks(data))


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FLAC", "VORBIS", "OPUS", "MP3"])
@pytest.mark.parametrize("damage", ["flipped", "cut out"])
def test_damage_in_the_middle_is_noted(kind: str, damage: str) -> None:
    whole = content(speech(64000), kind)
    middle = len(whole) // 2
    if damage == "flipped":
        bad = bytes(byte ^ 0x5A for byte in whole[middle : middle + 300])
        data = whole[:middle] + bad + whole[middle + 300 :]
    else:
        data = whole[:middle] + whole[middle + 1001 :]
    clip = decode(data, truncated="keep")
    assert 25000 < clip.frames < 64000
    (note,) = clip.notes
    missing = f"{64000 - clip.frames} of 64000 frames missing"
    assert note in (missing, f"truncated {clip.frames}/64000 frames")
    if kind == "MP3":  # is read on behind the damage
        assert clip.frames > 60000
        expected = decode(whole).waveform[-8000:].astype(float)
        found = clip.waveform.astype(float)
        lags = [np.corrcoef(expected, found[i : i + 8000])[0, 1] for i in _ends(found.size)]
        assert max(lags) > 0.9


def _ends(size: int) -> range:
    return range(size - 8000 - 1200, size - 8000 + 1)


def test_an_mp3_with_a_wrong_frame_count_is_read_to_its_end() -> None:
    whole = content(speech(32000), "MP3")
    at = whole.index(b"Xing") + 8
    count = struct.unpack(">I", whole[at : at + 4])[0]
    for stated, notes in ((count // 2, ()), (1, ()), (count + 1, ()), (2 * count, None)):
        clip = decode(whole[:at] + struct.pack(">I", stated) + whole[at + 4 :], truncated="keep")
        assert clip.frames == pytest.approx(32000, abs=1200)
        assert clip.notes == notes or (notes is None and clip.notes[0].startswith("truncated"))


def test_an_mp3_without_a_count_that_ends_in_a_frame_is_noted() -> None:
    whole = content(speech(64000), "MP3")
    first = whole.index(whole[:2], 200)
    assert decode(whole[first:]).notes == ()
    (note,) = decode(whole[first:-30]).notes
    assert re.fullmatch(r"57\d of 65\d\d\d frames missing", note)


def test_other_layers_of_mpeg_are_followed_too() -> None:
    head = bytes([0xFF, 0xFD, 0x84, 0xC0])  # MPEG 1, layer II, 128 kbit/s, 48 kHz, mono
    data = (head + bytes(380)) * 20
    clip = decode(data)
    assert clip.source_rate == 48000
    assert clip.frames == pytest.approx(20 * 1152, abs=1152)


def test_damaged_mp3_files_print_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = content(speech(64000), "MP3")
    for seed in range(20):
        rng, data = np.random.default_rng(seed), bytearray(whole)
        for at in rng.integers(400, len(data), 30):
            data[at] ^= 1 << rng.integers(8)
        try:
            decode(bytes(data), truncated="keep")
        except AudioError:
            continue
    (tmp_path / "a.mp3").write_bytes(bytes(data))
    measure_original(str(tmp_path / "a.mp3"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="replaces the stream of glibc"
)
def test_only_what_c_prints_meanwhile_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)

    def print_in_c(text: bytes) -> None:
        stream = ctypes.c_void_p(ctypes.c_void_p.in_dll(library, "stderr").value)
        library.fputs(text, stream)
        library.fflush(stream)

    print_in_c(b"before ")
    with silence_libraries():
        print_in_c(b"inside ")
        with silence_libraries():
            print_in_c(b"deeper ")
        print_in_c(b"inside ")
    print_in_c(b"after")
    assert capfd.readouterr().err == "before after"


def test_a_flac_that_states_too_few_samples_is_noted() -> None:
    whole = bytearray(content(speech(100000), "FLAC"))
    whole[22:26] = (10000).to_bytes(4, "big")
    clip = decode(bytes(whole))
    (note,) = clip.notes
    assert clip.frames == 10000
    assert re.fullmatch(r"\d+,\d{3} bytes after the sound not decoded", note)
