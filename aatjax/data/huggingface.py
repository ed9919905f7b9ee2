"""`HuggingFace`: data sets as the `datasets` library and the Hub write them, read without it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aatjax.audio.listing import EXTENSIONS, list_audio, show
from aatjax.data.clips import Clip, Source
from aatjax.data.quarantine import unwritable, write_whole
from aatjax.data.splits import order_names
from aatjax.data.tables import Problems, read_rows
from aatjax.errors import DataError, UsageError, WriteError

LABEL_COLUMNS = ("label", "labels")
GROUP_COLUMNS = ("group", "speaker", "speaker_id", "source")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NOISE_FOLDER = "_background_noise_"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"([a-z]+)(?:[-_.]\d+)*(?:-of-\d+(?:-[0-9a-f]+)?)?", re.IGNORECASE)
BATCH = 16  # rows held at a time: their sounds are in memory
EXPECTED = (
    "expected .parquet files, a folder written by save_to_disk, metadata.csv (or .jsonl, .parquet) "
    "with a column file_name, or train/<class>/<file>"
)

Layout = Literal["parquet", "disk", "dict", "metadata", "folders"]


class HuggingFace(Source):
    """A local data set in one of the layouts of Hugging Face's `datasets` library and Hub.

    - Parquet: one file, or a folder with files in it, in its `data`, or in the folder of its one
      configuration. File names such as `train-00000-of-00003.parquet` give the split.
    - Folders written by `save_to_disk`, of a data set or of several splits.
    - Sound files with `metadata.csv`, `.jsonl` or `.parquet` (column `file_name`) at the root or
      in each split folder; or in `train/<class>/<file>`, `test/<class>/<file>`.

    Class names stored with the data (a ClassLabel) keep their order and are all kept; else the
    classes are the labels that occur, sorted. A column of lists makes a multi-label set. Rows
    without sound or label, and rows whose label is -1 (kept secret), are in `skipped`; rows are
    counted from 0 in Parquet and Arrow files and as a spreadsheet does in CSV. A column `fold` is
    the fold, `group`, `speaker`, `speaker_id` or `source` the group.

    Sounds held inside the data are written out as files, in a folder named after the data set's
    place, files, sizes and dates; files that are there already are left as they are.

    Args:
        path: the folder, or one .parquet file.
        audio: name of the column with the sound: its bytes, or a path inside the folder.
        label: name of the column with the label; by default `label`, `labels`, or the only
            ClassLabel.
        extract_to: where sounds held inside the data are written; the user's cache by default.

    Raises:
        DataError: no such layout, a damaged file, a column that is missing, a label out of range,
            or a path that leads out of the folder or to no file.
        UsageError: pyarrow, which reads Parquet and Arrow files, is not installed.
        WriteError: a sound cannot be written out.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        audio: str = "audio",
        label: str | None = None,
        extract_to: str | Path | None = None,
    ) -> None:
        path = Path(path).expanduser().absolute()
        if not path.exists():
            raise DataError(f"{show(path)}: no such file or folder")
        layout = _layout(path, audio)
        if layout is None:
            raise DataError(f"{show(path)}: not a data set of Hugging Face's; {EXPECTED}")
        root = path if path.is_dir() else path.parent
        name = path.name if path.is_dir() else path.stem
        kept: list[list[str] | None] = []
        multi_label = False
        if layout == "folders":
            rows, skipped = _class_folders(root)
        else:
            tables = _tables(path, layout)
            if layout == "metadata" and audio == "audio":
                audio = "file_name"
            label = _label_column(tables, label)
            place = _place(root, tables, audio, extract_to)
            opened = _Opened(root, layout == "metadata", audio, label, place)
            for table in tables:
                opened.add(table)
                kept.append(table.names.get(label))
            opened.finish()
            rows, skipped, multi_label = opened.rows, opened.skipped, opened.multi_label
        if not rows:
            first = f", such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise DataError(f"{show(path)}: no clip; {len(skipped)} rows were left out{first}")
        classes = _classes(rows, kept)
        position = {name: i for i, name in enumerate(classes)}
        super().__init__(
            (
                Clip(
                    id,
                    tuple(sorted({position[name] for name in row.labels})),
                    row.path,
                    fold=row.fold,
                    split=row.split,
                    group=row.group,
                )
                for id, row in zip(_ids(rows), rows, strict=True)
            ),
            classes,
            name=name,
            multi_label=multi_label,
            skipped=skipped,
        )


