"""Layouts of the Hub's data sets on disk: which files hold tables, which hold sounds."""

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
from aatjax.data.folders import NOISE_FOLDER, make_relative
from aatjax.data.huggingface.tables import HubRow, HubTable, describe_columns, take_features
from aatjax.data.splits import SPLITS
from aatjax.errors import AatjaxError, DataError, printable
from aatjax.io.json_file import read_json_object

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARD = re.compile(r"([a-z]+)(?:[-_.]\d+)*(?:-of-\d+(?:-[0-9a-f]+)?)?", re.IGNORECASE)
Layout = Literal["parquet", "disk", "dict", "metadata", "folders"]
ADVICE = "copy the whole folder, or save the set again"


def detect_layout(path: Path, audio: str = "audio") -> Layout | None:
    """Return the layout of a set on disk; None for none of the Hub. `audio`: the sound column."""
    try:
        if path.is_file():
            return "parquet" if path.suffix.lower() == ".parquet" else None
        if not path.is_dir():
            return None
        if (path / "dataset_dict.json").is_file():
            return "dict"
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return "disk"
        if _list_metadata(path):
            return "metadata"
        shards = [file for files in _list_shards(path).values() for file in files]
        if shards and (not _has_audio(path) or _has_column(shards[0], audio)):
            return "parquet"
        return "folders" if _has_split_folders(path) else None
    except OSError:
        return None


def open_tables(path: Path, layout: Layout) -> list[HubTable]:
    """Return the tables of a data set, in order, with their columns described."""
    if layout == "disk":
        return _open_saved(path, "", None)
    if layout == "dict":
        parts = read_json_object(path / "dataset_dict.json", advice=ADVICE).get("splits")
        if not isinstance(parts, list) or not all(map(_is_name, parts)):
            raise DataError(f"{printable(path)}: dataset_dict.json lists no splits; {ADVICE}")
        splits = [SPLITS.get(part.lower()) for part in parts]
        return [
            table
            for part, split in zip(parts, splits, strict=True)
            for table in _open_saved(path / part, split or part, split)
        ]
    if layout == "metadata":
        files = _list_metadata(path)
        tables = [
            HubTable(f, "", SPLITS.get(f.parent.name.lower()) if f.parent != path else None)
            for f in files
        ]
        twice = [folder for folder, n in Counter(f.parent for f in files).items() if n > 1]
        if twice:
            names = " and ".join(f.name for f in files if f.parent == twice[0])
            raise DataError(f"{printable(twice[0])}: has {names}; keep one of them")
    elif path.is_file():
        tables = [_open_shard(path.parent, path)]
    else:
        shards = _list_shards(path)
        if len(shards) > 1:
            raise DataError(
                f"{printable(path)}: holds {len(shards)} configurations: "
                f"{printable(', '.join(shards))}; open one of them, such as "
                f"{printable(path / next(iter(shards)))}"
            )
        tables = [_open_shard(path, file) for file in next(iter(shards.values()))]
    for table in tables:
        describe_columns(table)
    return tables


def _open_saved(folder: Path, part: str, split: str | None) -> list[HubTable]:
    """The files of one data set written by save_to_disk."""
    state = read_json_object(folder / "state.json", advice=ADVICE)
    features = read_json_object(folder / "dataset_info.json", advice=ADVICE).get("features")
    listed = state.get("_data_files")
    files = [f.get("filename") if isinstance(f, dict) else None for f in listed or ()]
    if not files or not all(map(_is_name, files)):
        raise DataError(f"{printable(folder)}: state.json lists no data files; {ADVICE}")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{printable(folder)}: holds an index of rows beside the rows, as old versions of "
            "datasets wrote it; load it there, call flatten_indices() and save it again"
        )
    tables = [HubTable(folder / str(name), part, split) for name in files]
    for table in tables:
        describe_columns(table)
        take_features(table, features)
    return tables


