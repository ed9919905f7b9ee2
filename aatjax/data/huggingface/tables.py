"""Tables of the Hub's data sets: their columns, rows and cells."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aatjax.audio.listing import EXTENSIONS
from aatjax.data.tables import Problems, read_rows
from aatjax.errors import DataError, printable, suggest
from aatjax.io.foreign import HEAD, describe_foreign
from aatjax.io.optional import need

LABEL_COLUMNS = ("label", "labels")
BATCH = 16  # rows held at a time: their sounds are in memory
MAGIC = {
    **{b"RIFF": ".wav", b"RF64": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff"},
    **{b".snd": ".au", b"caff": ".caf", b"\x1aE\xdf\xa3": ".webm"},
}


@dataclass
class HubRow:
    """One clip in the making.

    Attributes:
        part: prefix of its id.
        number: number of the row in its part.
        name: name of the sound; the id if no other row of the part has it.
        path: the audio file.
        labels: label names.
        where: file and row, for messages.
        split, fold, group: as in `Clip`.
    """

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
class HubTable:
    """A file of rows.

    Attributes:
        file: the file; names of sound files in it are relative to its folder.
        part: prefix of the ids of its clips.
        split: the split of all its rows, where known.
        columns: names of the columns.
        names: class names of the columns that have them.
        sounds: the columns declared to hold sound.
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
        """Yield number and cells of every row, with few rows in memory."""
        if self.text is not None:
            yield from self.text
            return
        read = _read_parquet if self.file.suffix.lower() == ".parquet" else _read_arrow
        with _report_damage(self.file):
            yield from enumerate(row for batch in read(self.file, columns) for row in batch)


def describe_columns(table: HubTable) -> None:
    """Fill in the columns of a table, their class names, and which hold sound."""
    if table.file.suffix in (".csv", ".jsonl"):
        table.text = _read_text(table.file)
        table.columns = list(dict.fromkeys(key for _, row in table.text for key in row))
        return
    need("pyarrow", extra="huggingface")
    import pyarrow
    import pyarrow.parquet

    with _report_damage(table.file):
        if table.file.suffix.lower() == ".parquet":
            schema = pyarrow.parquet.read_schema(table.file)
        else:
            with pyarrow.memory_map(str(table.file)) as file, pyarrow.ipc.open_stream(file) as s:
                schema = s.schema
    table.columns = list(schema.names)
    for column in schema:
        if pyarrow.types.is_struct(column.type):
            fields = {column.type.field(i).name for i in range(column.type.num_fields)}
            if {"bytes", "path"} <= fields:
                table.sounds.append(column.name)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        take_features(table, json.loads(text).get("info", {}).get("features"))


def take_features(table: HubTable, features: Any) -> None:
    """Take class names and sound columns from the features that `datasets` wrote."""
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


def _read_text(file: Path) -> list[tuple[int, dict[str, Any]]]:
    problems: Problems = []
    rows = read_rows(file, None, problems)
    if problems:
        number, why = problems[0]
        raise DataError(f"{printable(file)}: row {number}: {why}")
    if file.suffix == ".csv":  # -1 is a number where the other cells of its column are
        for column in {key for _, row in rows for key in row}:
            cells = [row.get(column) or "" for _, row in rows]
            if all(isinstance(c, str) and re.fullmatch(r"\s*(-?[0-9]+)?\s*", c) for c in cells):
                for (_, row), cell in zip(rows, cells, strict=True):
                    row[column] = -1 if cell.strip() == "-1" else cell
    return rows


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
        for batch in opened.iter_batches(BATCH, columns=list(columns), use_threads=False):
            yield batch.to_pylist()