def looks_like(path: str | Path) -> bool:
    """Whether a path is in one of the layouts of `HuggingFace`; class folders alone are not."""
    return _layout(Path(path).expanduser()) is not None


@dataclass
class _Row:
    """One clip to be: what it is called if that is unique, else it gets its number in its part."""

    part: str
    number: int
    name: str | None
    path: str
    labels: list[str]
    where: str
    split: str | None = None
    fold: str | None = None
    group: str | None = None


@dataclass
class _Table:
    """A file of rows.

    Attributes:
        file: where it lies; names of sound files in it are relative to its folder.
        part: what the ids of its clips begin with.
        split: the split of all its rows, where that is known.
        columns: names of the columns.
        names: class names of the columns that have them.
        sounds: the columns that say they hold sound.
        text: the rows of a CSV or JSON-lines file.
    """

    file: Path
    part: str
    split: str | None
    columns: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    sounds: list[str] = field(default_factory=list)
    text: list[tuple[int, dict[str, Any]]] | None = None

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and cells of every row, few at a time."""
        if self.text is not None:
            yield from self.text
            return
        import pyarrow

        number = 0
        read = _parquet_rows if self.file.suffix.lower() == ".parquet" else _arrow_rows
        batches = read(self.file, columns)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise _damaged(self.file, error) from error
            if batch is None:
                return
            for row in batch:
                yield number, row
                number += 1


@dataclass
class _Opened:
    """Collects the rows of all tables of a data set.

    Attributes:
        root: the folder of the set.
        metadata: whether the tables list all sound files of the folder.
        audio, label: the columns.
        place: where sounds held inside the tables are written.
        missing: files that are named and not there.
        count: how many rows each part has so far.
        seen: where each file is named.
    """

    root: Path
    metadata: bool
    audio: str
    label: str
    place: Path
    rows: list[_Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    multi_label: bool = False
    missing: list[str] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.homes = _homes(self.root)

    def add(self, table: _Table) -> None:
        """Takes in the rows of a table; the sounds in it are written out."""
        audio = _audio_column(table, self.audio)
        names = table.names.get(self.label)
        extra = {
            "fold": next((c for c in table.columns if c == "fold"), None),
            "split": next((c for c in table.columns if c == "split"), None),
            "group": next((c for c in GROUP_COLUMNS if c in table.columns), None),
        }
        extra = {key: c for key, c in extra.items() if c not in (audio, self.label)}
        columns = dict.fromkeys([audio, self.label, *(c for c in extra.values() if c)])
        for number, row in table.rows(list(columns)):
            index = self.count[table.part]
            self.count[table.part] += 1
            where = f"{show(table.file)}: row {number}"
            cell = row.get(self.label)
            self.multi_label |= isinstance(cell, list)
            labels, why = _read_label(cell, names, f"{where}, column {self.label!r}")
            content, given = _read_sound(row.get(audio), f"{where}, column {audio!r}")
            if not why and content is None and given is None:
                why = "no sound"
            if why:
                self.skipped.append((f"{show(_below(self.root, table.file))}: row {number}", why))
                continue
            cells = {key: _text(row.get(c)) if c else None for key, c in extra.items()}
            split = table.split or SPLITS.get((cells["split"] or "").lower())
            part, name = table.part, given
            if content is not None:
                found, name = str(self._extract(part, index, given, content)), _plain(given)
            else:
                found = self._find(table, str(given), where)
            if self.metadata and found:
                part, name = "", _below(self.root, found)
                split = split or SPLITS.get(name.removeprefix("data/").split("/")[0].lower())
            if found:
                self.rows.append(
                    _Row(
                        part,
                        index,
                        name,
                        found,
                        labels,
                        where,
                        split,
                        cells["fold"],
                        cells["group"],
                    )
                )

    def finish(self) -> None:
        """Lists the sound files that nothing names.

        Raises:
            DataError: files are named that are not there.
        """
        if self.missing:
            raise DataError(
                f"{show(self.root)}: {len(self.missing)} files that are named are missing, first "
                f"{self.missing[0]}; download or unpack the whole set"
            )
        if self.metadata:
            files, skipped = _audio_files(self.root)
            self.skipped += [(i, "not named in the metadata") for i in files if i not in self.seen]
            self.skipped += [(i, why) for i, why in skipped if Path(i).name not in METADATA]

    def _extract(self, part: str, index: int, given: str | None, content: bytes) -> Path:
        folder = part or "all"
        if part not in ("", *SPLITS.values()):  # a name from the data
            folder = hashlib.sha256(part.encode()).hexdigest()[:8]
        target = self.place / folder / f"{index:07d}{_suffix(given, content)}"
        try:
            with target.open("rb") as file:
                same = os.fstat(file.fileno()).st_size == len(content) and file.read() == content
        except FileNotFoundError:
            same = False
        except OSError as error:
            raise WriteError(unwritable(target, error)) from error
        if not same:
            write_whole(target, lambda file: file.write(content))
        return target

    def _find(self, table: _Table, given: str, where: str) -> str:
        """Path of a file that a row names, or '' if it is not there."""
        what = _leads_out(given)
        found = ""
        if not what:
            forms = (unicodedata.normalize(form, given) for form in ("NFC", "NFD"))
            names = dict.fromkeys((given, *forms, given.replace("\\", "/")))
            tries = [base / name for base in (table.file.parent, self.root) for name in names]
            found = next((os.path.normpath(t) for t in tries if os.path.isfile(t)), "")
            if not found:
                self.missing.append(f"{given[:200]!r} ({where})")
                return ""
            what = "" if _is_home(found, self.homes) else "is a link out of the folder"
        if what:
            raise DataError(
                f"{where}: {given[:200]!r} {what}; only files inside the folder are read: put the "
                "sounds there, or into the data"
            )
        first = self.seen.setdefault(_below(self.root, found), where)
        if first != where:
            raise DataError(
                f"{where}: {given[:200]!r} is named before, in {first}; keep one of them"
            )
        return found


def _layout(path: Path, audio: str = "audio") -> Layout | None:
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


def _tables(path: Path, layout: Layout) -> list[_Table]:
    """The files of rows of a data set, in order, with what is known of their columns."""
    if layout == "disk":
        return _saved(path, "", None)
    if layout == "dict":
        said = _read_json(path / "dataset_dict.json").get("splits")
        if not isinstance(said, list) or not all(isinstance(s, str) and _is_name(s) for s in said):
            raise DataError(f"{show(path)}: dataset_dict.json lists no splits; save the set anew")
        tables: list[_Table] = []
        for part in said:
            split = SPLITS.get(part.lower())
            tables += _saved(path / part, split or part, split)
        return tables
    if layout == "metadata":
        tables = [_Table(file, "", _split_folder(path, file)) for file in _metadata_files(path)]
        twice = [f for f, n in Counter(table.file.parent for table in tables).items() if n > 1]
        if twice:
            names = " and ".join(t.file.name for t in tables if t.file.parent == twice[0])
            raise DataError(f"{show(twice[0])}: has {names}; keep one of them")
    elif path.is_file():
        tables = [_shard(path.parent, path)]
    else:
        parts = _shards(path)
        if len(parts) > 1:
            raise DataError(
                f"{show(path)}: holds {len(parts)} configurations: {show(', '.join(parts))}; "
                f"open one of them, such as {show(path / next(iter(parts)))}"
            )
        tables = [_shard(path, file) for file in next(iter(parts.values()))]
    for table in tables:
        _describe(table)
    return tables


def _saved(folder: Path, part: str, split: str | None) -> list[_Table]:
    """The files of one data set written by save_to_disk."""
    state, info = _read_json(folder / "state.json"), _read_json(folder / "dataset_info.json")
    listed = state.get("_data_files")
    said = [f.get("filename") if isinstance(f, dict) else None for f in listed or ()]
    files = [name for name in said if isinstance(name, str) and _is_name(name)]
    if not files or len(files) < len(said):
        raise DataError(f"{show(folder)}: state.json lists no data files; save the set anew")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{show(folder)}: holds an index of rows beside the rows, as old versions of datasets "
            "wrote it; load it there, call flatten_indices() and save it anew"
        )
    tables = [_Table(folder / name, part, split) for name in files]
    for table in tables:
        _describe(table)
        _take_features(table, info.get("features"))
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
    table = _Table(file, "", None)
    try:
        _describe(table)
    except (DataError, UsageError):
        return True
    return audio in table.columns or bool(table.sounds)


def _shard(root: Path, file: Path) -> _Table:
    match = SHARD.fullmatch(file.stem)
    split = SPLITS.get(match[1].lower()) if match else None
    if split is None and file.parent != root:
        split = SPLITS.get(file.parent.name.lower())
    return _Table(file, split or "", split)


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


def _class_folders(root: Path) -> tuple[list[_Row], list[tuple[str, str]]]:
    files, skipped = _audio_files(root)
    rows: list[_Row] = []
    for id in files:
        split, _, rest = id.partition("/")
        name, inside, _ = rest.partition("/")
        if split.lower() not in SPLITS:
            skipped.append((id, "not in a split folder"))
        elif not inside or name == NOISE_FOLDER:
            skipped.append((id, "background noise" if inside else "not in a class folder"))
        else:
            label = unicodedata.normalize("NFC", name)
            row = _Row("", len(rows), id, str(root / id), [label], id, SPLITS[split.lower()])
            rows.append(row)
    return rows, skipped


def _audio_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of the sound files below the root, and what was skipped.

    In a snapshot of the Hub's cache every file is a link into the folder of blobs beside it.
    """
    listed, left = list_audio(root)
    homes = _homes(root)
    skipped: list[tuple[str, str]] = []
    for path, why in left:
        linked = why == "link out of the folder" and os.path.isfile(path)
        if linked and _is_home(path, homes) and Path(path).suffix.lower() in EXTENSIONS:
            listed.append(Path(path))
        else:
            skipped.append((_below(root, path), why))
    return sorted(_below(root, file) for file in listed), skipped


