"""Files that have not changed are known by size and times: hashed once, opened no more."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.data import decode_cache, known_files
from aatjax.data.clip_windows import cut_clips
from aatjax.data.decode_cache import decode_all
from aatjax.data.known_files import Peers
from aatjax.data.manifest import Manifest
from aatjax.errors import DataError, WriteError
from aatjax.io import index as index_module
from aatjax.io.digest import hash_file
from aatjax.io.index import Index

LONG_AGO = 1_600_000_000_123_456_789  # nanoseconds
NAMES = [f"{i}.wav" for i in range(6)]


def write_sound(path, seed, *, at=LONG_AGO):
    """Write a sound of 800 samples; all of these files have the same size."""
    sound = 0.3 * np.random.default_rng(seed).standard_normal(800)
    soundfile.write(path, np.clip(sound, -1, 1), 16000)
    os.utime(path, ns=(at, at))


def list_files(folder, names):
    rows = [f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)]
    (folder / "list.csv").write_text("path,label\n" + "".join(rows))
    return Manifest(folder / "list.csv")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s").mkdir()
    for i, name in enumerate(NAMES):
        write_sound(tmp_path / "s" / name, i)
    return tmp_path / "s"


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were hashed, and of the entries whose checksum was computed."""
    seen = []

    def counting(path):
        seen.append(path.name)
        return hash_file(path)

    read = decode_cache.read_notes

    def reading(entry):
        seen.append("entry")
        return read(entry)

    monkeypatch.setattr(decode_cache, "hash_file", counting)
    monkeypatch.setattr(decode_cache, "read_notes", reading)
    return seen


def test_the_second_start_opens_neither_sounds_nor_entries(folder, tmp_path, hashed):
    source = list_files(folder, NAMES)
    first = decode_all(source, tmp_path / "c")
    assert sorted(set(hashed) - {"entry"}) == NAMES
    hashed.clear()
    second = decode_all(list_files(folder, NAMES), tmp_path / "c")
    assert hashed == []
    assert second.fingerprint() == first.fingerprint()
    np.testing.assert_array_equal(second.waveform(2), first.waveform(2))
    second.waveform(2)
    assert hashed == ["entry"]  # its checksum, when it is first read


@pytest.mark.parametrize("kind", ["time", "size", "same size and time", "replaced"])
def test_a_file_that_may_have_changed_is_hashed_again(folder, tmp_path, hashed, kind):
    before = decode_all(list_files(folder, NAMES), tmp_path / "c")
    hashed.clear()
    path = folder / "3.wav"
    time.sleep(0.02)  # a tick of the file system
    if kind == "size":
        soundfile.write(path, np.zeros(900), 16000)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    elif kind == "replaced":
        write_sound(tmp_path / "new.wav", 99)
        os.replace(tmp_path / "new.wav", path)
    else:
        write_sound(path, 99, at=LONG_AGO + (kind == "time"))
    after = decode_all(list_files(folder, NAMES), tmp_path / "c")
    assert "3.wav" in hashed and not set(hashed) & {*NAMES} - {"3.wav"}
    assert after.fingerprint() != before.fingerprint()


