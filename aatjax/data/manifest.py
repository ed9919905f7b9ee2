"""`Manifest`: clips listed in a CSV or JSON-lines file."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from aatjax.data.class_folders import fold_spelling
from aatjax.data.groups import parse_speaker
from aatjax.data.source import Clip, Progress, Source
from aatjax.data.splits import SPLITS, order_names
from aatjax.data.tables import Problems, is_number, pick_column, read_rows
from aatjax.errors import DataError, UsageError

Column = Literal["path", "label", "labels", "fold", "split", "group"]
"""What a column holds: the file, its label or several labels, its fold, split and group."""
COLUMNS: dict[Column, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "wav"),
    "label": ("label", "labels", "class", "category"),
    "fold": ("fold",),
    "split": ("split",),
    "group": ("group", "speaker", "source"),
}
"""Usual names of the columns, in lower case; the first that is there is taken."""
MOST_SHOWN = 10
REPORT_EVERY = 1000  # rows
ONCE = "; remove it (to draw rare classes more often: --training.balance sampler)"


class Manifest(Source):
    """Clips listed in a CSV file (comma, semicolon or tab) or a JSON-lines file.

    Columns, in any case: the file (`path`, `file`, `filename` or `wav`); `label`, `class` or
    `category`, a class name or number, or `labels`, several of them separated by '|' or ';' (a
    list in JSON lines); and optionally `fold`, `split` (train, valid or test, or their usual
    names), and `group`, `speaker` or `source`. Without a column of groups, the group is the
    speaker that the file name begins with (see `aatjax.data.groups`). Rows are numbered as in a
    spreadsheet: the header is row 1.

    In a multi-label file a cell that holds only '|', or an empty list, means a clip of no class.

    Args:
        path: the CSV or JSON-lines file, UTF-8.
        root: folder that file names are relative to; by default the folder of the manifest.
        columns: columns of other names, by what they hold: {"path": "clip", "label": "bird"};
            `labels` in place of `label` for several labels in a cell.
        sep: separator of a CSV file; detected from the header by default.
        classes: the classes in order; a label is then one of them or its number. By default the
            labels that occur: sorted, by value if all are numbers.
        multi_label: whether a clip may have any number of classes; by default only if the column
            holds `labels` or lists.
        strict: refuse the file if any row is wrong; otherwise skip such rows and list them in
            `skipped`.
        progress: called with the stage `list` and the rows read.

    Raises:
        DataError: the file cannot be read or rows are wrong; the message gives row numbers.
        UsageError: a separator that is not one character, or a column of another kind.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        root: str | Path | None = None,
        columns: Mapping[Column, str] | None = None,
        sep: str | None = None,
        classes: Sequence[str] | None = None,
        multi_label: bool | None = None,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> None:
        path = Path(path).expanduser().absolute()
        folder = path.parent if root is None else Path(root).expanduser().absolute()
        problems: Problems = []
        rows = read_rows(path, sep, problems)
        keys = _pick_columns(
            path, list(dict.fromkeys(key for _, row in rows for key in row)), columns
        )
        file_key, label_key = str(keys["path"]), str(keys["label"])
        sure = multi_label is not None or classes is not None
        cells = [row.get(label_key) for _, row in rows]
        if multi_label is None:
            several = label_key == "labels" or "labels" in (columns or {})
            multi_label = several or any(isinstance(cell, list) for cell in cells)
        bars = any("|" in c and "|" in c.strip().strip("|") for c in cells if isinstance(c, str))

        good: list[_Row] = []
        first_at: dict[str, int] = {}
        for (number, row), cell in zip(rows, cells, strict=True):
            if progress is not None and number % REPORT_EVERY == 0:
                progress("list", number, len(rows))
            labels = _parse_labels(cell, multi_label, "|" if bars else ";")
            name, found, wrong = _find_file(folder, row.get(file_key))
            wrong = wrong or _check_labels(labels, multi_label, sure)
            if not wrong and found in first_at:
                wrong = f"{name!r} is listed before, in row {first_at[found]}"
                wrong += "; put all its labels in one row" if multi_label else ONCE
            (fold, split, group), odd = _read_parts(row, keys)
            if wrong or odd:
                problems.append((number, wrong or odd))
                continue
            if keys["group"] is None:
                group = parse_speaker(name)
            first_at[found] = number
            good.append(_Row(number, name, found, labels or [], (fold, split, group)))
        empty = not rows
        del rows, cells, first_at  # as large as what is made of them

        order, labelled = _index_labels(good, classes, problems)
        problems.sort()
        if problems and (strict or not labelled):
            lost = all(reason.startswith("no such file") for _, reason in problems)
            hint = "; names relative to another folder need --data.root FOLDER" if lost else ""
            raise DataError(f"{path}: {_report(problems)}{hint if not labelled else ''}")
        if empty:
            raise DataError(f"{path}: no rows; list one clip per row")
        super().__init__(
            (
                Clip(row.name, labelled[row.number], row.path, *row.parts)
                for row in good
                if row.number in labelled
            ),
            order,
            name=path.stem,
            multi_label=multi_label,
            skipped=[(f"row {number}", reason) for number, reason in problems],
        )