def _homes(root: Path) -> list[str]:
    """The folders that files may really lie in."""
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    return [os.path.realpath(folder) for folder in (root, *blobs[:1])]


def _is_home(path: str, homes: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([home, real]) == home for home in homes)


def _below(root: Path, path: str | Path) -> str:
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _leads_out(given: str) -> str:
    """Why a path is not one inside a folder, or nothing."""
    slashed = given.replace("\\", "/")
    if slashed.startswith("/") or re.match("[A-Za-z]:/", slashed) or "\0" in slashed:
        return "is not a path relative to the folder"
    return "leads out of the folder" if ".." in slashed.split("/") else ""


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{show(file)}: cannot be read: {why}; copy the whole folder") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{show(file)}: not JSON: {error}; save the set anew") from error
    if not isinstance(found, dict):
        raise DataError(f"{show(file)}: not a JSON object; save the set anew")
    return found


def _describe(table: _Table) -> None:
    """Finds out the columns of a table, their class names, and which hold sound."""
    if table.file.suffix in (".csv", ".jsonl"):
        table.text = _text_rows(table.file)
        table.columns = list(dict.fromkeys(key for _, row in table.text for key in row))
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{show(table.file)}: reading it needs pyarrow, which is not installed: "
            "pip install pyarrow"
        ) from error
    try:
        if table.file.suffix.lower() == ".parquet":
            schema = pyarrow.parquet.read_schema(table.file)
        else:
            with pyarrow.memory_map(str(table.file)) as file, pyarrow.ipc.open_stream(file) as s:
                schema = s.schema
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(table.file, error) from error
    table.columns = list(schema.names)
    for column in schema:
        if pyarrow.types.is_struct(column.type):
            fields = {column.type.field(i).name for i in range(column.type.num_fields)}
            if {"bytes", "path"} <= fields:
                table.sounds.append(column.name)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        _take_features(table, json.loads(text).get("info", {}).get("features"))