def test_a_file_written_within_a_tick_of_its_hash_is_hashed_again(
    folder, tmp_path, hashed, monkeypatch
):
    now = LONG_AGO + 10**12
    monkeypatch.setattr(decode_cache.time, "time_ns", lambda: now)
    write_sound(folder / "0.wav", 0, at=now - 10**7)
    write_sound(folder / "1.wav", 1, at=now + 10**12)  # a clock that is ahead
    write_sound(folder / "2.wav", 2, at=(now // 10**9 - 1) * 10**9)  # times in whole seconds
    write_sound(folder / "3.wav", 3, at=now - 10**8)
    decode_all(list_files(folder, NAMES), tmp_path / "c")
    hashed.clear()
    decode_all(list_files(folder, NAMES), tmp_path / "c")
    assert sorted(set(hashed) - {"entry"}) == ["0.wav", "1.wav", "2.wav"]


def test_s6_hard_links_are_one_file(folder, tmp_path, hashed, monkeypatch):
    names = [f"link{i:05d}.wav" for i in range(2000)]
    for i, name in enumerate(names):
        os.link(folder / NAMES[i % 2], folder / name)
    source = list_files(folder, names)
    cached = decode_all(source, tmp_path / "c")
    assert len(hashed) == 2 * 2  # two files, two entries
    assert len(cached) == 2000 and cached.clips == source.clips
    np.testing.assert_array_equal(cached.waveform(0), cached.waveform(1998))
    hashed.clear()
    stats = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: (stats.append(a[0]), stat(*a, **k))[1])
    decode_all(source, tmp_path / "c")
    assert hashed == [] and sum(str(p).endswith(".wav") for p in stats) == 2000


def test_a_damaged_link_is_reported_under_each_name(folder, tmp_path):
    (folder / "0.wav").write_bytes(b"RIFF")
    os.link(folder / "0.wav", folder / "again.wav")
    source = list_files(folder, [*NAMES, "again.wav"])
    good = decode_all(source, tmp_path / "c", max_bad=2, quarantine_file=tmp_path / "q.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0.wav", "again.wav"]
    assert all(line["id"] in line["detail"] for line in lines) and len(good) == 5


@pytest.mark.parametrize("damage", ["garbage", "empty", "value", "folder"])
def test_a_damaged_index_costs_only_time(folder, tmp_path, hashed, damage):
    first = decode_all(list_files(folder, NAMES), tmp_path / "c")
    place = tmp_path / "c" / "index.sqlite"
    if damage == "value":  # one digit of a digest
        content = place.read_bytes()
        at = content.index(hash_file(folder / "3.wav").encode())
        place.write_bytes(
            content[:at] + (b"1" if content[at : at + 1] == b"0" else b"0") + content[at + 1 :]
        )
    elif damage == "folder":
        place.unlink()
        place.mkdir()
    else:
        place.write_bytes(b"" if damage == "empty" else b"no database" * 1000)
    hashed.clear()
    if damage == "folder":
        with pytest.warns(UserWarning, match="the next start reads every sound again"):
            again = decode_all(list_files(folder, NAMES), tmp_path / "c")
    else:
        again = decode_all(list_files(folder, NAMES), tmp_path / "c")
    assert again.fingerprint() == first.fingerprint()
    assert len(set(hashed) - {"entry"}) == (1 if damage == "value" else 6)
    hashed.clear()
    if damage != "folder":
        decode_all(list_files(folder, NAMES), tmp_path / "c")
        assert hashed == []


def test_clips_that_were_cut_before_are_not_read_to_cut_them(folder, tmp_path, monkeypatch):
    soundfile.write(folder / "long.wav", np.r_[np.zeros(9000), np.sin(np.arange(9000)) / 4], 16000)
    names, frontend = [*NAMES, "long.wav"], FrontEnd(frames=50)
    first = cut_clips(decode_all(list_files(folder, names), tmp_path / "c"), frontend, Scoring())
    monkeypatch.setattr(decode_cache.DecodeCache, "read", None)
    cached = decode_all(list_files(folder, names), tmp_path / "c")
    again = cut_clips(cached, frontend, Scoring())
    for name in ("owner", "lengths", "sounding", "samples", "covered"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert again.windows.clips == first.windows.clips and len(again.windows) == 9
    assert not again.sounding[6] and again.sounding[7:].all()
    with pytest.raises(DataError, match="not callable"):  # other windows are unknown
        cut_clips(cached, FrontEnd(frames=40), Scoring())


def run_together(function, count):
    """Call a function in threads that gather bytes as the processes of a run do."""
    barrier, box, results = threading.Barrier(count), [b""] * count, [None] * count

    def start(index):
        def gather(data):
            box[index] = data
            barrier.wait(30)
            return list(box)

        results[index] = function(Peers(index, count, gather))

    threads = [threading.Thread(target=start, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("shared", [True, False])
def test_the_processes_of_a_run_hash_each_file_once(folder, tmp_path, hashed, shared):
    source = list_files(folder, NAMES)

    def start(peers):
        cache = tmp_path / ("c" if shared else f"c{peers.index}")
        return decode_all(source, cache, peers=peers)

    one, two = run_together(start, 2)
    assert one.fingerprint() == two.fingerprint()
    assert sorted(name for name in hashed if name != "entry") == NAMES
    hashed.clear()
    run_together(start, 2)
    assert hashed == []


def test_processes_with_other_files_do_not_take_each_others_word(folder, tmp_path):
    (tmp_path / "other").mkdir()
    for i, name in enumerate(NAMES):
        write_sound(tmp_path / "other" / name, i + (10 if name == "3.wav" else 0))

    def start(peers):  # the names are the same, as on hosts with disks of their own
        place = [folder, tmp_path / "other"][peers.index]
        source = list_files(place, NAMES)
        found = known_files.group_files(clip.path for clip in source.clips)
        known = known_files.KnownFiles(Index(tmp_path / f"i{peers.index}"), str)
        named = [known_files.SoundFile(Path(f.path).name, f.clips, f.found) for f in found]
        if peers.index == 0:
            for file, full in zip(named, found, strict=True):
                stamp = index_module.make_stamp(full.found)
                known.digests[file.path] = [*stamp, hash_file(Path(full.path))]
        known.exchange(peers, named)
        return [known.find_digest(file) for file in named]

    one, two = run_together(start, 2)
    assert all(one) and two == [None] * 6


def test_what_is_read_while_the_index_is_written_is_kept(folder, tmp_path):
    files = known_files.group_files(str(folder / name) for name in NAMES)

    class BusyIndex(Index):
        """Another file is read by a thread while one is written."""

        def save(self, kind, values):
            for key in values:
                if files:
                    read(files.pop())
                super().save(kind, {key: values[key]})

    known = known_files.KnownFiles(BusyIndex(tmp_path / "i"), str)

    def read(file):
        known.add(file, time.time_ns() + 10**10, "digest", file.path, [1, []])

    read(files.pop())
    while files:
        known.save()
    known.save()
    again = known_files.KnownFiles(Index(tmp_path / "i"), str)
    again.load(files := known_files.group_files(str(folder / name) for name in NAMES))
    assert [again.find_digest(file) for file in files] == ["digest"] * len(NAMES)


class TestIndex:
    def test_values_come_back_by_kind_and_key(self, tmp_path):
        index = Index(tmp_path / "new folder" / "i.sqlite")
        assert index.load("a", ["x"]) == {}
        odd = ["x", "\udcff", "a'b\"c", "\u00e9", "\0"]
        index.save("a", {key: [i, key == "x"] for i, key in enumerate(odd)})
        index.save("b", {"x": {"y": None}})
        index.save("a", {"x": "newer"})
        assert index.load("a", [*odd, "none"]) == {
            "x": "newer",
            **{key: [i, False] for i, key in enumerate(odd) if i},
        }
        assert index.load("b", iter(["x"])) == {"x": {"y": None}}

    def test_many_keys(self, tmp_path):
        index = Index(tmp_path / "i.sqlite")
        index.save("n", {str(i): i for i in range(3000)})
        assert index.load("n", map(str, range(0, 6000, 2))) == {
            str(i): i for i in range(0, 3000, 2)
        }

    def test_writers_wait_for_each_other(self, tmp_path):
        index, count = Index(tmp_path / "i.sqlite"), 8

        def write(number):
            for i in range(5):
                index.save("n", {f"{number}/{i}": i})

        threads = [threading.Thread(target=write, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(index.load("n", [f"{n}/{i}" for n in range(count) for i in range(5)])) == 40

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match=r"file/i.sqlite: cannot be written"):
            Index(tmp_path / "file" / "i.sqlite").save("a", {"x": 1})
