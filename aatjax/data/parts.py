"""Sets whose official division is in several files or folders: train, valid and test."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from aatjax.data.class_folders import UNLABELLED, check_spellings, name_part
from aatjax.data.folders import NOISE_FOLDER
from aatjax.data.source import Reader, Source
from aatjax.data.splits import SPLITS, order_names
from aatjax.errors import DataError, UsageError

Part = Literal["train", "valid", "test"]
"""Parts of an official division."""


def join_parts(parts: Mapping[Part, Source], name: str) -> Source:
    """Return one set of several, each of which is a part of its official division.

    Args:
        parts: the sets, by `train`, `valid` and `test`.
        name: name of the whole.

    Raises:
        DataError: a file is in two parts, a clip has another part already, or two names of classes
            differ only in their spelling.
        UsageError: a part is not made of files.
    """
    classes = order_names({c for source in parts.values() for c in source.classes})
    check_spellings(f"{name}: the classes", classes)
    place = {name: number for number, name in enumerate(classes)}
    clips = []
    first: dict[str, str] = {}
    for part, source in parts.items():
        if type(source.reader) is not Reader:
            raise UsageError(f"--data.path {part}=...: {source.name} is no folder or list of files")
        for clip in source.clips:
            if clip.split not in (None, part):
                raise DataError(f"{source.name}: {clip.id!r} is of part {clip.split}, not {part}")
            other = first.setdefault(os.path.realpath(str(clip.path)), part)
            if other != part:
                raise DataError(f"{name}: {clip.id!r} is in {other} and {part}: remove it from one")
            label = tuple(sorted(place[source.classes[c]] for c in clip.label))
            id = f"{part}/{clip.id}"
            clips.append(dataclasses.replace(clip, id=id, label=label, split=part))
    return Source(
        clips,
        classes,
        name=name,
        multi_label=any(source.multi_label for source in parts.values()),
        skipped=[
            (f"{p}: {what}", why) for p, source in parts.items() for what, why in source.skipped
        ],
        notes=[(f"{p}/{id}", note) for p, source in parts.items() for id, note in source.notes],
    )


def find_parts(root: Path) -> dict[Part, str]:
    """Return the parts of a set in a folder: CSV files or folders of class folders by these names.

    Other folders may hold sounds without labels; `train` must be among the parts. The empty
    dictionary stands for another layout.
    """
    return _find_tables(root) or _find_folders(root)


def _find_tables(root: Path) -> dict[Part, str]:
    tables = {e.name: e for e in root.iterdir() if e.suffix.lower() == ".csv" and e.is_file()}
    return _collect({name: path for name, path in tables.items() if path.stem.lower() in SPLITS})


def _find_folders(root: Path) -> dict[Part, str]:
    names = {e.name: e for e in root.iterdir() if e.is_dir() and not e.name.startswith(".")}
    kept = {n: path for n, path in names.items() if n.casefold() not in (*UNLABELLED, NOISE_FOLDER)}
    if not all(name_part(name) and _has_folders(path) for name, path in kept.items()):
        return {}
    return _collect(kept)


def _collect(found: Mapping[str, Path]) -> dict[Part, str]:
    named = ((name_part(Path(n).stem), str(path)) for n, path in sorted(found.items()))
    parts: dict[Part, str] = {cast(Part, part): path for part, path in named}
    if "train" not in parts or len(parts) < len(found) or len(parts) < 2:
        return {}
    return parts


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())