def _take_features(table: _Table, features: Any) -> None:
    for column, feature in features.items() if isinstance(features, dict) else ():
        if column not in table.columns:
            continue
        if isinstance(feature, dict) and feature.get("_type") == "Audio":
            table.sounds = list(dict.fromkeys([*table.sounds, column]))
        while True:  # a list of labels holds its feature inside
            if isinstance(feature, list) and len(feature) == 1:
                feature = feature[0]
            elif isinstance(feature, dict) and "feature" in feature:
                feature = feature["feature"]
            else:
                break
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list) and names and all(isinstance(n, str) for n in names):
                table.names[column] = [unicodedata.normalize("NFC", name) for name in names]


def _text_rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    problems: Problems = []
    rows = read_rows(file, None, problems)
    if problems:
        number, why = problems[0]
        raise DataError(f"{show(file)}: row {number}: {why}")
    if file.suffix == ".csv":  # -1 is a number where the other cells of its column are
        for column in {key for _, row in rows for key in row}:
            cells = [row.get(column) or "" for _, row in rows]
            if all(isinstance(c, str) and re.fullmatch(r"\s*(-?[0-9]+)?\s*", c) for c in cells):
                for (_, row), cell in zip(rows, cells, strict=True):
                    row[column] = -1 if cell.strip() == "-1" else cell
    return rows


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
        for batch in opened.iter_batches(BATCH, columns=list(columns), use_threads=False):
            yield batch.to_pylist()


