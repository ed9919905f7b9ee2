"""`aatjax prepare`: from the official archive to a prepared set, whole or not at all."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from official_layouts import MAKERS, make_archive

from aatjax.cli.main import run
from aatjax.config import load_config
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.prepare import prepare
from aatjax.data.tfds import Prepared, is_prepared
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.experiments.evaluate import evaluate_adapter
from aatjax.experiments.run import train
from aatjax.train.adapter_file import load_adapter

READ_BACK = """
import hashlib, json, sys
from aatjax.data.formats import open_source
source = open_source(sys.argv[1], sys.argv[2])
sums = {c.id: hashlib.sha256(source.waveform(i).tobytes()).hexdigest()
        for i, c in enumerate(source.clips)}
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
print(json.dumps([type(source).__name__, source.fingerprint(), sums]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MAKERS))
def test_from_the_archive_to_figures(name, tmp_path, small_ast, capsys) -> None:
    """Prepare, read back in a fresh process, one epoch, evaluation of the written adapter."""
    archive = make_archive(name, tmp_path / "in")
    home = tmp_path / "data"
    assert run(["prepare", name, "--from", str(archive), "--out", str(home), "--quiet"]) == 65
    assert "--subset" in capsys.readouterr().err
    command = ["prepare", name, "--from", str(archive), "--out", str(home), "--subset"]
    assert run(command) == 0
    report = capsys.readouterr().out
    assert "SUBSET" in report and f"of {BENCHMARKS[name].clips:,} clips" in report
    assert ("jazz.00054.wav (undecodable)" in report) == (name == "gtzan")
    assert sorted(p.name for p in (home / name).iterdir()) == [".lock", "1.0.0"]

    folder = home / name / "1.0.0"
    read = subprocess.run(
        [sys.executable, "-c", READ_BACK, str(folder), name],
        capture_output=True,
        text=True,
        check=True,
    )
    kind, fingerprint, sums = json.loads(read.stdout.splitlines()[-1])
    source = Prepared(folder)
    assert (kind, fingerprint) == ("Prepared", source.fingerprint())
    original = tmp_path / "again"
    MAKERS[name](original)
    official = BENCHMARKS[name].read(original)
    clips = {clip.id: clip for clip in official.clips}
    assert len(source) == len(official) - (name == "gtzan")
    for i, clip in enumerate(official.clips):
        if clip.id in sums:
            wave = official.waveform(i)
            assert hashlib.sha256(np.ascontiguousarray(wave).tobytes()).hexdigest() == sums[clip.id]
    for clip in source.clips:
        assert dataclasses.replace(clips[clip.id], path=None) == clip

    config = load_config(f"{name}_lora")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=small_ast, frames=64),
        data=dataclasses.replace(config.data, path=str(folder)),
        training=dataclasses.replace(config.training, epochs=1, batch_size=16),
    )
    result = train(config, run_dir=tmp_path / "run", show=None)
    assert result.about["benchmark"] == BENCHMARKS[name].title and not result.about["whole"]
    found, test = evaluate_adapter(load_adapter(result.artefact))
    assert result.headline is not None and found.headline[:2] == pytest.approx(result.headline[:2])
    assert found.clips == len(test) > 0


@pytest.fixture
def esc10(tmp_path: Path) -> Path:
    return make_archive("esc10", tmp_path / "in")


def small(name: str, clips: int, **changes):
    return dataclasses.replace(BENCHMARKS[name], clips=clips, parts={}, **changes)


