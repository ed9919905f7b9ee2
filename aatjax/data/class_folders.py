"""Checks that folders are classes, not folds, parts of a division, or a level too high."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from aatjax.data.splits import SPLITS, order_names
from aatjax.errors import DataError, printable

FOLD = re.compile(r"(fold|cv|split|part|subset|session)[ _.-]*\d+", re.IGNORECASE)
UNLABELLED = ("unlabelled", "unlabeled", "unsupervised", "background_noise", "_background_noise_")
"""Folders that are no class where the others are no classes either."""
LAYERS = {"audio", "audios", "clips", "data", "dataset", "files", "recordings", "samples"}
LAYERS |= {"sound", "sounds", "wav", "wavs"}
"""Names of a folder that holds the class folders."""
SYSTEM = {"__macosx", "$recycle.bin", "system volume information", "@eadir", "lost+found"}
"""Folders of operating systems and file servers, in lower case."""
MOST_SHOWN = 3


def is_system_path(id: str) -> bool:
    """Whether a path below a root leads through a folder of the operating system."""
    return any(part.casefold() in SYSTEM for part in id.split("/")[:-1])


def name_part(folder: str) -> str | None:
    """Return the part of a division that a folder is named after: `Test-clean` is 'test'."""
    words = re.split(r"[ _.-]", folder.casefold())
    return None if {*words} & {*UNLABELLED} else SPLITS.get(words[0])


def check_class_folders(root: Path, labels: Mapping[str, str]) -> None:
    """Refuse folders that are not classes.

    Args:
        root: the folder that was given.
        labels: folder of each file, by the path of the file below the root.

    Raises:
        DataError: the folders are parts of a division, folds, a level above the class folders, or
            two names of one class. The message says what to give instead.
    """
    names = order_names(set(labels.values()))
    parts = {name: part for name in names if (part := name_part(name))}
    if len(set(parts.values())) > 1 or len(parts) == len(names):
        order = ("train", "valid", "test")
        named = sorted(parts.items(), key=lambda pair: order.index(pair[1]))
        flags = " ".join(f"{part}={quote(str(root / name))}" for name, part in named)
        raise DataError(
            f"{root}: the folders {_join(names)} look like parts of a set, not classes; name the "
            f"folder of each part, with class folders inside: --data.path {flags}"
        )
    _check_level(root, labels, names)
    check_spellings(f"{root}: the folders", names)


def check_spellings(where: str, names: Sequence[str]) -> None:
    """Refuse names that differ only in capitals, spaces, or their characters' Unicode form.

    Raises:
        DataError: two names that are read as one.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(fold_spelling(name), name)
        if other != name:
            raise DataError(
                f"{where} {other!r} and {name!r} differ only in capitals, spaces or the form of "
                "their characters: merge them if they are one class, else rename one"
            )


def fold_spelling(name: str) -> str:
    """Return a name without capitals, extra spaces, invisible characters and Unicode variants."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").split())


def _check_level(root: Path, labels: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse one folder above the class folders, and folders that are folds."""
    core = [name for name in names if name.casefold() not in UNLABELLED]
    single = len(core) == 1 and (len(names) == 1 or core[0].casefold() in LAYERS)
    folders = {id.rpartition("/")[0] for id, name in labels.items() if name in core}
    top = os.path.commonpath(folders) if single else ""
    inside = {folder.removeprefix(top).strip("/") for folder in folders}
    below = order_names({folder.partition("/")[0] for folder in inside})
    if len(below) > 1 and all(FOLD.fullmatch(name) for name in below):
        nested = not inside & {*below}
        raise DataError(
            f"{root}: the folders {_join(below)} look like folds, not classes; "
            f"{_suggest_folds(root / top, below[0], nested)}"
        )
    if top and "" not in below and len(below) > 1:
        raise DataError(
            f"{root}: the class folders are a level deeper: {top!r} holds {_join(below)}; give "
            f"{root / top}{_suggest_tables(root)}"
        )


def _suggest_folds(folder: Path, fold: str, nested: bool) -> str:
    if nested:
        word = re.split(r"\d", fold)[0]
        pattern = rf"{word}(?P<fold>\d+)/(?P<label>[^/]+)/.*"
        return f"for the class folders in them give {folder} with --data.pattern '{pattern}'"
    return (
        "list the files in a CSV with the columns path, label and fold, or read the labels from "
        r"file names, as --data.pattern 'fold(?P<fold>\d+)/(?P<label>[^_]+)_.*' does; for a "
        "benchmark give the whole folder of its archive"
    )


def _suggest_tables(root: Path) -> str:
    tables = sorted(p.name for p in root.iterdir() if p.suffix.lower() in (".csv", ".tsv"))
    return f", or a table of the files by --data.path {root / tables[0]}" if tables else ""


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MOST_SHOWN])
    return f"{shown}, ..." if len(names) > MOST_SHOWN else shown