class _Row(NamedTuple):
    number: int
    name: str
    path: str
    labels: list[str]
    parts: tuple[str | None, str | None, str | None]  # fold, split, group


def _pick_columns(
    path: Path, columns: Sequence[str], given: Mapping[Column, str] | None
) -> dict[Column, str | None]:
    """The column of each kind: the one given, or the first of a usual name; None without it."""
    given = dict(given or {})
    for kind in given:
        if kind not in get_args(Column):
            raise UsageError(f"columns: {kind!r} is not one of {', '.join(get_args(Column))}")
    if "labels" in given:
        if "label" in given:
            raise UsageError("columns: name either label or labels, not both")
        given["label"] = given.pop("labels")
    keys: dict[Column, str | None] = {}
    for kind, usual in COLUMNS.items():
        if kind in given:
            keys[kind] = pick_column(path, columns, (given[kind],), True)
        elif kind in ("path", "label"):
            keys[kind] = pick_column(path, columns, usual, False)
        else:
            keys[kind] = next((name for name in usual if name in columns), None)
    return keys


def _find_file(folder: Path, cell: Any) -> tuple[str, str, str]:
    """Name and absolute path of the file a cell names, and what is wrong with it, if anything."""
    if not isinstance(cell, str) or not cell.strip():
        return "", "", "no file name"
    found = os.path.normpath(os.path.join(folder, cell))
    if os.path.isfile(found):
        return cell, found, ""
    slashed = cell.replace("\\", "/")
    for name in dict.fromkeys(
        unicodedata.normalize(form, text) if form else text
        for text in (cell, cell.strip(), slashed.strip())
        for form in ("", "NFC", "NFD")
    ):
        found = os.path.normpath(folder / name)
        if os.path.isfile(found):
            return name, found, ""
    there = os.path.exists(os.path.normpath(folder / cell))
    return cell, "", f"{'is not a file' if there else 'no such file'}: {cell!r} in {folder}"


def _read_parts(
    row: dict[str, Any], keys: Mapping[Column, str | None]
) -> tuple[tuple[str | None, str | None, str | None], str]:
    """Fold, split and group of a row, and what is wrong with them, if anything."""
    kinds: tuple[Column, ...] = ("fold", "split", "group")
    fold, given, group = (_format(row.get(k)) if (k := keys[kind]) else None for kind in kinds)
    split = None if given is None else SPLITS.get(given.lower())
    wrong = ""
    needed: dict[Column, str | None] = {"fold": fold, "split": given}
    for kind, part in needed.items():
        if not wrong and keys[kind] and part is None:
            wrong = f"no {kind}; give every row one, or remove the column"
    if not wrong and given is not None and split is None:
        wrong = f"unknown split {given!r}; write train, valid or test"
    return (fold, split, group), wrong