def _read_arrow(file: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        for batch in stream:
            chosen = batch.select(list(columns))
            chosen.validate(full=True)
            for start in range(0, chosen.num_rows, BATCH):
                yield chosen.slice(start, BATCH).to_pylist()


@contextlib.contextmanager
def _report_damage(file: Path) -> Iterator[None]:
    """Turn an error of pyarrow into a DataError that names the file."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        advice = "copy or download it again"
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if foreign := describe_foreign(opened.read(HEAD), "a table"):
                raise DataError(f"{printable(file)}: {foreign}") from error
        raise DataError(f"{printable(file)}: cannot be read: {why}; {advice}") from error


def find_label_column(tables: Sequence[HubTable], asked: str | None) -> str:
    """Return the column with the labels, which every table has."""
    first = tables[0]
    only = list(first.names) if len(first.names) == 1 else []
    names = [asked, asked.lower()] if asked is not None else [*LABEL_COLUMNS, *only]
    found = next((name for name in names if name in first.columns), names[0])
    for table in tables:
        if found not in table.columns:
            wanted = " or ".join(repr(name) for name in ([asked] if asked else LABEL_COLUMNS))
            raise _report_column(table, found, wanted, "label")
    return found


def find_audio_column(table: HubTable, asked: str) -> str:
    """Return the column of sounds, or of names of their files."""
    if asked in table.columns:
        return asked
    if asked == "audio" and len(table.sounds) == 1:
        return table.sounds[0]
    raise _report_column(table, asked, repr(asked), "audio")


def _report_column(table: HubTable, name: str, wanted: str, option: str) -> DataError:
    hint = suggest(name, table.columns)
    columns = printable(", ".join(table.columns))
    return DataError(
        f"{printable(table.file)}: no column {wanted}{hint}; the columns are {columns}; choose one "
        f"with {option}="
    )


def read_label(cell: Any, names: Sequence[str] | None, where: str) -> tuple[list[str], str]:
    """Return the label names in a cell, and why the row is to be skipped, if it is."""
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
            raise DataError(f"{where}: label {item} is not {classes}; fix or remove the row")
        else:
            found.append(names[item] if names is not None else str(item))
    return found, ""


def read_sound(cell: Any, where: str) -> tuple[bytes | None, str | None]:
    """Return the bytes of a sound, and its path as given there."""
    content, given = (cell, None) if isinstance(cell, bytes) else (None, cell)
    if isinstance(cell, dict):
        if not {"bytes", "path"} & cell.keys():
            fields = printable(", ".join(map(str, cell)))
            raise DataError(
                f"{where}: has the fields {fields}, but neither bytes nor path; save the set with "
                "the column cast to Audio()"
            )
        content, given = cell.get("bytes"), cell.get("path")
    if not isinstance(content, bytes | None) or not isinstance(given, str | None):
        kind = type(cell).__name__
        raise DataError(f"{where}: holds a {kind}, not sound; choose its column with audio=")
    return content or None, given or None


def format_cell(cell: Any) -> str | None:
    """Return a cell as text, whole numbers without a point; None if it is no plain value."""
    if cell is None or isinstance(cell, list | dict | bytes):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return unicodedata.normalize("NFC", str(cell)).strip() or None


def strip_folders(given: str | None) -> str | None:
    """Return the path kept beside the bytes of a sound as a name, without foreign folders."""
    name = (given or "").replace("\\", "/")
    if find_escape(name):
        name = name.rpartition("/")[2]
    return name if name.isprintable() and name not in ("", "..") else None


def guess_suffix(given: str | None, content: bytes) -> str:
    """Return the audio extension of the kept path, or the one of the first bytes."""
    kept = os.path.splitext(given or "")[1].lower()
    if kept in EXTENSIONS:
        return kept
    if content[4:8] == b"ftyp":
        return ".m4a"
    if content[:3] == b"ID3" or (content[0] == 0xFF and content[1:2] >= b"\xe0"):
        return ".mp3"
    return MAGIC.get(content[:4], "")


def find_escape(given: str) -> str:
    """Return why a path does not stay inside a folder; '' if it does."""
    slashed = given.replace("\\", "/")
    if slashed.startswith("/") or re.match("[A-Za-z]:/", slashed) or "\0" in slashed:
        return "is not a path relative to the folder"
    return "leads out of the folder" if ".." in slashed.split("/") else ""
