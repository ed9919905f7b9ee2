"""Decoding: every format, rate and channel count; every way a file can be bad."""

import io
import os
import pickle
import stat
import struct
import sys
import tracemalloc
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from aatjax.audio.containers import SplicedFile
from aatjax.audio.decode import AudioError, as_waveform, decode, list_audio
from aatjax.audio.fbank import FRAME, log_mel_reference, mel_bank
from aatjax.errors import DataError, UsageError

RATE = 16000


def tone(rate: int, hertz: float = 1000.0, seconds: float = 0.5, level: float = 0.3) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a slow envelope: no two seconds are alike."""
    rng = np.random.default_rng(seed)
    envelope = 0.1 + 0.1 * np.sin(np.arange(samples) / 3000)
    return np.round(envelope * rng.normal(0, 0.5, samples).clip(-2, 2) * 32768) / 32768


def content(
    samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def peak_bin(waveform: np.ndarray) -> int:
    return int(log_mel_reference(waveform / 32768.0).mean(axis=0).argmax())


def refusal(source: str | Path | bytes, **options: object) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode(source, **options)  # type: ignore[arg-type]
    error = caught.value
    assert "\n" not in str(error)
    name = "<bytes>" if isinstance(source, bytes) else Path(source).name[:20]
    assert name.encode("unicode_escape").decode() in str(error)
    return error


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate", "count"), [("WAV", 44100, 2), ("FLAC", 8000, 1)])
def test_librosa_loads_the_same(kind: str, rate: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(
        content(np.stack([speech(rate, seed) for seed in range(count)], 1), rate, kind)
    )
    expected, _ = librosa.load(path, sr=RATE, mono=True, res_type="soxr_hq")
    found = decode(path).waveform
    assert abs(found.size - expected.size) <= 1
    size = min(found.size, expected.size)
    np.testing.assert_allclose(found[:size] / 32768, expected[:size], atol=1.1 / 32768)


# --- what is decoded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 0.005),
        ("WAV", "PCM_16", 0),
        ("WAV", "PCM_24", 0),
        ("WAV", "PCM_32", 0),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.01),
        ("WAV", "ALAW", 0.01),
        ("WAV", "IMA_ADPCM", 0.03),
        ("WAV", "MS_ADPCM", 0.03),
        ("WAVEX", "PCM_24", 0),
        ("RF64", "PCM_16", 0),
        ("W64", "PCM_16", 0),
        ("AIFF", "PCM_16", 0),
        ("AU", "PCM_16", 0),
        ("CAF", "PCM_16", 0),
        ("FLAC", "PCM_16", 0),
        ("FLAC", "PCM_24", 0),
    ],
)
def test_b8_every_sample_type(tmp_path: Path, kind: str, subtype: str, error: float) -> None:
    truth = speech(8000)
    file = tmp_path / "clip.wav"
    file.write_bytes(content(truth, kind=kind, subtype=subtype))
    clip = decode(file)
    assert clip.waveform.dtype == np.int16
    assert (clip.source_rate, clip.channels, clip.notes) == (RATE, 1, ())
    assert clip.frames == clip.waveform.size >= 8000
    assert clip.frames == 8000 or "ADPCM" in subtype  # whole blocks
    difference = clip.waveform[:8000] / 32768 - truth
    assert np.sqrt((difference**2).mean()) <= error
    assert np.array_equal(clip.waveform, decode(file.read_bytes()).waveform)


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_b8_lossy_formats(kind: str, subtype: str | None) -> None:
    clip = decode(content(tone(RATE, seconds=2.0), kind=kind, subtype=subtype))
    assert clip.waveform.size == 32000
    assert clip.notes == ()
    truth = np.round(tone(RATE) * 32768)
    error = clip.waveform[8000:16000] - truth
    assert np.sqrt((error**2).mean()) < 0.05 * np.sqrt((truth**2).mean())


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 48000, 96000, 192000])
@pytest.mark.parametrize("hertz", [440.0, 1500.0])
def test_b9_tone_keeps_its_mel_bin_at_every_rate(rate: int, hertz: float) -> None:
    want = peak_bin(np.round(tone(RATE, hertz) * 32768).astype(np.int16))
    clip = decode(content(tone(rate, hertz), rate))
    assert clip.source_rate == rate
    assert clip.waveform.size == pytest.approx(8000, abs=1)
    assert abs(peak_bin(clip.waveform) - want) <= 1
    expected = int(mel_bank()[round(hertz / 31.25)].argmax())
    assert abs(want - expected) <= 1
    # As loud as it was: resampling has unit gain.
    assert np.abs(clip.waveform[2000:6000]).max() == pytest.approx(0.3 * 32768, rel=0.01)


def test_b9_no_aliases_from_above_the_new_half_rate() -> None:
    clip = decode(content(tone(48000, 11000.0), 48000))
    assert np.abs(clip.waveform[1000:-1000]).max() <= 5  # 0.3 of full scale before


@pytest.mark.parametrize("count", [1, 2, 6, 8, 11])
def test_b7_channel_policies_of_files(count: int) -> None:
    channels = np.stack([speech(2000, seed) for seed in range(count)], axis=1)
    data = content(channels)
    exact = np.round(channels * 32768)
    clip = decode(data)
    assert clip.channels == count
    assert np.abs(clip.waveform - exact.mean(axis=1)).max() <= 0.51
    np.testing.assert_array_equal(decode(data, channels="left").waveform, exact[:, 0])
    for index in range(count):
        np.testing.assert_array_equal(decode(data, channels=index).waveform, exact[:, index])
    with pytest.raises(UsageError, match=f"channel {count} is requested, but there are {count}"):
        decode(data, channels=count)


def test_b10_content_decides_and_not_the_name(tmp_path: Path) -> None:
    for name, kind in [("a.wav", "MP3"), ("b.MP3", "FLAC"), ("c", "OGG"), ("d.raw", "WAV")]:
        file = tmp_path / name
        file.write_bytes(content(tone(RATE), kind=kind))
        assert decode(file).waveform.size == 8000
    text = tmp_path / "e.wav"
    text.write_text("file,label\n" * 100)
    assert refusal(text).reason == "undecodable"


def test_b11_length_fields_of_streaming_writers() -> None:
    whole = content(speech(8000))
    at = whole.index(b"data") + 4
    truth = decode(whole).waveform
    for length in (0, 0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000):
        field = struct.pack("<I", length)
        clip = decode(whole[:4] + field + whole[8:at] + field + whole[at + 4 :])
        np.testing.assert_array_equal(clip.waveform, truth)
        assert clip.notes == ()


def test_b11_a_long_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "long.wav"
    with soundfile.SoundFile(file, "w", 44100, 2, "PCM_16") as out:
        block = np.stack([speech(441000), speech(441000, 1)], axis=1)
        for _ in range(12):  # two minutes
            out.write(block)
    tracemalloc.start()
    clip = decode(file, max_seconds=3.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert clip.waveform.size == 48000
    assert clip.frames < 500_000
    assert peak < 12e6 < file.stat().st_size
    whole = decode(file)
    assert whole.waveform.size == 120 * RATE
    np.testing.assert_array_equal(whole.waveform[:48000], clip.waveform)


@pytest.mark.parametrize(
    "name",
    [
        "a b.wav",
        'it\'s "quoted".wav',
        "semi;colon.wav",
        "new\nline.wav",
        "-leading.wav",
        "é-composed.wav",
        "é-decomposed.wav",
        "日本.wav",
        "x" * 251 + ".wav",
        os.fsdecode(b"bad-\xff-utf8.wav"),
    ],
)
def test_b12_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = content(tone(RATE))
    try:
        Path(name).write_bytes(data)
    except OSError:
        pytest.skip("this file system refuses the name")
    assert decode(name).waveform.size == 8000
    files, skipped = list_audio(tmp_path)
    assert [file.name for file in files] == [name]
    assert not skipped
    Path(name).write_bytes(data[:30])
    with pytest.raises(AudioError) as caught:
        decode(name)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


SUBTYPES = {
    "WAV": ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"],
    "FLAC": ["PCM_16", "PCM_24"],
    "OGG": ["VORBIS"],
    "AIFF": ["PCM_16", "PCM_24", "FLOAT"],
    "W64": ["PCM_16"],
    "RF64": ["PCM_24"],
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(SUBTYPES)),
    data=st.data(),
    rate=st.sampled_from([4000, 8000, 11025, 16000, 22050, 44100, 96000]),
    count=st.integers(1, 6),
    samples=st.integers(1, 30000),
    seed=st.integers(0, 1000),
)
def test_b30_round_trip(
    kind: str, data: st.DataObject, rate: int, count: int, samples: int, seed: int
) -> None:
    subtype = data.draw(st.sampled_from(SUBTYPES[kind]))
    sound = np.stack([speech(samples, seed + i) for i in range(count)], axis=1)
    encoded = content(sound, rate, kind, subtype)
    clip = decode(encoded)
    assert (clip.source_rate, clip.channels, clip.frames) == (rate, count, samples)
    assert clip.waveform.dtype == np.int16
    expected = samples * RATE / rate
    assert abs(clip.waveform.size - max(FRAME, expected)) <= 1
    padded = any(note.startswith("padded from ") for note in clip.notes)
    assert padded == (round(expected) < FRAME) or abs(expected - FRAME) <= 1
    assert not any(note.startswith("truncated") for note in clip.notes)
    assert np.isfinite(log_mel_reference(clip.waveform / 32768.0)).all()
    np.testing.assert_array_equal(clip.waveform, decode(encoded).waveform)


# --- what is refused, and what is only noted ---------------------------------------------------


def test_b1_files_without_sound(tmp_path: Path) -> None:
    whole = content(tone(RATE))
    cases = {
        "zero.wav": (b"", "undecodable"),
        "header.wav": (whole[:44], "empty"),
        "half-header.wav": (whole[:30], "undecodable"),
        "twenty.mp3": (content(tone(RATE), kind="MP3")[:20], "undecodable"),
        "noise.ogg": (np.random.default_rng(0).bytes(5000), "undecodable"),
        "no-samples.wav": (content(np.zeros(0)), "empty"),
        "no-samples.flac": (content(np.zeros(0), kind="FLAC"), "undecodable"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert refusal(tmp_path / name).reason == reason, name


CUT = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG", "MP3"]


@pytest.mark.parametrize("kind", CUT)
def test_b2_cut_files_are_noticed(tmp_path: Path, kind: str) -> None:
    whole = content(speech(160000), kind=kind)
    full = decode(whole)
    assert full.notes == () and full.frames == 160000
    file = tmp_path / "cut.wav"
    file.write_bytes(whole[: len(whole) // 2])
    error = refusal(file)
    assert error.reason == "truncated"
    assert "/? frames" in str(error) if kind == "OGG" else "/160000 frames" in str(error)
    clip = decode(file, truncated="keep")
    (note,) = clip.notes
    assert note.startswith(f"truncated {clip.frames}/")
    assert 50000 < clip.frames < 90000
    if kind != "MP3":
        np.testing.assert_array_equal(clip.waveform, full.waveform[: clip.frames])
    # Reading that ends before the cut is not harmed by it.
    assert decode(file, max_seconds=0.01).notes == ("padded from 160 samples",)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF"])
def test_b2_one_missing_sample_is_noticed(kind: str) -> None:
    whole = content(speech(8000), kind=kind)
    end = (
        whole.rindex(
            np.round(speech(8000)[-8:] * 32768).astype(">i2" if kind == "AIFF" else "<i2").tobytes()
        )
        + 16
    )
    assert decode(whole[:end]).notes == ()
    clip = decode(whole[: end - 2])
    assert (clip.frames, clip.notes) == (7999, ("1 of 8000 frames missing",))


@pytest.mark.parametrize("samples", [577, 1152, 5000, 44100, 44101])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_b2_whole_mp3_files_are_not_called_cut(samples: int, rate: int) -> None:
    clip = decode(content(speech(samples), rate, "MP3"))
    assert clip.frames == pytest.approx(samples, abs=2304)
    assert not any("truncated" in note for note in clip.notes)


@pytest.mark.parametrize(
    ("count", "rate", "tag"),
    [
        (1, 8000, b""),
        (2, 16000, b""),
        (1, 44100, b""),
        (1, 16000, b"ID3\4\0\0\0\0\1\0" + bytes(128)),
    ],
)
def test_b2_mp3_without_a_frame_count_is_read_to_its_end(count: int, rate: int, tag: bytes) -> None:
    # Noise first: by the bit rate of the first frame the file would be much shorter.
    sound = np.concatenate([speech(rate), np.zeros(rate), speech(rate // 2, 1)])
    whole = content(np.stack([sound] * count, axis=1), rate, "MP3")
    first = whole.index(whole[:2], 200)
    clip = decode(tag + whole[first:])
    assert clip.frames == pytest.approx(2.5 * rate, abs=2304)
    assert not any("truncated" in note for note in clip.notes)
    # The same clip as with its count, later by what a decoder needs to start.
    full = decode(whole).waveform.astype(float)
    late = clip.waveform.size - full.size
    parts = [clip.waveform[i : i + full.size].astype(float) for i in range(max(0, late) + 1)]
    assert max(np.corrcoef(part, full[: part.size]).ravel()[1] for part in parts) > 0.9


def test_b2_flipped_bytes_in_a_flac_end_it() -> None:
    data = bytearray(content(speech(160000), kind="FLAC"))
    for i in range(len(data) // 2, len(data) // 2 + 2000):
        data[i] ^= 0x5A
    clip = decode(bytes(data), truncated="keep")
    assert clip.notes[-1] == f"truncated {clip.frames}/160000 frames"
    np.testing.assert_array_equal(
        clip.waveform, np.round(speech(160000)[: clip.frames] * 32768).astype(np.int16)
    )


def test_b2_ogg_cut_between_two_pages() -> None:
    whole = content(speech(160000), kind="OGG")
    last = whole.rindex(b"OggS")
    assert refusal(whole[:last]).reason == "truncated"
    assert refusal(whole[: last + 10]).reason == "truncated"


def test_b2_odd_chunks_before_the_sound_are_padded() -> None:
    whole = content(speech(8000))
    at = whole.index(b"data")
    data = whole[:at] + b"note" + struct.pack("<I", 5) + b"hello\0" + whole[at:]
    assert decode(data[:4] + struct.pack("<I", len(data) - 8) + data[8:]).waveform.size == 8000
    assert "truncated 7900/8000 frames" in str(refusal(data[:-200]))


def test_b2_lists_after_the_sound_do_not_matter() -> None:
    whole = content(speech(8000))
    extra = b"LIST" + struct.pack("<I", 6) + b"INFOxy"
    size = struct.pack("<I", len(whole) + len(extra) - 8)
    assert decode(whole[:4] + size + whole[8:] + extra).waveform.size == 8000
    empty = content(np.zeros(0))
    size = struct.pack("<I", len(empty) + len(extra) - 8)
    assert refusal(empty[:4] + size + empty[8:] + extra).reason == "empty"


@pytest.mark.parametrize("samples", [1, 2, 160, 399])
def test_b3_short_clips_become_one_frame(samples: int) -> None:
    sound = speech(samples)
    clip = decode(content(sound))
    assert clip.waveform.size == FRAME
    np.testing.assert_array_equal(clip.waveform[:samples], np.round(sound * 32768))
    assert not clip.waveform[samples:].any()
    assert f"padded from {samples} samples" in clip.notes
    error = refusal(content(sound), min_samples=400)
    assert error.reason == "too short"
    assert f"{samples} samples, but at least 400" in str(error)


def test_b3_one_sample_at_a_high_rate() -> None:
    assert decode(content(np.array([0.5]), 192000)).waveform.size == FRAME


def test_b4_silent_and_clipped_are_noted() -> None:
    assert decode(content(np.zeros(8000))).notes == ("silent",)
    assert decode(content(np.full(8000, 0.25))).notes == ("silent",)
    assert decode(content(0.4 + 0.1 * speech(8000))).notes == ()
    square = np.sign(tone(RATE, 123.0) + 1e-9)
    assert decode(content(square)).notes == ("clipped",)
    assert decode(content(tone(RATE, level=0.999))).notes == ()
    loud = decode(content(tone(RATE, 123.0, level=1.5), subtype="FLOAT"))
    assert loud.notes == ("clipped",)
    assert (loud.waveform.min(), loud.waveform.max()) == (-32768, 32767)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_b5_not_finite(value: float, subtype: str) -> None:
    sound = np.stack([speech(300000), speech(300000)], axis=1)
    sound[250000, 1] = value
    error = refusal(content(sound, subtype=subtype), channels="left")
    assert error.reason == "non-finite"
    assert "sample 250000 " in str(error)


def test_b10_a_missing_audioread_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aatjax.io.optional.find_spec", lambda name: None)
    file = tmp_path / "song.m4a"
    file.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    error = refusal(file)
    assert error.reason == "undecodable"
    assert "pip install 'aatjax[formats]'" in str(error)


def test_b10_formats_of_ffmpeg_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "song.m4a"
    file.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    error = refusal(file)
    assert error.reason == "undecodable"
    assert "needs ffmpeg" in str(error)
    assert "save it to a file" in str(refusal(file.read_bytes()))


@pytest.mark.skipif(os.name != "posix", reason="a shell script replaces ffmpeg")
def test_b10_ffmpeg_is_used_if_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pcm = np.round(speech(9000) * 32768).astype("<i2").reshape(3000, 3)
    (tmp_path / "pcm").write_bytes(pcm.tobytes())  # pipe blocks end inside a frame of 6 bytes
    script = tmp_path / "ffmpeg"
    script.write_text(
        f"#!{sys.executable}\nimport sys, shutil\n"
        "if '-version' in sys.argv: sys.exit()\n"
        f"assert sys.argv[2] == {str(tmp_path / '-song.m4a')!r}\n"
        "print('Duration: 00:00:00.12\\nStream #0:0: Audio: aac, 16000 Hz, 3 channels, fltp', "
        "file=sys.stderr, flush=True)\n"
        f"shutil.copyfileobj(open({str(tmp_path / 'pcm')!r}, 'rb'), sys.stdout.buffer)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("-song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    clip = decode("-song.m4a", channels=1)
    assert (clip.source_rate, clip.channels, clip.frames) == (16000, 3, 3000)
    np.testing.assert_array_equal(clip.waveform, pcm[:, 1])


def test_playlists_never_reach_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for text in ("#EXTM3U\n/etc/passwd\n", "ffconcat version 1.0\nfile /etc/passwd\n"):
        (tmp_path / "list.wav").write_text(text)
        assert refusal(tmp_path / "list.wav").reason == "undecodable"
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_b13_pipes_devices_and_loops_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    (tmp_path / "dir.wav").mkdir()
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nothing")
    for name in ("pipe.wav", "loop.wav", "dir.wav", "dangling.wav", "missing.wav"):
        assert refusal(tmp_path / name).reason == "not a regular file"
    assert refusal("/dev/zero").reason == "not a regular file"
    assert "loop" in str(refusal(tmp_path / "loop.wav"))
    assert refusal("nul\0byte.wav").reason == "not a regular file"


def test_b13_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret.wav"
    file.write_bytes(content(tone(RATE)))

    def deny(path: object, *_: object) -> int:  # a mode of 0 does not stop the super-user
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("aatjax.audio.decode.os.open", deny)
    assert refusal(file).reason == "permission denied"


def test_bad_audio_is_a_data_error_that_pickles() -> None:
    error = refusal(b"")
    assert isinstance(error, DataError) and error.exit_code == 65
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, str(again)) == (error.reason, str(error))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"channels": "right"}, "channels is 'right'"),
        ({"channels": -1}, "channels is -1"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
        ({"max_seconds": float("nan")}, "max_seconds is nan"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode(content(tone(RATE)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_impossible_rates_in_a_header_are_refused(rate: int) -> None:
    assert f"rate of {rate} Hz" in str(refusal(content(tone(RATE), rate)))


def test_a_spliced_file_reads_across_the_seam_and_forgives_bad_offsets() -> None:
    file = SplicedFile(io.BytesIO(b"0123456789"), (b"abc", (4, 6), (6, 99)))
    assert file.seek(0, io.SEEK_END) == 9
    for offset, whence, rest in [
        (0, io.SEEK_SET, b"abc456789"),
        (2, io.SEEK_SET, b"c456789"),
        (5, io.SEEK_SET, b"6789"),
        (-1, io.SEEK_SET, b"abc456789"),
        (-2, io.SEEK_END, b"89"),
        (99, io.SEEK_END, b""),
    ]:
        file.seek(offset, whence)
        buffer = bytearray(20)
        assert buffer[: file.readinto(buffer)] == rest
        assert file.tell() == 9


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["WAV", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG"]), st.data())
def test_damaged_headers_end_in_a_clip_or_a_refusal(kind: str, data: st.DataObject) -> None:
    whole = bytearray(content(speech(3000), kind=kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 99))] = data.draw(st.integers(0, 255))
    try:
        clip = decode(bytes(whole), max_seconds=1.0, truncated="keep")
    except AudioError as error:
        assert "\n" not in str(error)
    else:
        assert FRAME <= clip.waveform.size <= RATE


# --- arrays ------------------------------------------------------------------------------------


def test_b6_scale_by_data_type() -> None:
    truth = np.round(speech(2000) * 32768).astype(np.int16)
    forms = [
        truth,
        truth.astype(np.int32) * 65536,
        (truth / 32768).astype(np.float32),
        truth / 32768,
        (truth / 32768).tolist(),
    ]
    for form in forms:
        np.testing.assert_array_equal(as_waveform(form, RATE), truth)
    eight = ((truth >> 8) + 128).astype(np.uint8)
    np.testing.assert_array_equal(as_waveform(eight, RATE), (truth >> 8) * 256)
    copy = as_waveform(truth, RATE)
    copy[0] += 1
    assert copy[0] != truth[0]


def test_b6_unscaled_floats_are_refused() -> None:
    with pytest.raises(DataError, match=r"reach 8000, but full scale is 1: .*divide by 32768"):
        as_waveform(np.array([0.0] * 500 + [-8000.0]), RATE)
    assert as_waveform(np.full(500, 3.9), RATE).max() == 32767
    for dtype in (np.int64, np.bool_, np.complex64, np.uint16):
        with pytest.raises(UsageError, match="have no known scale"):
            as_waveform(np.zeros(500, dtype), RATE)


def test_b7_orientation_by_shape() -> None:
    left, right = (np.round(speech(1000, seed) * 32768).astype(np.int16) for seed in (0, 1))
    mean = (left.astype(float) + right) / 2
    for stereo in (np.stack([left, right]), np.stack([left, right], axis=1)):
        assert np.abs(as_waveform(stereo, RATE) - mean).max() <= 0.5
        np.testing.assert_array_equal(as_waveform(stereo, RATE, channels="left"), left)
        np.testing.assert_array_equal(as_waveform(stereo, RATE, channels=1), right)
    for column in (left[:, None], left[None]):
        np.testing.assert_array_equal(as_waveform(column, RATE), left)
    for shape in ((2, 2), (8, 8), (9, 9), (500, 500), (2, 500, 1), ()):
        with pytest.raises(UsageError, match="is ambiguous"):
            as_waveform(np.zeros(shape, np.float32), RATE)


def test_b5_arrays_not_finite_or_empty() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(AudioError) as caught:
            as_waveform(np.array([0.0] * 500 + [value]), RATE)
        assert caught.value.reason == "non-finite"
    for shape in ((0,), (0, 2), (2, 0)):
        with pytest.raises(AudioError) as caught:
            as_waveform(np.zeros(shape, np.float32), RATE)
        assert caught.value.reason == "empty"


def test_arrays_are_resampled_like_files() -> None:
    sound = np.round(tone(44100) * 32768).astype(np.int16)
    from_file = decode(content(sound, 44100)).waveform
    from_array = as_waveform(sound, 44100)
    assert from_array.size == from_file.size
    assert np.abs(from_array.astype(int) - from_file).max() <= 1
    assert as_waveform(sound[:10], 44100).size == FRAME
    with pytest.raises(UsageError, match="rate_in is 0"):
        as_waveform(sound, 0)


# --- folders -----------------------------------------------------------------------------------


def test_b10_b13_listing_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    outside.mkdir()
    wav = content(tone(RATE))
    for name in ("z.wav", "A.WAV", "b/deep/c.Flac", "b/noext", ".git/x.wav", ".hidden.wav"):
        (root / name).write_bytes(wav)
    (outside / "o.wav").write_bytes(wav)
    (root / "readme.txt").write_text("text")
    (root / "LICENSE").write_text("a text without extension")
    (root / "inside.wav").symlink_to(root / "z.wav")
    (root / "escape.wav").symlink_to(outside / "o.wav")
    (root / "escape").symlink_to(outside)
    (root / "loop.wav").symlink_to(root / "loop.wav")
    (root / "b" / "up").symlink_to(root)
    (root / "dangling.wav").symlink_to(root / "gone.wav")
    (root / "locked.wav").write_bytes(wav)
    os.mkfifo(root / "pipe.wav")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )
    files, skipped = list_audio(root)
    assert [str(f.relative_to(root)) for f in files] == [
        "A.WAV",
        "b/deep/c.Flac",
        "b/noext",
        "inside.wav",
        "z.wav",
    ]
    assert {os.path.relpath(path, root): reason for path, reason in skipped} == {
        ".git": "hidden",
        ".hidden.wav": "hidden",
        "LICENSE": "not recognised as audio",
        "b/up": "link to a folder",
        "dangling.wav": "no such file or folder",
        "escape": "link out of the folder",
        "escape.wav": "link out of the folder",
        "locked.wav": "permission denied",
        "loop.wav": "symlink loop",
        "pipe.wav": "not a regular file",
        "readme.txt": "not an audio extension",
    }
    assert stat.S_ISFIFO((root / "pipe.wav").stat().st_mode)
    assert list_audio(str(root)) == (files, skipped)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"])
def test_b10_sound_without_extension_is_found(tmp_path: Path, kind: str) -> None:
    (tmp_path / "clip").write_bytes(content(tone(RATE), kind=kind))
    assert list_audio(tmp_path) == ([tmp_path / "clip"], [])


def test_listing_what_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file.wav").write_bytes(b"")
    for path in (tmp_path / "missing", tmp_path / "file.wav"):
        with pytest.raises(DataError, match="not a folder that can be read"):
            list_audio(path)


def test_real_sounds_decode_without_a_note(real_audio: Path) -> None:
    for folder, rate in [("esc10", None), ("speech_commands_v0.01", 16000), ("fsdd", 8000)]:
        files, _ = list_audio(real_audio / folder)
        assert files
        for file in files[:: max(1, len(files) // 10)]:
            clip = decode(file)
            assert rate in (None, clip.source_rate)
            assert not any("truncated" in note for note in clip.notes)
            assert clip.waveform.size == pytest.approx(clip.frames * RATE / clip.source_rate, abs=1)