def _format(cell: Any) -> str | None:
    if cell is None or isinstance(cell, list | dict):
        return None
    return unicodedata.normalize("NFC", str(cell)).strip() or None


def _parse_labels(cell: Any, multi_label: bool, separator: str) -> list[str] | None:
    """Label names in a cell, or None for a cell without any."""
    if isinstance(cell, list):
        named = [_format(item) for item in cell]
        return [name for name in dict.fromkeys(named) if name] if all(named) else None
    text = _format(cell)
    if text is None or not multi_label:
        return None if text is None else [text]
    if not text.strip("|; "):
        return []
    return [part for part in dict.fromkeys(p.strip() for p in text.split(separator)) if part]


def _check_labels(labels: list[str] | None, multi_label: bool, sure: bool) -> str:
    """Why labels cannot be those of one clip, or ''."""
    if labels is None or not (labels or multi_label):
        return "empty label"
    if multi_label or (len(labels) == 1 and (sure or "|" not in labels[0])):
        return ""
    text = f"several labels ({'|'.join(labels)}) in a single-label file"
    return f"{text}; call the column 'labels', or name it by --data.columns labels=COLUMN"


def _index_labels(
    rows: Sequence[_Row], classes: Sequence[str] | None, problems: Problems
) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """The classes, and the class indices of every row whose labels are right."""
    known = [unicodedata.normalize("NFC", name) for name in classes or ()]
    names = list(dict.fromkeys(name for row in rows for name in row.labels))
    numeric = set() if any(map(is_number, known)) else {n for n in names if is_number(n)}
    wrong: dict[str, str] = {}  # label: what is wrong with it
    if numeric and len(numeric) < len(names):
        few = 2 * sum(bool(numeric.intersection(row.labels)) for row in rows) <= len(rows)
        kind, usual = ("number", "name") if few else ("name", "number")
        text = f"is a class {kind} where other rows have a class {usual}"
        wrong = {n: f"label {n!r} {text}" for n in names if (n in numeric) is few}
    lower: dict[str, str] = {}
    for name in names if not known else ():
        usual = lower.setdefault(fold_spelling(name), name)
        if name != usual and name not in wrong:
            text = f"label {name!r} differs from {usual!r} only in case, spaces or Unicode form"
            wrong[name] = f"{text}; fix it, or give the list of classes"
    order = tuple(known) or order_names(set(names).difference(wrong))
    position = {name: i for i, name in enumerate(order)}
    if known:
        position.update({n: int(n) for n in numeric.difference(wrong) if int(n) < len(order)})
    labelled: dict[int, tuple[int, ...]] = {}
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # a set has many clips, few labels
    for row in rows:
        faults = [wrong[name] for name in row.labels if name in wrong]
        faults += [
            _describe_unknown(n, order, n in numeric)
            for n in row.labels
            if not faults and n not in position
        ]
        if faults:
            problems.append((row.number, faults[0]))
        else:
            found = tuple(sorted({position[name] for name in row.labels}))
            labelled[row.number] = shared.setdefault(found, found)
    return order, labelled


def _describe_unknown(name: str, order: tuple[str, ...], number: bool) -> str:
    if number:
        return f"class number {name} is not among the {len(order)} classes 0 to {len(order) - 1}"
    lower = {known.casefold(): known for known in order}
    near = difflib.get_close_matches(name.casefold(), lower, 1)
    return f"unknown class {name!r}" + (f"; did you mean {lower[near[0]]!r}?" if near else "")


def _report(problems: Problems) -> str:
    shown = "; ".join(f"row {number}: {reason}" for number, reason in problems[:MOST_SHOWN])
    more = len(problems) - MOST_SHOWN
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}: "
    return count + shown + (f"; and {more} more" if more > 0 else "")
