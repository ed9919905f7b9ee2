"""Where the tables and sounds of a data set of the Hub lie in its folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aatjax.audio.listing import EXTENSIONS, list_audio
from aatjax.data.huggingface.tables import (
    HubRow,
    HubTable,
    describe_columns,
    take_features,
)
from aatjax.data.splits import SPLITS
from aatjax.errors import DataError, UsageError, printable
from aatjax.io.json_file import read_json_object

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NOISE_FOLDER = "_background_noise_"
SHARD = re.compile(r"([a-z]+)(?:[-_.]\d+)*(?:-of-\d+(?:-[0-9a-f]+)?)?", re.IGNORECASE)
Layout = Literal["parquet", "disk", "dict", "metadata", "folders"]
ADVICE = "copy the whole folder, or save the set again"


def detect_layout(path: Path, audio: str = "audio") -> Layout | None:
    """How a set is laid out on disk; None for no layout of the Hub. `audio`: the sounds' column."""
    try:
        if path.is_file():
            return "parquet" if path.suffix.lower() == ".parquet" else None
        if not path.is_dir():
            return None
        if (path / "dataset_dict.json").is_file():
            return "dict"
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return "disk"
        if _metadata_files(path):
            return "metadata"
        shards = [file for files in _shards(path).values() for file in files]
        if shards and (not _has_audio(path) or _holds_sound(shards[0], audio)):
            return "parquet"
        return "folders" if _has_split_folders(path) else None
    except OSError:
        return None


def open_tables(path: Path, layout: Layout) -> list[HubTable]:
    """The files of rows of a data set, in order, with what is known of their columns."""
    if layout == "disk":
        return _saved(path, "", None)
    if layout == "dict":
        said = read_json_object(path / "dataset_dict.json", advice=ADVICE).get("splits")
        if not isinstance(said, list) or not all(isinstance(s, str) and _is_name(s) for s in said):
            raise DataError(
                f"{printable(path)}: dataset_dict.json lists no splits; save the set anew"
            )
        tables: list[HubTable] = []
        for part in said:
            split = SPLITS.get(part.lower())
            tables += _saved(path / part, split or part, split)
        return tables
    if layout == "metadata":
        tables = [HubTable(file, "", _split_folder(path, file)) for file in _metadata_files(path)]
        twice = [f for f, n in Counter(table.file.parent for table in tables).items() if n > 1]
        if twice:
            names = " and ".join(t.file.name for t in tables if t.file.parent == twice[0])
            raise DataError(f"{printable(twice[0])}: has {names}; keep one of them")
    elif path.is_file():
        tables = [_shard(path.parent, path)]
    else:
        parts = _shards(path)
        if len(parts) > 1:
            raise DataError(
                f"{printable(path)}: holds {len(parts)} configurations: {printable(', '.join(parts))}; "
                f"open one of them, such as {printable(path / next(iter(parts)))}"
            )
        tables = [_shard(path, file) for file in next(iter(parts.values()))]
    for table in tables:
        describe_columns(table)
    return tables


def _saved(folder: Path, part: str, split: str | None) -> list[HubTable]:
    """The files of one data set written by save_to_disk."""
    state, info = (
        read_json_object(folder / "state.json", advice=ADVICE),
        read_json_object(folder / "dataset_info.json", advice=ADVICE),
    )
    listed = state.get("_data_files")
    said = [f.get("filename") if isinstance(f, dict) else None for f in listed or ()]
    files = [name for name in said if isinstance(name, str) and _is_name(name)]
    if not files or len(files) < len(said):
        raise DataError(f"{printable(folder)}: state.json lists no data files; save the set anew")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{printable(folder)}: holds an index of rows beside the rows, as old versions of datasets "
            "wrote it; load it there, call flatten_indices() and save it anew"
        )
    tables = [HubTable(folder / name, part, split) for name in files]
    for table in tables:
        describe_columns(table)
        take_features(table, info.get("features"))
    return tables


