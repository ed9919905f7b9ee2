"""Files of a run folder that were damaged: rebuilt, or named with what to do."""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import make_config

from aatjax import petl
from aatjax.config import Config, Data
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import AatjaxError, DataError, UsageError, WriteError
from aatjax.experiments.older_runs import fill_defaults
from aatjax.io.json_file import write_json
from aatjax.io.lock import lock_folder
from aatjax.train.logging import MetricsWriter, read_metrics
from aatjax.train.optim import Optim
from aatjax.train.run_dir import COPY, RunClaims, read_result, restore_result

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "emptied": lambda content: b"",
    "deleted": lambda content: None,
    "cut short": lambda content: content[: len(content) // 2],
    "an object": lambda content: b"{}",
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "one field": lambda content: b'{"optim": 3, "parts": []}',
}
CONFIG = Config(petl=petl.AAT(), data=Data(path="sounds"))


def damage(path: Path, change: Callable[[bytes], bytes | None]) -> None:
    content = change(path.read_bytes())
    path.write_bytes(content or b"")
    if content is None:
        path.unlink()


def claim(folder: Path, config: Config = CONFIG, names: str = "ab") -> RunClaims:
    """What `train` does with its config and its clips."""
    clips = [Clip(name, (0,), None) for name in names]
    claims = RunClaims(folder)
    claims.check("config.json", config.to_json(), upgrade=fill_defaults)
    claims.check_clips({"train": Source(clips, ("x", "y"), name="s", reader=Reader())})
    return claims


@pytest.mark.parametrize("name", ["config.json", "clips.json"])
def test_a_damaged_claim_is_taken_from_its_copy(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    claim(tmp_path).write(1)
    before = (tmp_path / name).read_bytes()
    other = dataclasses.replace(CONFIG, optim=Optim(lr=0.5))
    for kind, change in DAMAGES.items():
        damage(tmp_path / name, change)
        if kind == "one field" and name == "config.json":  # a whole file of another run
            with pytest.raises(UsageError, match=r"optim: 3 -> "):
                claim(tmp_path)
        else:
            with pytest.warns(UserWarning, match=rf"{name} is damaged .* {COPY} has its content"):
                claims = claim(tmp_path)
            # The copy is compared as the file would be.
            different = pytest.raises(UsageError, match=r"optim.lr: None -> 0.5|gone 'b'")
            with different, warnings.catch_warnings(action="ignore"):
                claim(tmp_path, other, "a")
            claims.repair()
            assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).write_bytes(before)
    for change in DAMAGES.values():  # while the file is whole, its copy may be anything
        damage(tmp_path / COPY, change)
        with warnings.catch_warnings(action="error"):
            claim(tmp_path).write(1)
    # Runs of earlier versions have no copy.
    (tmp_path / COPY).unlink()
    (tmp_path / name).write_bytes(before[:-9])
    with pytest.raises(DataError, match=rf"{name}: is damaged.* or delete it to go on"):
        claim(tmp_path)
    (tmp_path / name).unlink()
    claim(tmp_path).write(1)
    assert (tmp_path / name).read_bytes() == before


def test_a_damaged_result_is_made_again_where_there_are_checkpoints(tmp_path: Path) -> None:
    result = {"method": "aat", "trainable": 1, "headline": None, "seconds": 1.0}
    (tmp_path / "adapter.safetensors").write_bytes(b"x")
    write_json(tmp_path / "result.json", result)
    whole = (tmp_path / "result.json").read_bytes()
    assert restore_result(tmp_path) == result
    for kind, change in DAMAGES.items():
        damage(tmp_path / "result.json", change)
        if kind != "deleted":
            with pytest.raises(DataError, match=r"result.json: is damaged: delete it, and"):
                restore_result(tmp_path)
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
        if kind != "deleted":
            with pytest.warns(UserWarning, match=r"result.json is damaged: it is made again"):
                assert restore_result(tmp_path) is None
            with pytest.raises(DataError, match=r"result.json: is damaged"):  # reports say so
                read_result(tmp_path)
        else:
            assert restore_result(tmp_path) is None
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "result.json").write_bytes(whole)


def write_rows(folder: Path, count: int, **options: Any) -> MetricsWriter:
    writer = MetricsWriter(folder, **options)
    for i in range(1, count + 1):
        writer.add({"step": 5 * i, "epoch": i, "train/loss": 1 / i, "valid/ap": None})
    writer.close()
    return writer


