"""Labelled clips in common layouts: class folders, files named by a pattern, ESC-50."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from aatjax.audio.decode import list_audio
from aatjax.data.class_folders import check_class_folders, is_system_path
from aatjax.data.groups import parse_speaker
from aatjax.data.source import Clip, Progress, Source
from aatjax.data.splits import order_names
from aatjax.data.tables import is_number, read_table
from aatjax.errors import DataError, UsageError, format_count, printable

NOISE_FOLDER = "_background_noise_"
SPLIT_LISTS = {"testing_list.txt": "test", "validation_list.txt": "valid"}
ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")


class AudioFolder(Source):
    """Class folders: `root/<class>/.../<file>`; classes sorted by name, numbers by value.

    Hidden folders, those of operating systems, and `_background_noise_` are omitted. With
    `testing_list.txt` or `validation_list.txt` at the root, as in Speech Commands (Warden, arXiv
    1804.03209), the listed clips have split 'test' and 'valid' and all others 'train'. The group
    of a clip is the speaker that its file name begins with (see `aatjax.data.groups`).

    Args:
        root: the folder that holds the class folders.
        progress: called with the stage `list` and the files found.

    Raises:
        DataError: no such folder, no class folder with audio in it, one that cannot be read,
            folders that are not classes, or lists that do not fit the files.
    """

    def __init__(self, root: str | Path, *, progress: Progress | None = None) -> None:
        root = _check_folder(root, "root/<class>/<file>")
        files, skipped = _scan(root, progress)
        labels: dict[str, str] = {}
        for id in files:
            name, inside, _ = id.partition("/")
            if inside and name != NOISE_FOLDER:
                labels[id] = unicodedata.normalize("NFC", name)
            else:
                skipped.append((id, "background noise" if inside else "not in a class folder"))
        if not labels:
            raise DataError(
                f"{root}: {_describe(files, skipped)}; one folder per class is expected, with its "
                f"audio files inside: root/<class>/<file>{_suggest_parent(root, files)}"
            )
        _check_readable(root, skipped)
        check_class_folders(root, labels)
        classes = order_names(set(labels.values()))
        full = {unicodedata.normalize("NFC", id.partition("/")[0]) for id in files}
        skipped += [
            (entry.name, "no audio in this folder")
            for entry in sorted(root.iterdir())
            if not entry.name.startswith(".")
            and entry.is_dir()
            and unicodedata.normalize("NFC", entry.name) not in full
            and not is_system_path(f"{entry.name}/")
        ]
        splits = _match_split_lists(root, list(labels), skipped)
        label_of = {name: (number,) for number, name in enumerate(classes)}
        super().__init__(
            (
                Clip(
                    id,
                    label_of[name],
                    os.path.join(root, id),
                    split=splits.get(id, "train") if splits is not None else None,
                    group=parse_speaker(id),
                )
                for id, name in labels.items()
            ),
            classes,
            name=root.name,
            skipped=skipped,
        )


class NamePattern(Source):
    r"""Files whose names, or paths below the root, hold their labels.

    `NamePattern("recordings", r"(?P<label>\d)_(?P<group>\w+)_\d+\.wav")` reads the Free Spoken
    Digit Dataset, and `NamePattern("audio", r"fold(?P<fold>\d+)/(?P<group>\d+)-(?P<label>\d)-.*")`
    UrbanSound8K.

    Args:
        root: the folder to search, with all folders in it.
        pattern: regular expression with a group `label`, and optionally `group`, `fold` and
            `split`. It must match the whole file name, or the whole path below the root where the
            pattern holds a slash.
        classes: the classes in order; by default all that occur, sorted.

    Raises:
        UsageError: the pattern is not a regular expression or has no group `label`.
        DataError: no such folder, nothing matches, or a label is not one of the classes.
    """

    def __init__(
        self, root: str | Path, pattern: str, *, classes: Sequence[str] | None = None
    ) -> None:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"pattern {pattern!r} is no regular expression: {error}") from None
        known = {"label", "group", "fold", "split"}
        if "label" not in regex.groupindex or not known.issuperset(regex.groupindex):
            raise UsageError(
                f"pattern {pattern!r} has the groups {sorted(regex.groupindex)}; it needs "
                "(?P<label>...) and may have group, fold and split"
            )
        root = _check_folder(root, "files named by the pattern")
        files, skipped = _scan(root)
        found: list[tuple[str, dict[str, str | None]]] = []
        for id in files:
            match = regex.fullmatch(id if "/" in pattern else id.rpartition("/")[2])
            if match is None or not match["label"]:
                skipped.append((id, "name does not match the pattern"))
            else:
                found.append((id, {key: text or None for key, text in match.groupdict().items()}))
        if not found:
            sample = f", such as {files[0]!r}" if files else ""
            raise DataError(
                f"{root}: {_describe(files, skipped)}{sample}; no name matches the pattern "
                f"{printable(pattern)} as a whole, its ending included"
            )
        labels = [str(parts["label"]) for _, parts in found]
        order = tuple(classes) if classes is not None else order_names(set(labels))
        unknown = set(labels).difference(order)
        if unknown:
            raise DataError(
                f"{root}: label {min(unknown)!r} is not one of the classes {', '.join(order)}"
            )
        label_of = {name: (number,) for number, name in enumerate(order)}
        clips = (
            Clip(
                id,
                label_of[label],
                os.path.join(root, id),
                fold=parts.get("fold"),
                split=parts.get("split"),
                group=parts.get("group"),
            )
            for label, (id, parts) in zip(labels, found, strict=True)
        )
        super().__init__(clips, order, name=root.name, skipped=skipped)


class ESC(Source):
    """ESC-50 and ESC-10 (Piczak, ACM MM 2015): `audio/` and `meta/esc50.csv`.

    Classes are the categories present, in the order of their target number; the group of a clip is
    the recording it was cut from (`src_file`). File names, with any extension, are those in the
    table.

    Args:
        root: the folder that holds `audio` and `meta`, or the one above it.
        esc10: True for the clips of ESC-10 alone, False for all others, None for every clip.

    Raises:
        DataError: the table or a file it names is missing, or the table cannot be used.
    """

    def __init__(self, root: str | Path, *, esc10: bool | None = None) -> None:
        root = _check_folder(root, "audio/ and meta/esc50.csv")
        if not (root / "meta/esc50.csv").is_file() and (root / "ESC-50-master").is_dir():
            root = root / "ESC-50-master"
        table, audio = root / "meta/esc50.csv", root / "audio"
        rows = list(read_table(table, ESC_COLUMNS))
        for row in rows:
            if not is_number(row["target"]):
                raise row.error(f"non-numeric target {row['target']!r}")
        if esc10 is not None:
            rows = [row for row in rows if (row["esc10"].lower() == "true") is esc10]
        names = {int(row["target"]): row["category"] for row in rows}
        pairs = {(row["target"], row["category"]) for row in rows}
        if len(pairs) > len(names) or len(set(names.values())) < len(names):
            raise DataError(f"{table}: category and target do not agree; each needs one partner")
        absent = [row["filename"] for row in rows if not (audio / row["filename"]).is_file()]
        if absent:
            raise DataError(
                f"{audio}: {len(absent)} of the {len(rows)} files named in {table.name} are "
                f"missing, first {absent[0]!r}; unpack the whole archive"
            )
        order = sorted(names)
        super().__init__(
            (
                Clip(
                    row["filename"],
                    (order.index(int(row["target"])),),
                    str(audio / row["filename"]),
                    fold=row["fold"],
                    group=row["src_file"],
                )
                for row in rows
            ),
            [names[target] for target in order],
            name="ESC-10" if esc10 else root.name,
        )


def read_split_lists(root: Path) -> dict[str, str] | None:
    """Return the split of each clip named in the official list files; None without such files.

    Raises:
        DataError: a list cannot be read or is empty, or a clip is in both.
    """
    lists = {name: read_list(root / name) for name in SPLIT_LISTS if (root / name).is_file()}
    splits: dict[str, str] = {}
    for name, lines in lists.items():
        for id in lines.values():
            if splits.setdefault(id, SPLIT_LISTS[name]) != SPLIT_LISTS[name]:
                raise DataError(
                    f"{root}: {id!r} is in both {' and '.join(SPLIT_LISTS)}; remove it from one"
                )
    return splits if lists else None


def read_list(file: Path) -> dict[int, str]:
    """Return the paths that a list file names, by the number of their line.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or names nothing.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}: line {line} is not UTF-8; save the file as UTF-8") from None
    lines = {
        number: line.strip().replace("\\", "/").removeprefix("./")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    }
    if not lines:
        raise DataError(f"{file}: names no file: list one path per line, or remove it")
    return lines


