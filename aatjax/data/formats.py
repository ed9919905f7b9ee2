"""One way to open any supported layout of labelled sounds."""

from pathlib import Path
from typing import Literal, get_args

from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.folders import ESC, AudioFolder, NamePattern
from aatjax.data.huggingface import dataset
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
FSDD = r"(?P<label>\d)_(?P<group>[^_]+)_\d+\.wav"


def open_source(
    path: str | Path, format: SourceFormat = "auto", *, pattern: str | None = None
) -> Source:
    """Opens labelled sounds.

    Args:
        path: a folder, or a CSV or JSON-lines file.
        format: the layout, or the name of a benchmark, as its owner distributes it or prepared;
            `auto` goes by what lies there: a prepared set, one that Hugging Face `datasets` wrote,
            a manifest where it is a file, ESC's layout where there is `meta/esc50.csv`, `names`
            where file names are as in the Free Spoken Digit Dataset, else a folder of class
            folders.
        pattern: regular expression for `names`.

    Raises:
        UsageError: a format or pattern that cannot be.
        DataError: nothing usable lies there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        hint = f"; aatjax prepare {format} --from ARCHIVE makes it" if format in BENCHMARKS else ""
        raise DataError(f"{path}: no such file or folder{hint}")
    if format in BENCHMARKS:
        return _benchmark(path, format)
    if format == "auto":
        format = "names" if pattern else _guess(path)
    match format:
        case "folder":
            return AudioFolder(path)
        case "manifest":
            return Manifest(path)
        case "esc":
            return ESC(path)
        case "names":
            return NamePattern(_recordings(path), pattern or FSDD)
        case "prepared":
            return Prepared(path)
        case "huggingface":
            return dataset.HuggingFace(path)
        case "synthetic":
            raise UsageError("synthetic sounds have no path: leave data.path out")
    raise UsageError(f"unknown data format {format!r}: one of {', '.join(get_args(SourceFormat))}")


def detect_benchmark(path: str | Path | None, format: str) -> str | None:
    """The benchmark that a format names, or that a prepared folder tells it holds."""
    if format in BENCHMARKS:
        return format
    if path is None or format not in ("auto", "prepared"):
        return None
    folder = Path(path).expanduser()
    return read_facts(folder).get("benchmark") if is_prepared(folder) else None


def _benchmark(path: Path, name: str) -> Source:
    """A benchmark as its owner distributes it, unpacked, or prepared."""
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


def _guess(path: Path) -> SourceFormat:
    if is_prepared(path):
        return "prepared"
    if dataset.is_hub_dataset(path):
        return "huggingface"
    if path.is_file():
        return "manifest"
    if (path / "meta" / "esc50.csv").exists():
        return "esc"
    if next(_recordings(path).glob("[0-9]_*_[0-9]*.wav"), None) is not None:
        return "names"
    return "folder"


def _recordings(path: Path) -> Path:
    return path / "recordings" if (path / "recordings").is_dir() else path