def _list_shards(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of each configuration; '' is the one without a folder of its own."""
    if own := _list_own_shards(root):
        return {"": own}
    return {f.name: files for f in _list_folders(root) if (files := _list_own_shards(f))}


def _list_own_shards(folder: Path) -> list[Path]:
    """Parquet files in a folder, its `data`, or the split folders of either."""
    places = [
        place
        for base in (folder, folder / "data")
        for place in (base, *_list_split_folders(base))
        if place.is_dir()
    ]
    return [
        entry
        for place in places
        for entry in sorted(place.iterdir())
        if entry.suffix.lower() == ".parquet"
        and entry.name not in METADATA
        and not entry.name.startswith(".")
        and entry.is_file()
    ]


def _has_column(file: Path, name: str) -> bool:
    """Whether a Parquet file has this column or one of sound; True if it cannot be read."""
    table = HubTable(file, "", None)
    try:
        describe_columns(table)
    except AatjaxError:
        return True
    return name in table.columns or bool(table.sounds)


def _open_shard(root: Path, file: Path) -> HubTable:
    match = SHARD.fullmatch(file.stem)
    split = SPLITS.get(match[1].lower()) if match else None
    if split is None and file.parent != root:
        split = SPLITS.get(file.parent.name.lower())
    return HubTable(file, split or "", split)


def _list_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(e for e in folder.iterdir() if not e.name.startswith(".") and e.is_dir())


def _list_split_folders(folder: Path) -> list[Path]:
    return [inside for inside in _list_folders(folder) if inside.name.lower() in SPLITS]


def _list_metadata(root: Path) -> list[Path]:
    """Metadata at the root, else those of the split folders."""
    data = root / "data"
    for folders in ([root], [data], [*_list_split_folders(root), *_list_split_folders(data)]):
        found = [folder / name for folder in folders for name in METADATA]
        found = [file for file in found if file.is_file() and _names_files(file)]
        if found:
            return found
    return []


def _names_files(file: Path) -> bool:
    """Whether metadata has a column `file_name`; True for Parquet that cannot be read."""
    if file.suffix == ".parquet":
        return _has_column(file, "file_name")
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        head = next((line for line in lines if line.strip()), "")
    if file.suffix == ".jsonl":
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(head)
            return isinstance(row, dict) and "file_name" in [key.strip().lower() for key in row]
        return False
    return "file_name" in [cell.strip(' "\r\n').lower() for cell in re.split("[,;\t]", head)]


def _has_split_folders(root: Path) -> bool:
    """Whether all folders with sound are split folders, with class folders inside."""
    found = False
    for folder in _list_folders(root):
        if folder.name.lower() in SPLITS:
            found = found or any(_has_audio(inside) for inside in _list_folders(folder))
        elif folder.name != NOISE_FOLDER and _has_audio(folder):
            return False
    return found


def _has_audio(folder: Path) -> bool:
    return any(
        os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        for _, _, names in os.walk(folder)
        for name in names
    )


def list_class_folders(root: Path) -> tuple[list[HubRow], list[tuple[str, str]]]:
    """Return the clips of SPLIT/CLASS/FILE, and (path, why) of files that are not used."""
    files, skipped = list_audio_files(root)
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


def list_audio_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return paths of the sound files below the root, and (path, why) of others.

    In a snapshot of the Hub's cache every file is a link into the folder of blobs beside it.
    """
    listed, left = list_audio(root)
    homes = list_homes(root)
    skipped: list[tuple[str, str]] = []
    for path, why in left:
        linked = why == "link out of the folder" and os.path.isfile(path)
        if linked and is_inside(path, homes) and Path(path).suffix.lower() in EXTENSIONS:
            listed.append(Path(path))
        else:
            skipped.append((make_relative(root, path), why))
    return sorted(make_relative(root, file) for file in listed), skipped


def list_homes(root: Path) -> list[str]:
    """Return the folders in which the files of a set may lie, links followed."""
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    return [os.path.realpath(folder) for folder in (root, *blobs[:1])]


def is_inside(path: str, homes: Sequence[str]) -> bool:
    """Whether a path, links followed, lies in one of the folders."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([home, real]) == home for home in homes)


def _is_name(name: object) -> bool:
    """Whether a name of a file or folder leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