def _match_split_lists(
    root: Path, files: Sequence[str], skipped: list[tuple[str, str]]
) -> dict[str, str] | None:
    """The split of each listed file that is there; what is listed and is not, to `skipped`."""
    splits = read_split_lists(root)
    if splits is None:
        return None
    skipped[:] = [pair for pair in skipped if pair[0] not in SPLIT_LISTS]  # they are read
    there = {unicodedata.normalize("NFC", id): id for id in files}
    found: dict[str, str] = {}
    for name in (name for name in SPLIT_LISTS if (root / name).is_file()):
        lines = read_list(root / name)
        named = {n: there.get(unicodedata.normalize("NFC", id)) for n, id in lines.items()}
        found |= {id: SPLIT_LISTS[name] for id in named.values() if id is not None}
        lacking = [number for number, id in named.items() if id is None]
        if not lacking:
            continue
        first = lacking[0]
        if len(lacking) == len(lines):
            raise DataError(
                f"{root / name}: line {first}: no such file: {lines[first]!r} in {root}; none of "
                f"{format_count(len(lines), 'line')} names a file: write paths below that folder, "
                f"such as {files[0]}, or remove the list"
            )
        count = format_count(len(lacking), "line")
        skipped.append(
            (f"{name}: line {first}", f"no such file: {lines[first]!r} ({count} of this kind)")
        )
    return found


