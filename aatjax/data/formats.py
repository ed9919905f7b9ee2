"""One way to open any supported layout of labelled sounds."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from aatjax.audio.listing import EXTENSIONS
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.class_folders import is_system_path
from aatjax.data.folders import ESC, SPLIT_LISTS, AudioFolder, NamePattern
from aatjax.data.groups import assign_groups
from aatjax.data.huggingface.dataset import HuggingFace, is_hub_dataset
from aatjax.data.manifest import Column, Manifest
from aatjax.data.parts import Part, find_parts, join_parts
from aatjax.data.source import Progress, Source
from aatjax.data.tfds import Prepared, is_prepared, read_facts
from aatjax.errors import DataError, UsageError
from aatjax.io.host import pause_collection

SourceFormat = Literal[
    "auto",
    "synthetic",
    "folder",
    "manifest",
    "esc",
    "names",
    "parts",
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
DEPTH = 3  # folders that an archive may put around a set
FSDD = r"(?P<label>\d)_(?P<group>[^_]+)_\d+\.wav"


@dataclasses.dataclass(frozen=True)
class _Options:
    """What else is known of a layout: arguments of `open_source`."""

    pattern: str | None = None
    columns: Mapping[Column, str] | None = None
    root: str | None = None
    strict: bool = True
    progress: Progress | None = None


@pause_collection()
def open_source(
    path: str | Path | Mapping[Part, str],
    format: SourceFormat = "auto",
    *,
    pattern: str | None = None,
    columns: Mapping[Column, str] | None = None,
    root: str | None = None,
    group: str | None = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> Source:
    """Open labelled sounds.

    Args:
        path: a folder, or a CSV or JSON-lines file; or one of them for each part of an official
            division: {"train": "train.csv", "test": "test.csv"}.
        format: the layout, or the name of a benchmark, as its owner distributes it or prepared;
            `auto` detects it, see `detect_format`.
        pattern: regular expression for `names`.
        columns: columns of a CSV or JSON-lines file by what they hold, see `Manifest`.
        root: folder that the names in such a file are relative to; by default the file's own.
        strict: refuse a CSV or JSON-lines file with wrong rows; otherwise they are skipped.
        group: regular expression that finds a clip's group in its file name, see `assign_groups`.
        progress: called with the stage `list`, the files found, and the rows of their list.

    Raises:
        UsageError: an unknown format, an option that does not go with it, or a pattern that is no
            regular expression.
        DataError: no usable data found.
    """
    options = _Options(pattern, columns, root, strict, progress)
    if isinstance(path, Mapping):
        first = Path(next(iter(path.values()), "")).expanduser().absolute()
        source = _open_parts(path, format, options, first.parent.name)
    else:
        source = _open(Path(path).expanduser(), format, options)
    return assign_groups(source, group) if group is not None else source


def _open(path: Path, format: SourceFormat, options: _Options) -> Source:
    if not path.exists():
        hint = f"; aatjax prepare {format} --from ARCHIVE makes it" if format in BENCHMARKS else ""
        raise DataError(f"{path}: no such file or folder{hint}")
    if format == "auto":
        format, path = ("names", path) if options.pattern else detect_format(path)
    for name in ("columns", "root"):
        if getattr(options, name) is not None and format not in ("manifest", "parts"):
            raise UsageError(
                f"--data.{name} is for CSV and JSON-lines files, and {path} is read as {format}: "
                "give the file by --data.path"
            )
    if format in BENCHMARKS:
        return _open_benchmark(path, format)
    match format:
        case "folder":
            return AudioFolder(path, progress=options.progress)
        case "manifest":
            return Manifest(
                path,
                root=options.root,
                columns=options.columns,
                strict=options.strict,
                progress=options.progress,
            )
        case "esc":
            return ESC(path)
        case "names":
            return NamePattern(_find_recordings(path), options.pattern or FSDD)
        case "parts":
            parts = find_parts(path)
            if not parts:
                raise DataError(
                    f"{path}: no train.csv with valid.csv or test.csv, and no folders of these "
                    "names with class folders inside: name each by --data.path train=... test=..."
                )
            return _open_parts(parts, "auto", options, path.name)
        case "prepared":
            return Prepared(path)
        case "huggingface":
            return HuggingFace(path)
        case "synthetic":
            raise UsageError("synthetic sounds have no path: omit data.path")
    raise UsageError(f"unknown data format {format!r}: one of {', '.join(get_args(SourceFormat))}")


def _open_parts(
    paths: Mapping[Part, str], format: SourceFormat, options: _Options, name: str
) -> Source:
    parts: dict[Part, Source] = {
        p: _open(Path(path).expanduser(), format, options) for p, path in paths.items()
    }
    return join_parts(parts, name)


def detect_format(path: Path) -> tuple[SourceFormat, Path]:
    """Return the layout of a file or folder, and the folder that holds it.

    A folder may be the one that an archive was unpacked to. In this order: a prepared set, a data
    set of Hugging Face's `datasets`, a benchmark as its owner distributes it, ESC's layout
    (`meta/esc50.csv`), `parts` (`train.csv` and `test.csv`, or such folders), `names` (files named
    as in the Free Spoken Digit Dataset), else class folders. A file is Parquet or a manifest.
    """
    if is_prepared(path):
        return "prepared", path
    if path.is_file():
        return "huggingface" if is_hub_dataset(path) else "manifest", path
    for folder in _unwrap(path):
        if is_hub_dataset(folder):
            return "huggingface", folder
        for name, benchmark in BENCHMARKS.items():
            if benchmark.is_in(folder):
                return cast(SourceFormat, name), folder
        if (folder / "meta" / "esc50.csv").exists():
            return "esc", folder
        if find_parts(folder):
            return "parts", folder
        if any(_find_recordings(folder).glob("[0-9]_*_[0-9]*.wav")):
            return "names", folder
        if any((folder / name).is_file() for name in SPLIT_LISTS):
            return "folder", folder
    return "folder", path


def _unwrap(path: Path) -> Iterator[Path]:
    """Yield a folder and, as long as it holds a single folder and no sound, the one in it."""
    for _ in range(DEPTH):
        yield path
        try:
            entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        except OSError:
            return
        folders = [e for e in entries if e.is_dir() and not is_system_path(f"{e.name}/")]
        sounds = any(e.suffix.lower() in EXTENSIONS for e in entries)
        if len(folders) != 1 or sounds:
            return
        path = folders[0]


def detect_benchmark(
    path: str | Path | Mapping[Part, str] | None, format: str, pattern: str | None = None
) -> str | None:
    """Return the benchmark that a format names, or that a folder holds, if any."""
    if format in BENCHMARKS:
        return format
    if path is None or isinstance(path, Mapping) or format not in ("auto", "prepared"):
        return None
    folder = Path(path).expanduser()
    if is_prepared(folder):
        return read_facts(folder).get("benchmark")
    found = "" if pattern or format != "auto" or not folder.is_dir() else detect_format(folder)[0]
    return found if found in BENCHMARKS else None


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


def _find_recordings(path: Path) -> Path:
    return path / "recordings" if (path / "recordings").is_dir() else path