@pytest.mark.parametrize("line", [b"", b"{", b"null", b"[1]", b"\xff\xfe", b"{}", b"[" * 5000])
def test_the_rows_after_a_damaged_one_are_kept(tmp_path: Path, line: bytes) -> None:
    write_rows(tmp_path, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.warns(UserWarning, match=r"metrics.jsonl: line 2 is damaged and left out"):
        assert [row["epoch"] for row in read_metrics(path)] == [1, 3, 4]
    said: list[str] = []
    writer = MetricsWriter(tmp_path, step=20, rows=4, say=said.append)
    assert [row["epoch"] for row in writer.rows] == [1, 3, 4]
    assert "line 2 is damaged" in said[0] and "lacks 1 of 4 rows" in said[1]
    writer.close()


def test_a_last_line_that_a_kill_cut_short_is_dropped_in_silence(tmp_path: Path) -> None:
    write_rows(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 15, "ep')
    with warnings.catch_warnings(action="error"):
        assert [row["epoch"] for row in read_metrics(path)] == [1, 2]


def test_rows_are_on_disk_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(number), sync(number))[1])
    writer = MetricsWriter(tmp_path)
    before = len(flushed)
    writer.add({"step": 1, "epoch": 1})
    assert len(flushed) - before == 2  # the row, and the events of TensorBoard


def test_a_full_disk_is_a_write_error_of_the_row_and_no_thread_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: the queue of the usual TensorBoard writer would fill, and the run hang."""
    pytest.importorskip("tensorboardX")
    import threading

    before = threading.active_count()
    writer = write_rows(tmp_path, 1)
    assert threading.active_count() == before
    writer = MetricsWriter(tmp_path, step=5)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    assert writer._events is not None
    monkeypatch.setattr(writer._events._file, "write_event", full)
    with pytest.raises(WriteError, match=r"tensorboard: cannot be written: No space left"):
        writer.add({"step": 10, "epoch": 2, "train/loss": 0.5})
    writer.close()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"metrics.jsonl: cannot be written: No space left"):
        writer.add({"step": 15, "epoch": 3})
    shutil.rmtree(tmp_path)
    with pytest.raises(WriteError, match=r"metrics.jsonl: cannot be written: No such file"):
        writer.add({"step": 15, "epoch": 3})


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_lock_files_are_written_again(tmp_path: Path, kind: str) -> None:
    for name in (".lock", ".lock.json"):
        (tmp_path / name).write_text('{"pid": 1}')
        damage(tmp_path / name, DAMAGES[kind])
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_a_run_goes_on_whatever_file_of_it_is_damaged(
    tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file emptied, deleted, cut short, filled with something else."""
    run, kept, config = tmp_path / "run", tmp_path / "kept", make_config(tmp_path)

    def train(folder: Path) -> None:
        with warnings.catch_warnings(action="ignore"):
            tiny_run.train(config, folder)

    def fail(*args: Any, **options: Any) -> None:
        raise DataError("stopped before its result was written")

    if not finished:
        monkeypatch.setattr("aatjax.experiments.run._write_result", fail)
    try:
        train(kept)
    except DataError:
        assert not finished
    monkeypatch.undo()
    adapter = kept / "adapter.safetensors"
    wanted = adapter.read_bytes() if finished else None
    shutil.rmtree(str(config.data.cache))
    files = [path.relative_to(kept) for path in sorted(kept.rglob("*")) if path.is_file()]
    files = [
        path for path in files if "pytree" not in path.parts and "tensorboard" not in path.parts
    ]
    assert Path("config.json") in files and Path(COPY) in files
    refused: dict[str, str] = {}
    # A finished run trains nothing again, so it is quick.
    kinds = list(DAMAGES) if finished else ["emptied", "deleted", "an object", "one field"]
    for name in files:
        for kind in kinds:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(kept, run)
            damage(run / name, DAMAGES[kind])
            try:
                train(run)
            except AatjaxError as error:
                refused[f"{name}: {kind}"] = str(error)
                assert "\n" not in str(error) and str(run) in str(error)
            else:
                new = (run / "adapter.safetensors").read_bytes()
                wanted = wanted or new
                assert new == wanted, (name, kind)
                assert (run / "config.json").read_bytes() == (kept / "config.json").read_bytes()
                assert read_result(run) is not None
    # What another file might be is refused, and nothing else.
    allowed = {"config.json: one field", "settings.json: one field"}
    if finished:
        allowed = {"config.json: one field"}
        allowed |= {f"adapter.safetensors: {kind}" for kind in DAMAGES if kind != "deleted"}
    assert set(refused) == allowed, refused
