"""Files and folders that are complete or absent, their modes, and places that no file may take."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aatjax.errors import DataError, WriteError
from aatjax.io.atomic import open_output, write_bytes, write_file, write_folder
from aatjax.io.digest import hash_arrays, hash_bytes, hash_file, hash_json
from aatjax.io.json_file import read_json, read_json_object, write_json


def streamed(path: Path) -> None:
    with open_output(path) as file:
        file.write(b"new")


WRITERS: dict[str, Any] = {
    "a whole file": lambda path: write_file(path, lambda place: place.write_bytes(b"new")),
    "json": lambda path: write_json(path, "new"),
    "an open file": lambda path: write_bytes(path, b"new"),
    "a stream": streamed,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_replaced_whole(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    WRITERS[writer](path)
    assert b"new" in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pipe_or_a_stream_keeps_its_place(writer: str, tmp_path: Path) -> None:
    """As root the like of /dev/null would otherwise become a file."""
    pipe, to_pipe, stream = tmp_path / "pipe", tmp_path / "to_pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    to_pipe.symlink_to(pipe)
    stream.symlink_to("/proc/self/fd/1")
    for path in (pipe, to_pipe, stream):
        before = path.lstat().st_ino
        with pytest.raises(WriteError, match=r"(pipe|stdout).*a device, pipe or stream, where a"):
            WRITERS[writer](path)
        assert path.lstat().st_ino == before
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "to_pipe", "stdout"}


def test_the_umask_decides_the_modes_whatever_the_library_does(tmp_path: Path) -> None:
    def private(place: Path) -> None:
        place.unlink(missing_ok=True)
        place.touch(mode=0o600)

    def fill(folder: Path) -> None:
        (folder / "below").mkdir(mode=0o700)
        private(folder / "below" / "x")

    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", private)
        write_folder(tmp_path / "folder", fill)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "below": 0o750, "x": 0o640}


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    write_folder(path, lambda folder: (folder / "a").touch())
    with pytest.raises(WriteError, match="exists and is not an empty folder"):
        write_folder(path, lambda folder: (folder / "b").touch())

    def fail(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(path, fail, replace=True)
    assert [p.name for p in path.iterdir()] == ["a"]
    write_folder(path, lambda folder: (folder / "b").touch(), replace=True)
    assert [p.name for p in path.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), open_output(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    with pytest.raises(WriteError, match="No space left on device; free space there"):
        write_file(path, lambda place: Path("/dev/full").write_bytes(b"x"))
    with pytest.raises(WriteError, match="it is a folder"):
        write_bytes(tmp_path, b"x")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_is_read_with_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert read_json(path) == read_json_object(path) == {"é": 1}
    for content in (b"{", b"[" * 10**6, b"\xff", b" " * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.json: cannot be read: not JSON.*; copy it"):
            read_json(path, limit=2 * 10**6, advice="copy it")
    with pytest.raises(DataError, match="more than 99 bytes"):
        read_json(path, limit=99)
    path.write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        read_json_object(path)
    with pytest.raises(DataError, match=r"none.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_digests_are_those_that_files_keep(tmp_path: Path) -> None:
    """Adapters, checkpoints, exports and prepared sets hold them."""
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.array(3, np.int16)}
    plain = hashlib.sha256(b"x")
    for name in ("a", "b"):
        value = np.ascontiguousarray(arrays[name])
        plain.update(f"{name}{value.shape}{value.dtype}".encode() + value.tobytes())
    assert hash_arrays(arrays, start=b"x") == plain.hexdigest()
    untyped = hashlib.sha256()
    for name in ("a", "b"):
        value = np.ascontiguousarray(arrays[name], np.float32)
        untyped.update(f"{name}{value.shape}".encode() + value.tobytes())
    assert hash_arrays(arrays, dtype=np.float32) == untyped.hexdigest()
    (tmp_path / "x").write_bytes(b"{}")
    digests = {hash_bytes("{}"), hash_bytes(b"{}"), hash_json({}), hash_file(tmp_path / "x")}
    assert digests == {hashlib.sha256(b"{}").hexdigest()}
