"""`Manifest`: clips listed in a CSV or JSON-lines file."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aatjax.data.source import Clip, Source
from aatjax.data.splits import SPLITS, order_names
from aatjax.data.tables import Problems, pick_column, read_rows
from aatjax.errors import DataError

AUDIO_COLUMNS = ("path", "file", "filename", "wav")
GROUP_COLUMNS = ("group", "speaker", "source")
MOST_SHOWN = 10


class Manifest(Source):
    """Clips listed in a CSV file (comma, semicolon or tab) or a JSON-lines file.

    Columns, found whatever their case: the file (`path`, `file`, `filename` or `wav`); `label`, a
    class name or number, or `labels`, several of them separated by '|' or ';' (a list in JSON
    lines); and optionally `fold`, `split` (train, valid or test, or what these are usually called),
    and `group`, `speaker` or `source`. Rows are counted as a spreadsheet does: the header is row 1.

    In a multi-label file a cell that holds only '|', or an empty list, means a clip of no class.

    Args:
        path: the CSV or JSON-lines file, UTF-8.
        root: folder that file names are relative to; by default the folder of the manifest.
        audio: name of the column with the file.
        label: name of the column with the label.
        sep: separator of a CSV file; found from the header by default.
        classes: the classes in order; a label is then one of them or its number. By default the
            labels that occur: sorted, by value if all are numbers.
        multi_label: whether a clip may have any number of classes; by default only if the column
            is called `labels` or holds lists.
        strict: refuse the file if any row is wrong; otherwise leave such rows out and list them
            in `skipped`.

    Raises:
        DataError: the file cannot be read or rows are wrong; the message gives row numbers.
        UsageError: a separator that is not one character.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        root: str | Path | None = None,
        audio: str = "path",
        label: str = "label",
        sep: str | None = None,
        classes: Sequence[str] | None = None,
        multi_label: bool | None = None,
        strict: bool = True,
    ) -> None:
        path = Path(path).expanduser().absolute()
        folder = path.parent if root is None else Path(root).expanduser().absolute()
        problems: Problems = []
        rows = read_rows(path, sep, problems)
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        file_key = pick_column(path, columns, (audio, *AUDIO_COLUMNS), audio != "path")
        label_key = pick_column(path, columns, (label, "labels"), label != "label")
        choices = {"fold": ("fold",), "split": ("split",), "group": GROUP_COLUMNS}
        extra = {
            part: next((key for key in columns if key in keys), None)
            for part, keys in choices.items()
        }
        sure = multi_label is not None or classes is not None
        if multi_label is None:
            multi_label = label_key == "labels" or any(
                isinstance(row.get(label_key), list) for _, row in rows
            )

        good: list[tuple[int, str, str, dict[str, str | None]]] = []
        names: list[list[str]] = []
        cells = [row.get(label_key) for _, row in rows]
        several = any("|" in cell.strip().strip("|") for cell in cells if isinstance(cell, str))
        several_at = "|" if several else ";"
        first_at: dict[str, int] = {}
        for (number, row), cell in zip(rows, cells, strict=True):
            parts = {name: _text(row.get(key)) if key else None for name, key in extra.items()}
            labels = _labels(cell, multi_label, several_at)
            name, found, wrong = _find(folder, row.get(file_key))
            if not wrong:
                wrong = _unfit(labels, multi_label, sure)
            if not wrong and found in first_at:
                wrong = f"{name!r} is listed before, in row {first_at[found]}"
                wrong += "; put all its labels in one row" if multi_label else ""
            for part in ("fold", "split"):
                if not wrong and extra[part] and parts[part] is None:
                    wrong = f"no {part}; give every row one, or remove the column"
            split = None if parts["split"] is None else SPLITS.get(parts["split"].lower())
            if not wrong and parts["split"] is not None and split is None:
                wrong = f"unknown split {parts['split']!r}; write train, valid or test"
            if wrong or labels is None:
                problems.append((number, wrong))
                continue
            first_at[found] = number
            good.append((number, name, found, {**parts, "split": split}))
            names.append(labels)

        order, labelled = _index(names, [number for number, *_ in good], classes, problems)
        problems.sort()
        if problems and (strict or not labelled):
            raise DataError(f"{path}: {_report(problems)}")
        if not rows:
            raise DataError(f"{path}: no rows; list one clip a row")
        super().__init__(
            (
                Clip(
                    name,
                    labelled[number],
                    found,
                    fold=parts["fold"],
                    split=parts["split"],
                    group=parts["group"],
                )
                for number, name, found, parts in good
                if number in labelled
            ),
            order,
            name=path.stem,
            multi_label=multi_label,
            skipped=[(f"row {number}", reason) for number, reason in problems],
        )


