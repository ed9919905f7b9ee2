"""One way to open any supported layout of labelled sounds."""

from pathlib import Path
from typing import Literal, get_args

from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.folders import ESC, AudioFolder, NamePattern
from aatjax.data.huggingface.dataset import HuggingFace, is_hub_dataset
from aatjax.data.manifest import Manifest
from aatjax.data.source import Source
from aatjax.data.tfds import Prepared, is_prepared, read_facts
from aatjax.errors import DataError, UsageError

SourceFormat = Literal[
    "auto",
    "synthetic",
    "folder",
    "manifest",
    "esc",
    "names",
    "prepared",
    "huggingface",
    "esc50",
    "esc10",
    "urbansound8k",
    "speech_commands_v1",
    "speech_commands_v2",
    "openmic2018",
    "gtzan",
    "fluent_speech_commands",
    "iemocap",
]
"""Layouts, then the names of the benchmarks."""
FSDD = r"(?P<label>\d)_(?P<group>[^_]+)_\d+\.wav"


def open_source(
    path: str | Path, format: SourceFormat = "auto", *, pattern: str | None = None
) -> Source:
    """Open labelled sounds.

    Args:
        path: a folder, or a CSV or JSON-lines file.
        format: the layout, or the name of a benchmark, as its owner distributes it or prepared;
            `auto` detects a prepared set, a data set of Hugging Face's `datasets`, a manifest (any
            other file), ESC's layout (`meta/esc50.csv`), `names` (files named as in the Free Spoken
            Digit Dataset), and takes all else as a folder of class folders.
        pattern: regular expression for `names`.

    Raises:
        UsageError: an unknown format, or a pattern that is none.
        DataError: no usable data found.
    """
    path = Path(path).expanduser()
    if not path.exists():
        hint = f"; aatjax prepare {format} --from ARCHIVE makes it" if format in BENCHMARKS else ""
        raise DataError(f"{path}: no such file or folder{hint}")
    if format in BENCHMARKS:
        return _open_benchmark(path, format)
    if format == "auto":
        format = "names" if pattern else _detect(path)
    match format:
        case "folder":
            return AudioFolder(path)
        case "manifest":
            return Manifest(path)
        case "esc":
            return ESC(path)
        case "names":
            return NamePattern(_find_recordings(path), pattern or FSDD)
        case "prepared":
            return Prepared(path)
        case "huggingface":
            return HuggingFace(path)
        case "synthetic":
            raise UsageError("synthetic sounds have no path: omit data.path")
    raise UsageError(f"unknown data format {format!r}: one of {', '.join(get_args(SourceFormat))}")


def detect_benchmark(path: str | Path | None, format: str) -> str | None:
    """Return the benchmark that a format names or that a prepared folder holds, if any."""
    if format in BENCHMARKS:
        return format
    if path is None or format not in ("auto", "prepared"):
        return None
    folder = Path(path).expanduser()
    return read_facts(folder).get("benchmark") if is_prepared(folder) else None


def _open_benchmark(path: Path, name: str) -> Source:
    if not is_prepared(path):
        if path.is_file():
            raise DataError(
                f"{path}: is a file: aatjax prepare {name} --from {path} makes a set of an archive"
            )
        return BENCHMARKS[name].read(path)
    found = read_facts(path).get("benchmark")
    if found != name:
        raise DataError(f"{path}: holds {found or 'another set'}, not {name}")
    return Prepared(path)


def _detect(path: Path) -> SourceFormat:
    if is_prepared(path):
        return "prepared"
    if is_hub_dataset(path):
        return "huggingface"
    if path.is_file():
        return "manifest"
    if (path / "meta" / "esc50.csv").exists():
        return "esc"
    return "names" if any(_find_recordings(path).glob("[0-9]_*_[0-9]*.wav")) else "folder"


def _find_recordings(path: Path) -> Path:
    return path / "recordings" if (path / "recordings").is_dir() else path
