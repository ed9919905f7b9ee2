"""`HuggingFace`: data sets as the `datasets` library and the Hub write them, read without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aatjax.data.class_folders import check_spellings
from aatjax.data.folders import make_relative
from aatjax.data.huggingface.layout import (
    METADATA,
    detect_layout,
    is_inside,
    list_audio_files,
    list_class_folders,
    list_homes,
    open_tables,
)
from aatjax.data.huggingface.tables import (
    HubRow,
    HubTable,
    find_audio_column,
    find_escape,
    find_label_column,
    format_cell,
    guess_suffix,
    read_label,
    read_sound,
    strip_folders,
)
from aatjax.data.source import Clip, Source
from aatjax.data.splits import SPLITS, order_names
from aatjax.errors import DataError, printable
from aatjax.io.atomic import report_write_errors, write_bytes
from aatjax.io.digest import hash_bytes
from aatjax.io.host import find_user_cache

GROUP_COLUMNS = ("group", "speaker", "speaker_id", "source")
EXPECTED = (
    "expected .parquet files, a folder written by save_to_disk, metadata.csv (or .jsonl, .parquet) "
    "with a column file_name, or train/<class>/<file>"
)


class HuggingFace(Source):
    """A local data set in one of the layouts of Hugging Face's `datasets` library and Hub.

    - Parquet: one file, or a folder with files in it, in its `data`, or in the folder of its one
      configuration. File names such as `train-00000-of-00003.parquet` give the split.
    - Folders written by `save_to_disk`, of a data set or of several splits.
    - Sound files with `metadata.csv`, `.jsonl` or `.parquet` (column `file_name`) at the root or
      in each split folder; or in `train/<class>/<file>`, `test/<class>/<file>`.

    Class names stored with the data (a ClassLabel) keep their order and are all kept; otherwise the
    classes are the labels that occur, sorted. A column of lists makes a multi-label set. Rows
    without sound or label, and rows whose label is -1 (kept secret), are in `skipped`; rows count
    from 0 in Parquet and Arrow files and as in a spreadsheet in CSV. A column `fold` is the fold,
    `group`, `speaker`, `speaker_id` or `source` the group.

    Sounds inside the data are extracted to files, in a folder named after the data set's path,
    files, sizes and dates; files that are there already stay unchanged.

    Args:
        path: the folder, or one .parquet file.
        audio: name of the column with the sound: its bytes, or a path inside the folder.
        label: name of the column with the label; by default `label`, `labels`, or the only
            ClassLabel.
        extract_to: folder for extracted sounds; the user's cache by default.

    Raises:
        DataError: no such layout, a damaged file, a column that is missing, a label out of range,
            or a path that leads out of the folder or to no file.
        UnavailableError: pyarrow, which reads Parquet and Arrow files, is not installed.
        WriteError: a sound cannot be extracted.
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
            raise DataError(f"{printable(path)}: no such file or folder")
        layout = detect_layout(path, audio)
        if layout is None:
            raise DataError(f"{printable(path)}: not a data set of Hugging Face's; {EXPECTED}")
        root, name = (path, path.name) if path.is_dir() else (path.parent, path.stem)
        kept: list[list[str] | None] = []
        multi_label = False
        if layout == "folders":
            rows, skipped = list_class_folders(root)
            names = sorted({name for row in rows for name in row.labels})
            check_spellings(f"{root}: the class folders", names)
        else:
            tables = open_tables(path, layout)
            if layout == "metadata" and audio == "audio":
                audio = "file_name"
            label = find_label_column(tables, label)
            place = _choose_folder(root, tables, audio, extract_to)
            collector = _Collector(root, layout == "metadata", audio, label, place)
            for table in tables:
                collector.add(table)
                kept.append(table.names.get(label))
            collector.finish()
            rows, skipped, multi_label = collector.rows, collector.skipped, collector.multi_label
        if not rows:
            first = f", such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise DataError(f"{printable(path)}: no clip; rows skipped: {len(skipped)}{first}")
        classes = _collect_classes(rows, kept)
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
                for id, row in zip(_make_ids(rows), rows, strict=True)
            ),
            classes,
            name=name,
            multi_label=multi_label,
            skipped=skipped,
        )


def is_hub_dataset(path: str | Path) -> bool:
    """Whether a path is in one of the layouts of `HuggingFace`; class folders alone are not."""
    return detect_layout(Path(path).expanduser()) is not None


