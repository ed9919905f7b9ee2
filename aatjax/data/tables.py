"""Rows of CSV and JSON-lines files, numbered as in a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aatjax.errors import DataError, UsageError, suggest
from aatjax.io.json_fields import shorten
from aatjax.io.json_file import parse_json

Row = tuple[int, dict[str, Any]]
Problems = list[tuple[int, str]]
MOST_DIGITS = 18


def read_rows(path: Path, sep: str | None, problems: Problems) -> list[Row]:
    """Return the numbered rows of a CSV or JSON-lines file, keys in lower case.

    Args:
        path: the file; JSON lines if its suffix says so or its first character is '{'.
        sep: separator of a CSV file; detected from the header by default.
        problems: receives (row, what is wrong) for lines that are no rows.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or has no usable header.
        UsageError: a separator that is not one character.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8; save it as UTF-8 (in a spreadsheet: 'CSV UTF-8')"
        ) from None
    if path.suffix.lower() in (".jsonl", ".ndjson") or text.lstrip()[:1] == "{":
        return list(_read_json(text, problems))
    if sep is not None and len(sep) != 1:
        raise UsageError(f"sep is {sep!r}; it must be one character")
    return _read_csv(path, text, sep, problems)


def _read_json(text: str, problems: Problems) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            problems.append((number, f"not JSON: {error}"))
            continue
        if not isinstance(row, dict):
            problems.append((number, 'not a JSON object such as {"path": ..., "label": ...}'))
            continue
        found = {key.strip().lower(): value for key, value in row.items()}
        odd = [k for k, v in found.items() if isinstance(v, float) and not math.isfinite(v)]
        if len(found) < len(row):
            problems.append((number, "two names differ only in capitals or spaces"))
        elif odd:
            problems.append((number, f"{odd[0]!r} is not a finite number"))
        else:
            yield number, found


def _read_csv(path: Path, text: str, sep: str | None, problems: Problems) -> list[Row]:
    head, _, rest = text.partition("\n")
    if head.strip().lower().startswith("sep=") and len(head.strip()) <= 5:  # written by Excel
        sep, text = sep or head.strip("\r")[4:] or None, rest
    head = text.lstrip("\r\n").partition("\n")[0]
    sep = sep or max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True)
    keys: list[str] = []
    rows: list[Row] = []
    number = 0
    try:
        for number, cells in enumerate(reader, 1):
            if not any(map(str.strip, cells)):
                continue
            if not keys:
                keys = [cell.strip().lower() for cell in cells]
                twice = [key for key, count in Counter(keys).items() if key and count > 1]
                if twice:
                    raise DataError(f"{path}: column {min(twice)!r} occurs twice in the header")
            elif len(cells) > len(keys) and any(cell.strip() for cell in cells[len(keys) :]):
                text = f"{len(cells)} cells under {len(keys)} columns; quote cells with {sep!r}"
                problems.append((number, text))
            else:
                rows.append((number, dict(zip(keys, cells, strict=False))))
    except csv.Error as error:
        raise DataError(
            f"{path}: row {number + 1}: not CSV: {error}; a cell with quotes, separators or line "
            "breaks must be quoted, and quotes in it doubled"
        ) from None
    if not keys:
        raise DataError(f"{path}: the file is empty; a header with path and label is expected")
    if not rows and not problems:
        raise DataError(f"{path}: no rows below the header")
    return rows


def pick_column(path: Path, columns: Sequence[str], names: Sequence[str], asked: bool) -> str:
    """Return the first of the names that is a column; `asked` if the user gave them.

    Raises:
        DataError: none of them is a column.
    """
    wanted = [name.strip().lower() for name in names]
    found = next((name for name in wanted if name in columns), None)
    if found is not None or not columns:
        return found or wanted[0]
    more = "" if asked else f" (name yours by --data.columns {wanted[0]}=COLUMN)"
    raise DataError(
        f"{path}: no column {' or '.join(dict.fromkeys(wanted))}{suggest(wanted[0], columns)}; "
        f"the columns are {', '.join(columns)}{more}"
    )


def is_number(text: str) -> bool:
    """Whether text is a whole number in plain digits, not longer than any number of classes."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


class TableRow(dict[str, str]):
    """Stripped cells of one row of an official table, by column."""

    def __init__(self, cells: Mapping[str, str], where: str) -> None:
        super().__init__(cells)
        self.where = where

    def error(self, problem: str) -> DataError:
        """Return an error that names the file and the row."""
        return DataError(f"{self.where}: {problem}")

    def read_class(self, number: str, name: str, classes: Sequence[str], title: str) -> int:
        """Return the class index in column `number`, checked against the name in column `name`.

        Raises:
            DataError: no class of this number, or one of another name.
        """
        cell = self[number]
        if not is_number(cell) or int(cell) >= len(classes):
            raise self.error(f"{number} {shorten(cell)} is not 0 to {len(classes) - 1}")
        if classes[int(cell)] != self[name]:
            wrong = f"{name} {self[name]!r} of {number} {cell}"
            raise self.error(f"{wrong} is {classes[int(cell)]!r} in {title}")
        return int(cell)


def read_table(path: Path, columns: Sequence[str], *, loose: str = "") -> Iterator[TableRow]:
    """Yield the rows of an official CSV file; rows count from 2.

    Args:
        path: the file, UTF-8, with a header.
        columns: columns that every row needs.
        loose: column whose cells may hold commas that no quotes guard.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row lacks a cell.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}; unpack the archive again") from error
    head = rows[0] if rows else []
    lacking = [name for name in columns if name not in head]
    if lacking:
        raise DataError(
            f"{path}: lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; it has "
            f"{', '.join(head) or 'no rows'}: it is not the official file"
        )
    for number, cells in enumerate((row for row in rows[1:] if row), 2):
        if loose and len(cells) > len(head):
            at, extra = head.index(loose), len(cells) - len(head)
            cells = [*cells[:at], ",".join(cells[at : at + extra + 1]), *cells[at + extra + 1 :]]
        found = dict(zip(head, cells, strict=False))
        row = TableRow({c: found.get(c, "").strip() for c in columns}, f"{path}: row {number}")
        for name in columns:
            if not row[name]:
                raise row.error(f"empty cell in column {name!r}")
        yield row