def _shards(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of each configuration; '' is the one without a folder of its own."""
    if own := _own_shards(root):
        return {"": own}
    return {f.name: files for f in _folders(root) if (files := _own_shards(f))}


def _own_shards(folder: Path) -> list[Path]:
    """Parquet files in a folder, its `data`, or the split folders of either."""
    found: list[Path] = []
    for base in (folder, folder / "data"):
        found += _parquet_in(base)
        for inside in _folders(base):
            if inside.name.lower() in SPLITS:
                found += _parquet_in(inside)
    return found


def _parquet_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() == ".parquet"
        and entry.name not in METADATA
        and not entry.name.startswith(".")
        and entry.is_file()
    )


def _holds_sound(file: Path, audio: str) -> bool:
    """Whether a Parquet file has a column of sounds; one that cannot be read counts as if."""
    table = HubTable(file, "", None)
    try:
        describe_columns(table)
    except (DataError, UsageError):
        return True
    return audio in table.columns or bool(table.sounds)


def _shard(root: Path, file: Path) -> HubTable:
    match = SHARD.fullmatch(file.stem)
    split = SPLITS.get(match[1].lower()) if match else None
    if split is None and file.parent != root:
        split = SPLITS.get(file.parent.name.lower())
    return HubTable(file, split or "", split)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(e for e in folder.iterdir() if not e.name.startswith(".") and e.is_dir())


def _metadata_files(root: Path) -> list[Path]:
    """Metadata at the root, else those of the split folders."""
    splits = [f for b in (root, root / "data") for f in _folders(b) if f.name.lower() in SPLITS]
    for folders in ([root], [root / "data"], splits):
        found = [folder / name for folder in folders for name in METADATA]
        found = [file for file in found if file.is_file() and _names_files(file)]
        if found:
            return found
    return []


def _names_files(file: Path) -> bool:
    """Whether metadata has a column `file_name`; a file that cannot be read counts as if."""
    if file.suffix == ".parquet":
        return _holds_sound(file, "file_name")
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        head = next((line for line in lines if line.strip()), "")
    if file.suffix == ".jsonl":
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(head)
            return isinstance(row, dict) and "file_name" in [key.strip().lower() for key in row]
        return False
    return "file_name" in [cell.strip(' "\r\n').lower() for cell in re.split("[,;\t]", head)]


def _split_folder(root: Path, file: Path) -> str | None:
    return SPLITS.get(file.parent.name.lower()) if file.parent != root else None


def _has_split_folders(root: Path) -> bool:
    """Whether all folders with sound are split folders, with class folders inside."""
    found = False
    for folder in _folders(root):
        if folder.name.lower() in SPLITS:
            found = found or any(_has_audio(inside) for inside in _folders(folder))
        elif folder.name != NOISE_FOLDER and _has_audio(folder):
            return False
    return found


def _has_audio(folder: Path) -> bool:
    return any(
        os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        for _, _, names in os.walk(folder)
        for name in names
    )


def class_folders(root: Path) -> tuple[list[HubRow], list[tuple[str, str]]]:
    """The clips of SPLIT/CLASS/FILE, and what was left out with the reason."""
    files, skipped = audio_files(root)
    rows: list[HubRow] = []
    for id in files:
        split, _, rest = id.partition("/")
        name, inside, _ = rest.partition("/")
        if split.lower() not in SPLITS:
            skipped.append((id, "not in a split folder"))
        elif not inside or name == NOISE_FOLDER:
            skipped.append((id, "background noise" if inside else "not in a class folder"))
        else:
            label = unicodedata.normalize("NFC", name)
            row = HubRow("", len(rows), id, str(root / id), [label], id, SPLITS[split.lower()])
            rows.append(row)
    return rows, skipped


def audio_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of the sound files below the root, and what was skipped.

    In a snapshot of the Hub's cache every file is a link into the folder of blobs beside it.
    """
    listed, left = list_audio(root)
    homes = homes_in(root)
    skipped: list[tuple[str, str]] = []
    for path, why in left:
        linked = why == "link out of the folder" and os.path.isfile(path)
        if linked and is_home(path, homes) and Path(path).suffix.lower() in EXTENSIONS:
            listed.append(Path(path))
        else:
            skipped.append((below(root, path), why))
    return sorted(below(root, file) for file in listed), skipped


def homes_in(root: Path) -> list[str]:
    """The folders that files may really lie in."""
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    return [os.path.realpath(folder) for folder in (root, *blobs[:1])]


def is_home(path: str, homes: Sequence[str]) -> bool:
    """Whether a path, links followed, lies in one of the folders."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([home, real]) == home for home in homes)


def below(root: Path, path: str | Path) -> str:
    """A path relative to the set's folder, or as it is where it lies elsewhere."""
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