def _find(folder: Path, cell: Any) -> tuple[str, str, str]:
    """Name and absolute path of the file a cell means, and what is wrong with it, if anything."""
    if not isinstance(cell, str) or not cell.strip():
        return "", "", "no file name"
    slashed = cell.replace("\\", "/")
    for name in dict.fromkeys(
        unicodedata.normalize(form, text) if form else text
        for text in (cell, cell.strip(), slashed.strip())
        for form in ("", "NFC", "NFD")
    ):
        found = os.path.normpath(folder / name)
        if os.path.isfile(found):
            return name, found, ""
    found = os.path.normpath(folder / cell)
    what = "is not a file" if os.path.exists(found) else "no such file"
    return cell, "", f"{what}: {cell!r} in {folder}"


def _text(cell: Any) -> str | None:
    if cell is None or isinstance(cell, list | dict):
        return None
    return unicodedata.normalize("NFC", str(cell)).strip() or None


def _labels(cell: Any, multi_label: bool, separator: str) -> list[str] | None:
    """Label names in a cell, or None for a cell without any."""
    if isinstance(cell, list):
        named = [_text(item) for item in cell]
        return [name for name in dict.fromkeys(named) if name] if all(named) else None
    text = _text(cell)
    if text is None or not multi_label:
        return None if text is None else [text]
    if not text.strip("|; "):
        return []
    return [part for part in dict.fromkeys(p.strip() for p in text.split(separator)) if part]


def _unfit(labels: list[str] | None, multi_label: bool, sure: bool) -> str:
    """Why labels cannot be those of one clip, or nothing."""
    if labels is None or not (labels or multi_label):
        return "empty label"
    if multi_label or (len(labels) == 1 and (sure or "|" not in labels[0])):
        return ""
    return f"several labels ({'|'.join(labels)}) in a single-label file; set multi_label=True"


def _index(
    names: list[list[str]], rows: list[int], classes: Sequence[str] | None, problems: Problems
) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """The classes, and the class indices of every row whose labels are right."""
    known = [unicodedata.normalize("NFC", name) for name in classes] if classes is not None else []
    used = {name for row in names for name in row}
    numeric = set() if any(map(_is_number, known)) else {n for n in used if _is_number(n)}
    named = used - numeric
    if numeric and named:
        count = sum(bool(numeric.intersection(row)) for row in names)
        odd, kind = (numeric, "number") if 2 * count <= len(names) else (named, "name")
        usual = "name" if kind == "number" else "number"
        for number, row in zip(rows, names, strict=True):
            for name in [n for n in row if n in odd][:1]:
                text = f"label {name!r} is a class {kind} where other rows have a class {usual}"
                problems.append((number, text))
        wrong = odd
    else:
        wrong = set[str]()
    order = tuple(known) or order_names(used - wrong)
    position = {name: i for i, name in enumerate(order)}
    if known:
        position.update({n: int(n) for n in numeric - wrong if int(n) < len(order)})
    else:
        lower: dict[str, str] = {}
        for name in (n for row in names for n in row):
            lower.setdefault(name.casefold(), name)
        wrong = wrong | {name for name in used if lower[name.casefold()] != name}
        for number, row in zip(rows, names, strict=True):
            for name in (n for n in row if lower[n.casefold()] != n):
                text = f"label {name!r} differs from {lower[name.casefold()]!r} only in case"
                problems.append((number, f"{text}; mend it, or give the list of classes"))
        order = tuple(name for name in order if name not in wrong)
        position = {name: i for i, name in enumerate(order)}
    labelled = {}
    for number, row in zip(rows, names, strict=True):
        if wrong.intersection(row):
            continue
        unknown = next((name for name in row if name not in position), None)
        if unknown is None:
            labelled[number] = tuple(sorted({position[name] for name in row}))
        else:
            problems.append((number, _unknown(unknown, order, unknown in numeric)))
    return order, labelled


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _unknown(name: str, order: tuple[str, ...], number: bool) -> str:
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