def _arrow_rows(file: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        for batch in stream:
            chosen = batch.select(list(columns))
            chosen.validate(full=True)
            for start in range(0, chosen.num_rows, BATCH):
                yield chosen.slice(start, BATCH).to_pylist()


def _damaged(file: Path, error: Exception) -> DataError:
    why = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    todo = "copy or download it again"
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            why, todo = "it only points to the content, kept by Git LFS", "run: git lfs pull"
    return DataError(f"{show(file)}: cannot be read: {why}; {todo}")


def _label_column(tables: Sequence[_Table], asked: str | None) -> str:
    """The column with the labels, which every table has."""
    first = tables[0]
    only = list(first.names) if len(first.names) == 1 else []
    names = [asked, asked.lower()] if asked is not None else [*LABEL_COLUMNS, *only]
    found = next((name for name in names if name in first.columns), names[0])
    for table in tables:
        if found not in table.columns:
            wanted = " or ".join(repr(name) for name in ([asked] if asked else LABEL_COLUMNS))
            raise DataError(_no_column(table, found, wanted, "label"))
    return found


def _audio_column(table: _Table, asked: str) -> str:
    if asked in table.columns:
        return asked
    if asked == "audio" and len(table.sounds) == 1:
        return table.sounds[0]
    raise DataError(_no_column(table, asked, repr(asked), "audio"))


def _no_column(table: _Table, name: str, wanted: str, option: str) -> str:
    near = difflib.get_close_matches(name, table.columns, 1)
    return (
        f"{show(table.file)}: no column {wanted}; the columns are {show(', '.join(table.columns))}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f"; say which one with {option}="
    )


def _read_label(cell: Any, names: Sequence[str] | None, where: str) -> tuple[list[str], str]:
    """The label names in a cell, and why the row is to be left out, if it is."""
    found: list[str] = []
    for item in cell if isinstance(cell, list) else [cell]:
        if isinstance(item, float) and (math.isnan(item) or item.is_integer()):
            item = None if math.isnan(item) else int(item)
        if isinstance(item, str):
            item = unicodedata.normalize("NFC", item).strip()
        if item is None or item == "":
            return [], "no label"
        if isinstance(item, bool | str):
            found.append(str(item))
        elif not isinstance(item, int):
            raise DataError(
                f"{where}: {str(item)[:80]!r} is no label; a label is a whole number, a name, or a "
                "list of these"
            )
        elif item == -1:
            return [], "label -1: kept secret"
        elif item < 0 or (names is not None and item >= len(names)):
            classes = f"among the {len(names)} classes" if names is not None else "a class number"
            raise DataError(f"{where}: label {item} is not {classes}; mend or remove the row")
        else:
            found.append(names[item] if names is not None else str(item))
    return found, ""


def _read_sound(cell: Any, where: str) -> tuple[bytes | None, str | None]:
    """The bytes of a sound, and its path as it is written there."""
    content, given = (cell, None) if isinstance(cell, bytes) else (None, cell)
    if isinstance(cell, dict):
        if not {"bytes", "path"} & cell.keys():
            fields = show(", ".join(map(str, cell)))
            raise DataError(
                f"{where}: has the fields {fields}, but neither bytes nor path; save the set with "
                "the column cast to Audio()"
            )
        content, given = cell.get("bytes"), cell.get("path")
    if not isinstance(content, bytes | None) or not isinstance(given, str | None):
        kind = type(cell).__name__
        raise DataError(f"{where}: holds a {kind}, not sound; say which column does with audio=")
    return content or None, given or None


def _text(cell: Any) -> str | None:
    if cell is None or isinstance(cell, list | dict | bytes):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return unicodedata.normalize("NFC", str(cell)).strip() or None


def _plain(given: str | None) -> str | None:
    """A path kept beside the bytes of a sound, as a name: without folders of another machine."""
    name = (given or "").replace("\\", "/")
    if _leads_out(name):
        name = name.rpartition("/")[2]
    return name if name.isprintable() and name not in ("", "..") else None


def _suffix(given: str | None, content: bytes) -> str:
    """The extension that the kept path has, if it is one of sound, or that the first bytes mean."""
    kept = os.path.splitext(given or "")[1].lower()
    if kept in EXTENSIONS:
        return kept
    starts = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff", b".snd": ".au"}
    starts |= {b"caff": ".caf", b"RF64": ".wav", b"\x1aE\xdf\xa3": ".webm"}
    if content[4:8] == b"ftyp":
        return ".m4a"
    if content[:3] == b"ID3" or (content[0] == 0xFF and content[1:2] >= b"\xe0"):
        return ".mp3"
    return starts.get(content[:4], "")


def _place(root: Path, tables: Sequence[_Table], audio: str, extract_to: str | Path | None) -> Path:
    """The folder for the sounds of this data set."""
    if extract_to is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        extract_to = Path(cache) / "aatjax" / "huggingface"
    files = [(_below(root, table.file), os.stat(table.file)) for table in tables]
    about = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    text = json.dumps([os.path.realpath(root), audio, about])
    folder = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(extract_to).expanduser().absolute() / folder


def _classes(rows: Sequence[_Row], kept: Sequence[list[str] | None]) -> tuple[str, ...]:
    """Class names kept with the data, in their order, or those that occur."""
    known = tuple(dict.fromkeys(name for names in kept for name in names or ()))
    if not known:
        return order_names({name for row in rows for name in row.labels})
    for row in rows:
        for name in row.labels:
            if name not in known:
                raise DataError(
                    f"{row.where}: label {name!r} is not one of the {len(known)} classes of the "
                    "other files; all files of a set need the same classes"
                )
    return known


def _ids(rows: Sequence[_Row]) -> list[str]:
    """An id for each row: its name where no other row has it, else its number."""
    before = [f"{row.part}/" if row.part else "" for row in rows]
    named = [start + (row.name or "") for start, row in zip(before, rows, strict=True)]
    count = Counter(named)
    return [
        id
        if row.name and count[id] == 1 and not re.fullmatch(r"(.*/)?row-\d+", id)
        else f"{start}row-{row.number}"
        for id, start, row in zip(named, before, rows, strict=True)
    ]