def test_a_whole_set_is_reported_as_whole(esc10, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(BENCHMARKS, "esc10", small("esc10", 40))
    command = ["prepare", "esc10", "--from", str(esc10), "--out", str(tmp_path / "d"), "--quiet"]
    assert run(command) == 0
    assert "ESC-10 prepared: complete, 40 of 40 clips" in capsys.readouterr().out
    files = [p for p in (tmp_path / "d").rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert run(command) == 0
    assert "ESC-10 was prepared before: complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in files}


def test_a_folder_gives_the_same_set_as_an_archive(tmp_path) -> None:
    MAKERS["esc10"](tmp_path / "unpacked")
    one = prepare("esc10", tmp_path / "unpacked", to=tmp_path / "a", subset=True)
    two = prepare(
        "esc10", make_archive("esc10", tmp_path / "in"), to=tmp_path / "b", subset=True, workers=1
    )
    assert Prepared(one.folder).fingerprint() == Prepared(two.folder).fingerprint()
    # The record files are one TFDS dataset, byte for byte the same whoever makes it.
    for file in one.folder.glob("*.array_record*"):
        assert file.read_bytes() == (two.folder / file.name).read_bytes()


def test_missing_files_are_named(tmp_path) -> None:
    top = MAKERS["esc10"](tmp_path / "unpacked")
    lost = sorted((top / "audio").iterdir())[3]
    lost.unlink()
    with pytest.raises(DataError, match=rf"39 of 400 clips .*such as {lost.name}.*--subset"):
        prepare("esc10", tmp_path / "unpacked", to=tmp_path / "d")
    assert not is_prepared(tmp_path / "d" / "esc10")
    outcome = prepare("esc10", tmp_path / "unpacked", to=tmp_path / "d", subset=True)
    assert outcome.census.clips == 39


def test_the_checksum_of_an_archive_is_verified(esc10, tmp_path, monkeypatch) -> None:
    md5 = hashlib.md5(esc10.read_bytes()).hexdigest()
    monkeypatch.setitem(BENCHMARKS, "esc10", small("esc10", 40, checksum=f"md5:{md5}"))
    assert prepare("esc10", esc10, to=tmp_path / "a").checksum is True
    monkeypatch.setitem(BENCHMARKS, "esc10", small("esc10", 40, checksum="md5:" + 32 * "0"))
    assert prepare("esc10", esc10, to=tmp_path / "b").checksum is False


def test_sound_in_two_folds_is_found(tmp_path) -> None:
    top = MAKERS["esc10"](tmp_path / "unpacked")
    files = sorted((top / "audio").iterdir())
    first = next(f for f in files if f.name.startswith("1-"))
    other = next(f for f in files if f.name.startswith("3-"))
    shutil.copy(first, other)
    outcome = prepare("esc10", tmp_path / "unpacked", to=tmp_path / "d", subset=True)
    assert [(p.first, p.second, p.parts, p.exact) for p in outcome.duplicates] == [
        (first.name, other.name, ("1", "3"), True)
    ]
    facts = json.loads((outcome.folder / "prepared.json").read_text())
    assert facts["duplicates"][0]["second"] == other.name


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "web").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", tmp_path / "web"
        served.shutdown()


def test_download(server, esc10, tmp_path, monkeypatch) -> None:
    url, web = server
    shutil.copy(esc10, web / "esc10.zip")
    right = "sha256:" + hashlib.sha256(esc10.read_bytes()).hexdigest()
    for checksum in ("sha256:" + 64 * "0", None, right):
        monkeypatch.setitem(
            BENCHMARKS, "esc10", small("esc10", 40, url=f"{url}/esc10.zip", checksum=checksum)
        )
        to = tmp_path / str(checksum)[-5:]
        if checksum is not None and checksum != right:
            with pytest.raises(DataError, match=r"could not be downloaded: .*does not match"):
                prepare("esc10", download=True, to=to)
            assert not list(to.rglob("*.zip"))
        else:
            assert prepare("esc10", download=True, to=to).census.whole
    monkeypatch.setitem(BENCHMARKS, "esc10", small("esc10", 40, url=f"{url}/nothing.zip"))
    with pytest.raises(DataError, match="could not be downloaded: 404"):
        prepare("esc10", download=True, to=tmp_path / "c")


def test_what_may_not_be_downloaded_is_not(tmp_path) -> None:
    for name in ("gtzan", "iemocap", "fluent_speech_commands"):
        with pytest.raises(UsageError, match="may not be downloaded by a program"):
            prepare(name, download=True, to=tmp_path)
    with pytest.raises(UsageError, match="archive or folder with --from"):
        prepare("esc50", to=tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        prepare("esc50", tmp_path / "none.zip", to=tmp_path)
    (tmp_path / "x.zip").write_bytes(b"hello")
    with pytest.raises(DataError, match="neither a folder nor a zip or tar archive"):
        prepare("esc50", tmp_path / "x.zip", to=tmp_path)


def test_too_small_a_disk_is_reported_before_anything_is_written(
    esc10, tmp_path, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    prepare_module = sys.modules["aatjax.data.prepare"]
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    with pytest.raises(WriteError, match="free"):
        prepare("esc10", esc10, to=tmp_path / "d", subset=True)
    assert not (tmp_path / "d/esc10/1.0.0").exists()


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(esc10, tmp_path) -> None:
    """F3: the final name holds a whole set; the same command continues to the same result."""
    straight = prepare("esc10", esc10, to=tmp_path / "straight", subset=True)
    home = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        "from aatjax.cli.main import main; main()",
        "prepare",
        "esc10",
        "--from",
        str(esc10),
        "--out",
        str(home),
        "--subset",
        "--quiet",
    ]
    work = home / "esc10/.work"
    marks = [
        lambda: any(work.glob("unpacked-*/ESC*")),
        lambda: len(list((work / "decoded").glob("*/*.npy"))) > 5,
        lambda: any((home / "esc10").glob(".1.0.0.*.tmp")),
    ]
    for mark in marks:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while process.poll() is None and not mark() and time.monotonic() < limit:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for entry in (work / "decoded").glob("*/*.npy"):
            np.load(entry)  # whole
    if not (home / "esc10/1.0.0").exists():
        assert subprocess.run(command).returncode == 0
    one, two = Prepared(straight.folder), Prepared(home / "esc10")
    assert one.fingerprint() == two.fingerprint()
    assert not list((home / "esc10").glob(".1.0.0.*.tmp")) and not work.exists()


def test_two_at_once_are_refused(esc10, tmp_path) -> None:
    from aatjax.io.lock import lock_folder

    with (
        lock_folder(tmp_path / "d/esc10"),
        pytest.raises(UsageError, match=r"another folder \(to=\)"),
    ):
        prepare("esc10", esc10, to=tmp_path / "d", subset=True)


def test_damage_is_reported_and_never_read_as_sound(esc10, tmp_path) -> None:
    folder = prepare("esc10", esc10, to=tmp_path / "d", subset=True).folder
    source = Prepared(folder)
    file = folder / "esc10-fold2.array_record-00000-of-00001"
    content = bytearray(file.read_bytes())
    at = next(i for i, c in enumerate(source.clips) if c.fold == "2")
    good = source.waveform(at).copy()
    content[len(content) // 3] ^= 0xFF
    os.replace(_written(tmp_path / "broken", bytes(content)), file)
    from aatjax.data import tfds

    tfds._open_records.cache_clear()
    again = Prepared(folder)
    bad = 0
    for i, clip in enumerate(again.clips):
        if clip.fold != "2":
            continue
        try:
            wave = again.waveform(i)
        except DataError as error:
            bad += 1
            assert "prepare the set again" in str(error)
        else:
            digest = hashlib.sha256(np.ascontiguousarray(wave).tobytes()).hexdigest()
            assert digest == again.reader.key(clip)
    assert bad > 0 and len(good)
    (folder / "clips.jsonl").write_bytes((folder / "clips.jsonl").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"clips\.jsonl: is damaged"):
        Prepared(folder)
    facts = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(DataError, match="prepared in format 99"):
        Prepared(folder)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_another_benchmarks_set_is_refused(esc10, tmp_path) -> None:
    from aatjax.data.formats import open_source

    folder = prepare("esc10", esc10, to=tmp_path / "d", subset=True).folder
    with pytest.raises(DataError, match="holds esc10, not gtzan"):
        open_source(folder, "gtzan")
    assert isinstance(open_source(folder.parent), Prepared)
    with pytest.raises(DataError, match="aatjax prepare gtzan --from"):
        open_source(esc10, "gtzan")
    with pytest.raises(DataError, match="is not a prepared set"):
        open_source(tmp_path, "prepared")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [("esc10", "esc10"), ("esc50", "esc50_fold4"), ("speech_commands_v1", "speech_commands_v0.01")],
)
def test_real_recordings_go_the_same_way(name, folder, real_audio, tmp_path, small_ast) -> None:
    outcome = prepare(name, real_audio / folder, to=tmp_path, subset=True)
    assert not outcome.census.whole and not outcome.quarantined
    config = load_config(f"{name}_soft_moa")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=small_ast, frames=64),
        data=dataclasses.replace(config.data, path=str(outcome.folder)),
        training=dataclasses.replace(config.training, epochs=1, batch_size=64),
    )
    result = train(config, run_dir=tmp_path / "run", show=None)
    assert not result.about["whole"] and "of" in result.about["there"]
    assert result.headline is not None
