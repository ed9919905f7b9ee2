"""Tables of the Hub's data sets: their columns, rows and cells."""

from __future__ import annotations

import contextlib
import difflib
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
from aatjax.errors import DataError, UsageError, printable

LABEL_COLUMNS = ("label", "labels")
BATCH = 16  # rows held at a time: their sounds are in memory


@dataclass
class HubRow:
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
class HubTable:
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


def describe_columns(table: HubTable) -> None:
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
            f"{printable(table.file)}: reading it needs pyarrow, which is not installed: "
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
        take_features(table, json.loads(text).get("info", {}).get("features"))


def take_features(table: HubTable, features: Any) -> None:
    """Takes class names and columns of sound from the features that `datasets` wrote."""
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
        raise DataError(f"{printable(file)}: row {number}: {why}")
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
    return DataError(f"{printable(file)}: cannot be read: {why}; {todo}")


def label_column(tables: Sequence[HubTable], asked: str | None) -> str:
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


def audio_column(table: HubTable, asked: str) -> str:
    """The column of sounds, or of names of their files; a DataError where there is none."""
    if asked in table.columns:
        return asked
    if asked == "audio" and len(table.sounds) == 1:
        return table.sounds[0]
    raise DataError(_no_column(table, asked, repr(asked), "audio"))


def _no_column(table: HubTable, name: str, wanted: str, option: str) -> str:
    near = difflib.get_close_matches(name, table.columns, 1)
    return (
        f"{printable(table.file)}: no column {wanted}; the columns are {printable(', '.join(table.columns))}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f"; say which one with {option}="
    )


def read_label(cell: Any, names: Sequence[str] | None, where: str) -> tuple[list[str], str]:
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


def read_sound(cell: Any, where: str) -> tuple[bytes | None, str | None]:
    """The bytes of a sound, and its path as it is written there."""
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
        raise DataError(f"{where}: holds a {kind}, not sound; say which column does with audio=")
    return content or None, given or None


def cell_text(cell: Any) -> str | None:
    """A cell as text, whole numbers without a point; None where it is no plain value."""
    if cell is None or isinstance(cell, list | dict | bytes):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return unicodedata.normalize("NFC", str(cell)).strip() or None


def plain_name(given: str | None) -> str | None:
    """A path kept beside the bytes of a sound, as a name: without folders of another machine."""
    name = (given or "").replace("\\", "/")
    if leads_out(name):
        name = name.rpartition("/")[2]
    return name if name.isprintable() and name not in ("", "..") else None


def guess_suffix(given: str | None, content: bytes) -> str:
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


def leads_out(given: str) -> str:
    """Why a path is not one inside a folder, or nothing."""
    slashed = given.replace("\\", "/")
    if slashed.startswith("/") or re.match("[A-Za-z]:/", slashed) or "\0" in slashed:
        return "is not a path relative to the folder"
    return "leads out of the folder" if ".." in slashed.split("/") else ""