@dataclass
class _Collector:
    """Collects the rows of all tables of a data set.

    Attributes:
        root: the folder of the set.
        metadata: whether the tables list all sound files of the folder.
        audio, label: the columns.
        place: folder for extracted sounds.
        missing: named files that are not there.
        count: rows per part.
        seen: where each file is named.
    """

    root: Path
    metadata: bool
    audio: str
    label: str
    place: Path
    rows: list[HubRow] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    multi_label: bool = False
    missing: list[str] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.homes = list_homes(self.root)

    def add(self, table: HubTable) -> None:
        """Take in the rows of a table and extract its sounds."""
        audio = find_audio_column(table, self.audio)
        names = table.names.get(self.label)
        choices = {"fold": ("fold",), "split": ("split",), "group": GROUP_COLUMNS}
        extra = {
            key: next((c for c in cs if c in table.columns), "") for key, cs in choices.items()
        }
        extra = {key: "" if c in (audio, self.label) else c for key, c in extra.items()}
        columns = dict.fromkeys([audio, self.label, *filter(None, extra.values())])
        for number, row in table.rows(list(columns)):
            index = self.count[table.part]
            self.count[table.part] += 1
            where = f"{printable(table.file)}: row {number}"
            cell = row.get(self.label)
            self.multi_label |= isinstance(cell, list)
            labels, why = read_label(cell, names, f"{where}, column {self.label!r}")
            content, given = read_sound(row.get(audio), f"{where}, column {audio!r}")
            if not why and content is None and given is None:
                why = "no sound"
            if why:
                file = printable(make_relative(self.root, table.file))
                self.skipped.append((f"{file}: row {number}", why))
                continue
            cells = {key: format_cell(row.get(c)) if c else None for key, c in extra.items()}
            split = table.split or SPLITS.get((cells["split"] or "").lower())
            part, name = table.part, given
            if content is not None:
                found = str(self._extract(part, index, given, content))
                name = strip_folders(given)
            else:
                found = self._find(table, str(given), where)
            if self.metadata and found:
                part, name = "", make_relative(self.root, found)
                split = split or SPLITS.get(name.removeprefix("data/").split("/")[0].lower())
            if found:
                rest = (split, cells["fold"], cells["group"])
                self.rows.append(HubRow(part, index, name, found, labels, where, *rest))

    def finish(self) -> None:
        """List the sound files that no table names."""
        if self.missing:
            raise DataError(
                f"{printable(self.root)}: named files are missing ({len(self.missing)}), first "
                f"{self.missing[0]}; download or unpack the whole set"
            )
        if self.metadata:
            files, skipped = list_audio_files(self.root)
            self.skipped += [(i, "not named in the metadata") for i in files if i not in self.seen]
            self.skipped += [(i, why) for i, why in skipped if Path(i).name not in METADATA]

    def _extract(self, part: str, index: int, given: str | None, content: bytes) -> Path:
        folder = part or "all"
        if part not in ("", *SPLITS.values()):  # a name from the data
            folder = hash_bytes(part)[:8]
        target = self.place / folder / f"{index:07d}{guess_suffix(given, content)}"
        same = False
        with report_write_errors(target), contextlib.suppress(FileNotFoundError):
            same = target.stat().st_size == len(content) and target.read_bytes() == content
        if not same:
            write_bytes(target, content, durable=False)  # compared with the table when read again
        return target

    def _find(self, table: HubTable, given: str, where: str) -> str:
        """Path of a file that a row names, or '' if it is not there."""
        what = find_escape(given)
        found = ""
        if not what:
            forms = (unicodedata.normalize(form, given) for form in ("NFC", "NFD"))
            names = dict.fromkeys((given, *forms, given.replace("\\", "/")))
            tries = [base / name for base in (table.file.parent, self.root) for name in names]
            found = next((os.path.normpath(t) for t in tries if os.path.isfile(t)), "")
            if not found:
                self.missing.append(f"{given[:200]!r} ({where})")
                return ""
            what = "" if is_inside(found, self.homes) else "is a link out of the folder"
        if what:
            raise DataError(
                f"{where}: {given[:200]!r} {what}; only files inside the folder are read: put the "
                "sounds there, or into the data"
            )
        first = self.seen.setdefault(make_relative(self.root, found), where)
        if first != where:
            raise DataError(
                f"{where}: {given[:200]!r} is named before, in {first}; keep one of them"
            )
        return found


def _choose_folder(
    root: Path, tables: Sequence[HubTable], audio: str, extract_to: str | Path | None
) -> Path:
    """The folder for the sounds of this version of the data set."""
    if extract_to is None:
        extract_to = find_user_cache() / "huggingface"
    files = [(make_relative(root, table.file), os.stat(table.file)) for table in tables]
    about = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    text = json.dumps([os.path.realpath(root), audio, about])
    return Path(extract_to).expanduser().absolute() / hash_bytes(text)[:16]


def _collect_classes(rows: Sequence[HubRow], kept: Sequence[list[str] | None]) -> tuple[str, ...]:
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


def _make_ids(rows: Sequence[HubRow]) -> list[str]:
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