def _check_folder(root: str | Path, layout: str) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}; expected a folder with {layout}")
    return root.absolute()


def _scan(root: Path, progress: Progress | None = None) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of the audio files below the root, hidden ones omitted, and (path, why) of others."""
    files, skipped = list_audio(root, progress)
    above = len(os.path.join(root, ""))
    names = sorted(str(file)[above:].replace(os.sep, "/") for file in files)
    visible = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    reasons = [(make_relative(root, path), reason) for path, reason in skipped]
    reasons += [(id, "system folder") for id in visible if is_system_path(id)]
    return [id for id in visible if not is_system_path(id)], reasons


def _check_readable(root: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Refuse a class folder that cannot be listed: its class would be missing without a word."""
    for name, reason in skipped:
        if "/" not in name and reason == "permission denied" and (root / name).is_dir():
            raise DataError(
                f"{root}: the folder {name!r} cannot be read ({reason}), so its class would be "
                "missing: change its permissions, or move it elsewhere"
            )


def _suggest_parent(root: Path, files: Sequence[str]) -> str:
    """Advice where the folder of one class was given."""
    return f"; if {root.name!r} is one of the classes, give {root.parent}" if files else ""


def make_relative(root: Path, path: str | Path) -> str:
    """Return a path relative to a folder, or unchanged where it lies elsewhere."""
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _describe(files: Sequence[str], skipped: Sequence[tuple[str, str]]) -> str:
    if not files and not skipped:
        return "the folder is empty"
    others = len({name for name, _ in skipped} - set(files))
    also = f" and {format_count(others, 'other file')}" if others else ""
    return f"found {format_count(len(files), 'audio file')}{also}"
