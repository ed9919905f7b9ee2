"""The decode cache: every file once, whole entries only, and a quarantine with reasons."""

import ast
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aatjax.audio.decode import decode, decode_blocks
from aatjax.data import decode_cache
from aatjax.data.decode_cache import decode_all, read_notes
from aatjax.data.folders import AudioFolder
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.errors import DataError, UsageError, WriteError


@pytest.fixture
def sounds(tmp_path):
    """Two classes of ten different sounds each."""
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "sounds" / "ab"[i % 2] / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * rng.standard_normal(800 + i), 16000)
    return tmp_path / "sounds"


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, in the order in which they were."""
    seen = []

    def counting(path, **options):
        seen.append(os.fspath(path))
        return decode_blocks(path, **options)

    monkeypatch.setattr(decode_cache, "decode_blocks", counting)
    return seen


def entries(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "index.sqlite")


def test_every_file_is_decoded_once_and_read_from_the_cache(sounds, tmp_path, decoded):
    source = AudioFolder(sounds)
    progress = []
    cached = decode_all(source, tmp_path / "c", progress=lambda *state: progress.append(state))
    assert sorted(decoded) == [clip.path for clip in source.clips]
    assert progress == [("decode", i, 20) for i in range(1, 21)]
    assert cached.clips == source.clips and cached.classes == source.classes
    for path in entries(sounds):
        path.rename(path.with_suffix(".moved"))
    for i, clip in enumerate(cached.clips):
        wave = cached.waveform(i)
        moved = Path(str(clip.path)).with_suffix(".moved")
        np.testing.assert_array_equal(wave, decode(moved).waveform)
        assert wave.dtype == np.int16 and isinstance(wave, np.memmap)
    for path in sounds.rglob("*.moved"):
        path.rename(path.with_suffix(".wav"))

    del decoded[:]
    again = decode_all(source, tmp_path / "c", workers=1)
    assert not decoded and again.fingerprint() == cached.fingerprint()
    assert again.fingerprint() != source.fingerprint()


def test_parts_of_the_result_share_the_cache(sounds, tmp_path, decoded):
    train, test = decode_all(AudioFolder(sounds), tmp_path / "c").split(0.2)
    for part in (train, test, pickle.loads(pickle.dumps(test))):
        for i, clip in enumerate(part.clips):
            np.testing.assert_array_equal(part.waveform(i), decode(clip.path).waveform)
    assert len(decoded) == 20


def test_entries_follow_content_and_options(sounds, tmp_path, decoded):
    source = AudioFolder(sounds)
    first = decode_all(source, tmp_path / "c")
    path = Path(source.clips[0].path)
    (sounds / "a" / "copy.wav").write_bytes(path.read_bytes())
    soundfile.write(path, np.full(900, 0.25), 16000)
    del decoded[:]
    second = decode_all(AudioFolder(sounds), tmp_path / "c")
    assert decoded == [str(path)]  # changed; the copy of its old content is known
    assert (np.abs(second.waveform(0) - 8192) <= 1).all()
    assert second.reader.key(second[0]) != first.reader.key(first[0])
    assert len(entries(tmp_path / "c")) == 21
    decode_all(source, tmp_path / "c", channels="left")
    assert len(entries(tmp_path / "c")) == 41


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "notes"])
def test_f3_damaged_entries_are_replaced(sounds, tmp_path, decoded, damage):
    source = AudioFolder(sounds)
    before = decode_all(source, tmp_path / "c")
    entry = entries(tmp_path / "c")[3]
    content = bytearray(entry.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "notes":
        content[-40] ^= 1
    else:
        content = content[: len(content) // 2 if damage == "cut" else 0]
    entry.write_bytes(content)
    assert read_notes(entry) is None
    del decoded[:]
    after = decode_all(source, tmp_path / "c")
    for i, clip in enumerate(after.clips):
        np.testing.assert_array_equal(after.waveform(i), decode(clip.path).waveform)
    assert len(decoded) == 1 and read_notes(entry) == ()
    assert after.fingerprint() == before.fingerprint()


def test_f3_a_killed_run_leaves_whole_entries_and_goes_on(sounds, tmp_path):
    script = (
        "import sys, time\n"
        "import numpy as np\n"
        "from aatjax.data import decode_cache\n"
        "from aatjax.data.folders import AudioFolder\n"
        "save = np.save\n"
        "def slow(file, array, **options):\n"
        "    save(file, array, **options)\n"
        "    file.flush()\n"
        "    time.sleep(0.05)\n"
        "np.save = slow\n"
        "decode_cache.decode_all(\n"
        "    AudioFolder(sys.argv[1]), sys.argv[2], progress=lambda *n: print(n[1])\n"
        ")\n"
    )
    folder = tmp_path / "c"
    command = [sys.executable, "-u", "-c", script, str(sounds), str(folder)]
    killed = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 6:
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    killed.stdout.close()
    whole = list(folder.glob("*/*.npy"))
    assert 6 <= len(whole) < 20
    assert all(read_notes(entry) is not None for entry in whole)

    old = folder / "00" / f".gone.{1:032x}.tmp"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    result = decode_all(AudioFolder(sounds), folder)
    assert len(result) == 20 and len(list(folder.glob("*/*.npy"))) == 20
    assert not old.exists()


def test_f3_an_entry_gets_its_name_when_it_is_whole(sounds, tmp_path, monkeypatch):
    renamed = []
    rename = os.replace

    def watch(temporary, entry):
        assert read_notes(Path(temporary)) == () and not os.path.exists(entry)
        renamed.append(Path(entry))
        rename(temporary, entry)

    monkeypatch.setattr(os, "replace", watch)
    decode_all(AudioFolder(sounds), tmp_path / "c")
    assert sorted(renamed) == entries(tmp_path / "c") and len(renamed) == 20


def test_b1_b2_b5_bad_files_are_quarantined_and_labels_do_not_shift(sounds, tmp_path):
    (sounds / "a" / "00.wav").write_bytes(b"")
    (sounds / "b" / "05.wav").write_bytes(b"RIFF garbage")
    soundfile.write(sounds / "a" / "10.wav", np.full(900, np.nan), 16000, subtype="FLOAT")
    half = sounds / "b" / "19.wav"
    half.write_bytes(half.read_bytes()[:900])
    source = AudioFolder(sounds)
    quarantine = tmp_path / "bad" / "quarantine.jsonl"
    good = decode_all(source, tmp_path / "c", max_bad=4, quarantine_file=quarantine)
    assert len(good) == 16
    assert all(good.classes[clip.label[0]] == clip.id[0] for clip in good.clips)
    for i, clip in enumerate(good.clips):
        np.testing.assert_array_equal(good.waveform(i), decode(clip.path).waveform)
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(r["id"], r["reason"]) for r in records] == [
        ("a/00.wav", "undecodable"),
        ("a/10.wav", "non-finite"),
        ("b/05.wav", "undecodable"),
        ("b/19.wav", "truncated"),
    ]
    assert all(r["path"] == str(sounds / r["id"]) and r["path"] in r["detail"] for r in records)
    assert good.skipped == tuple((r["id"], r["reason"]) for r in records)

    kept = decode_all(source, tmp_path / "c", max_bad=0.15, truncated="keep")
    assert len(kept) == 17 and kept.notes[-1][0] == "b/19.wav"
    assert kept.notes[-1][1].startswith("truncated ")
    again = decode_all(source, tmp_path / "c", max_bad=0.15, truncated="keep")
    assert again.notes == kept.notes  # from the cache


def test_too_many_bad_files_stop_with_count_reasons_and_advice(sounds, tmp_path):
    for i in range(0, 14, 2):
        (sounds / "a" / f"{i:02d}.wav").write_bytes(b"")
    source, quarantine = AudioFolder(sounds), tmp_path / "q.jsonl"
    with pytest.raises(DataError) as raised:
        decode_all(source, tmp_path / "c", quarantine_file=quarantine)
    message = str(raised.value)
    assert message.startswith("sounds: 7 of 20 clips cannot be used and 1 may fail: ")
    assert "00.wav" in message and "; and 2 more; " in message and "--data.max-bad" in message
    assert len(quarantine.read_text().splitlines()) == 7
    with pytest.raises(DataError, match="7 of 20 clips"):
        decode_all(source, tmp_path / "c", max_bad=6)
    assert len(decode_all(source, tmp_path / "c", max_bad=7)) == 13
    assert len(decode_all(source, tmp_path / "c", max_bad=0.35)) == 13
    with pytest.raises(DataError, match="7 of 7 clips"):
        decode_all(source.subset(range(7)), tmp_path / "c", max_bad=1.0)


@pytest.mark.parametrize("max_bad", [-1, -0.1, 1.5, float("nan"), True])
def test_max_bad_is_a_share_or_a_number(sounds, tmp_path, max_bad):
    with pytest.raises(UsageError, match="max_bad"):
        decode_all(AudioFolder(sounds), tmp_path / "c", max_bad=max_bad)
    with pytest.raises(UsageError, match="workers is 0"):
        decode_all(AudioFolder(sounds), tmp_path / "c", workers=0)


def test_the_quarantine_file_keeps_entries_of_other_files(sounds, tmp_path):
    quarantine = tmp_path / "q.jsonl"
    other = json.dumps({"path": "/other.wav", "id": "o", "reason": "truncated", "detail": "-"})
    stale = json.dumps({"path": str(sounds / "a" / "02.wav"), "id": "a", "reason": "x"})
    quarantine.write_text(f"{other}\n{stale}\nno json\n")
    (sounds / "a" / "00.wav").write_bytes(b"")
    for _ in range(2):
        decode_all(AudioFolder(sounds), tmp_path / "c", quarantine_file=quarantine)
        lines = quarantine.read_text().splitlines()
        assert lines[:2] == [other, "no json"] and len(lines) == 3
        assert json.loads(lines[2])["id"] == "a/00.wav"
    missing = tmp_path / "none.jsonl"
    decode_all(AudioFolder(sounds).subset([1, 2]), tmp_path / "c", quarantine_file=missing)
    assert not missing.exists()


def test_vanished_files_and_pipes_are_quarantined_without_waiting(sounds, tmp_path):
    source = AudioFolder(sounds)
    (sounds / "a" / "00.wav").unlink()
    (sounds / "a" / "02.wav").unlink()
    os.mkfifo(sounds / "a" / "02.wav")
    good = decode_all(source, tmp_path / "c", max_bad=2)
    assert good.skipped == (
        ("a/00.wav", "not a regular file"),
        ("a/02.wav", "not a regular file"),
    )


def test_f28_an_unforeseen_error_names_the_file_and_stops_at_once(sounds, tmp_path, monkeypatch):
    calls = []

    def broken(path, **options):
        calls.append(path)
        if "04" in os.fspath(path):
            raise RuntimeError("worker down")
        time.sleep(0.02)
        return decode_blocks(path, **options)

    monkeypatch.setattr(decode_cache, "decode_blocks", broken)
    with pytest.raises(DataError, match=r"04.wav: reading it failed: RuntimeError.*worker down"):
        decode_all(AudioFolder(sounds), tmp_path / "c", max_bad=20)
    assert len(calls) < 12
    assert not [t for t in threading.enumerate() if t.name.startswith("aatjax-map")]


def test_f28_an_entry_that_cannot_be_read_is_decoded_again_or_names_both_files(sounds, tmp_path):
    cached = decode_all(AudioFolder(sounds), tmp_path / "c")
    entry = decode_cache.cache_path(tmp_path / "c", cached.reader.key(cached[0]))
    path = Path(cached[0].path)
    wanted, whole = decode(path).waveform, entry.read_bytes()
    for content in (b"", whole[:200], b"x" * 300):
        entry.write_bytes(content)
        np.testing.assert_array_equal(cached.waveform(0), wanted)
        np.testing.assert_array_equal(
            decode_all(AudioFolder(sounds), tmp_path / "c").waveform(0), wanted
        )
    again = decode_all(AudioFolder(sounds), tmp_path / "c")
    entry.write_bytes(whole[:-1] + b"?")
    path.rename(tmp_path / "elsewhere.wav")
    with pytest.raises(DataError, match=r"a/00.wav: its decoded copy .*\.npy cannot be read, and"):
        again.waveform(0)
    soundfile.write(path, np.zeros(900), 16000)
    with pytest.raises(DataError, match=r"a/00.wav: has changed since the run was started"):
        again.waveform(0)


@pytest.mark.parametrize("why", ["not a folder", "full"])
def test_c9_a_cache_that_cannot_be_written_costs_only_time(sounds, tmp_path, monkeypatch, why):
    (sounds / "a" / "00.wav").write_bytes(b"")
    source = AudioFolder(sounds)
    wanted = decode_all(source, tmp_path / "good")
    if why == "full":

        def full(samples):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(decode_cache, "_make_header", full)
    else:
        (tmp_path / "c").write_text("")
    with pytest.warns(UserWarning, match="cannot be written: .*decoded each time they are read"):
        found = decode_all(source, tmp_path / "c")
    assert found.fingerprint() == wanted.fingerprint() and found.skipped == wanted.skipped
    for i in range(len(found)):
        np.testing.assert_array_equal(found.waveform(i), wanted.waveform(i))
    assert entries(tmp_path / "c") == []


def test_a_quarantine_that_cannot_be_written_is_a_write_error(sounds, tmp_path):
    (tmp_path / "file").write_text("")
    (sounds / "a" / "00.wav").write_bytes(b"")
    with pytest.raises(WriteError, match=r"q.jsonl: cannot be written") as raised:
        decode_all(
            AudioFolder(sounds), tmp_path / "c", quarantine_file=tmp_path / "file" / "q.jsonl"
        )
    assert raised.value.exit_code == 74


def test_sources_without_files_need_no_cache(tmp_path):
    source = Synthetic(["bark"], clips=2, seconds=0.1)
    cached = decode_all(source, tmp_path / "c")
    assert cached.fingerprint() == source.fingerprint() and entries(tmp_path / "c") == []
    np.testing.assert_array_equal(cached.waveform(1), source.waveform(1))


def test_real_folder(real_audio, tmp_path):
    source = AudioFolder(real_audio / "speech_commands_v0.01").subset(range(40))
    cached = decode_all(source, tmp_path / "c", max_bad=0)
    assert len(cached) == 40
    np.testing.assert_array_equal(cached.waveform(39), source.waveform(39))


def test_a_source_that_fails_while_it_is_read_is_no_write_error(sounds, tmp_path, monkeypatch):
    def failing(path, **options):
        yield np.zeros(500, np.int16)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decode_cache, "decode_blocks", failing)
    with pytest.raises(DataError, match=r"a/00.wav: Input/output error"):
        decode_all(AudioFolder(sounds), tmp_path / "c", max_bad=0)
    assert entries(tmp_path / "c") == []


@pytest.mark.parametrize("samples", [1, 399, 400, 70_000])
def test_an_entry_is_the_decoded_file(tmp_path, monkeypatch, samples):
    sound = 0.3 * np.random.default_rng(samples).normal(size=samples)
    (tmp_path / "s" / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "s" / "a" / "x.wav", sound, 16000)
    cached = decode_all(AudioFolder(tmp_path / "s"), tmp_path / "c")
    found = decode(tmp_path / "s" / "a" / "x.wav")
    (entry,) = entries(tmp_path / "c")
    np.testing.assert_array_equal(np.load(entry), found.waveform)
    # Python's parser, which np.load calls, fails in two threads at once on Python 3.11.
    monkeypatch.setattr(ast, "literal_eval", None)
    np.testing.assert_array_equal(cached.waveform(0), found.waveform)
    assert cached.waveform(0).dtype == np.int16
    assert tuple(note for _, note in cached.notes) == found.notes
