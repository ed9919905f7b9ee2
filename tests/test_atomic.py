"""Files that are whole or not there, and whose place no file may take."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from aatjax.errors import WriteError
from aatjax.io.atomic import open_output, write_bytes, write_file
from aatjax.io.json_file import write_json


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
