"""What a benchmark is: where its files lie, its counts, and the protocols of the papers."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from aatjax.data.source import Clip, Source
from aatjax.data.splits import order_names
from aatjax.errors import DataError, UsageError

Selection = Literal["last", "best", "mean_curve"]
AAT, PETL = "arXiv 2401.10544", "arXiv 2312.03694 and 2402.00828"
LOCATE_DEPTH = 3  # folders that an archive may put around a benchmark


@dataclasses.dataclass(frozen=True)
class Division:
    """Which folds or splits train, choose and report in one run of a protocol.

    Attributes:
        name: the run, such as the fold that it reports on.
        train, valid, test: names of folds or splits.
    """

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def chooses_on_test(self) -> bool:
        """Whether a clip that reports could also choose."""
        return bool(set(self.valid) & set(self.test))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a paper divides a benchmark and chooses the weights that it reports.

    Attributes:
        name: `honest`, or the paper's short name.
        paper: whose protocol it is.
        divisions: the runs; their figures are averaged.
        selection: weights that are reported: of the `last` epoch, of the `best` on the validation
            part, or of the one epoch at which the mean over all runs is best (`mean_curve`).
        few_shot: which clips a few-shot run takes: `random` draws, or the `first` in file order.
        labels: `observed`, or `as_published`, where the paper's code labelled otherwise.
    """

    name: str
    paper: str
    divisions: tuple[Division, ...]
    selection: Selection = "last"
    few_shot: Literal["random", "first"] = "random"
    labels: Literal["observed", "as_published"] = "observed"

    @property
    def chooses_on_test(self) -> bool:
        """Whether weights are chosen by the clips that are reported."""
        return self.selection != "last" and any(d.chooses_on_test for d in self.divisions)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A public data set as its owner distributes it.

    Attributes:
        name: its name on the command line.
        title: its name in papers.
        paper: where it was introduced.
        licence: of the audio.
        marks: files or folders, relative to its root, by which the root is known.
        reader: from the root to a source; clips whose file is missing are in `skipped`.
        classes: the official class names in order.
        clips: official number of clips.
        parts: official number of clips of each fold or split; empty where none is official.
        metric: `accuracy` or `mean_ap`, the figure that papers give.
        statistics: name of the normalisation preset made from it, or None.
        protocols: by name; `honest` first.
        url: where it may be downloaded, or None where its licence asks for more than a click.
        checksum: `md5:...` or `sha256:...` of that archive, where it is known.
        home: where a person gets it.
    """

    name: str
    title: str
    paper: str
    licence: str
    marks: tuple[str, ...]
    reader: Callable[[Path], Source]
    classes: tuple[str, ...]
    clips: int
    parts: Mapping[str, int]
    metric: Literal["accuracy", "mean_ap"]
    statistics: str | None
    protocols: tuple[Protocol, ...]
    home: str
    url: str | None = None
    checksum: str | None = None

    def locate(self, folder: Path) -> Path:
        """The root of the benchmark in a folder, up to a few levels down.

        Raises:
            DataError: it is not there; the message says what was looked for.
        """
        level = [folder]
        for _ in range(LOCATE_DEPTH + 1):
            for candidate in level:
                if all((candidate / mark).exists() for mark in self.marks):
                    return candidate
            level = [
                child
                for candidate in level
                for child in _entries(candidate)
                if child.is_dir() and not child.name.startswith((".", "__MACOSX"))
            ][:1000]
        raise DataError(
            f"{folder}: {self.title} is not there: no folder in it holds "
            f"{' and '.join(self.marks)}; give the folder or archive as it is downloaded from "
            f"{self.home}"
        )

    def read(self, folder: Path) -> Source:
        """The clips that lie in a folder, with the official classes.

        Raises:
            DataError: it is not this benchmark, or its tables cannot be used.
        """
        return self.reader(self.locate(folder))

    def protocol(self, name: str) -> Protocol:
        """The protocol of a name.

        Raises:
            UsageError: there is none.
        """
        for protocol in self.protocols:
            if protocol.name == name:
                return protocol
        raise UsageError(
            f"{self.title} has no protocol {name!r}: there are "
            f"{', '.join(p.name for p in self.protocols)}"
        )

    def census(self, source: Source) -> Census:
        """Counts of what is there against the official ones."""
        found = Counter(find_part(clip) for clip in source.clips)
        parts = {name: (found.get(name, 0), self.parts[name]) for name in self.parts}
        return Census(len(source), self.clips, parts, _absent_classes(source))


@dataclasses.dataclass(frozen=True)
class Census:
    """How much of a benchmark is there.

    Attributes:
        clips: clips that are there.
        official: clips that there should be.
        parts: of each official part, the clips that are there and that there should be.
        absent: classes without a clip.
    """

    clips: int
    official: int
    parts: Mapping[str, tuple[int, int]]
    absent: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every official count is met."""
        return self.clips == self.official and all(a == b for a, b in self.parts.values())

    def text(self) -> str:
        """`320 of 2,000 clips (fold 1: 80 of 400, ...)`."""
        odd = [f"{n}: {a:,} of {b:,}" for n, (a, b) in self.parts.items() if a != b]
        rest = f" ({', '.join(odd)})" if odd else ""
        lacking = f"; no clip of {', '.join(self.absent[:5])}" if self.absent else ""
        more = f" and {len(self.absent) - 5} more classes" if len(self.absent) > 5 else ""
        return f"{self.clips:,} of {self.official:,} clips{rest}{lacking}{more}"


def find_part(clip: Clip) -> str | None:
    """The fold or split of a clip, whichever the set has."""
    return clip.fold if clip.fold is not None else clip.split


def held_out(folds: Sequence[str], *, on_test: bool = False) -> tuple[Division, ...]:
    """One run a fold: it is tested on, all others train; `on_test` makes it choose as well."""
    return tuple(
        Division(fold, tuple(f for f in folds if f != fold), (fold,) if on_test else (), (fold,))
        for fold in folds
    )


def official_lists(*, valid: str | None = "valid") -> tuple[Division, ...]:
    """The official lists: `train` trains, `valid` chooses, `test` reports."""
    return (Division("official", ("train",), () if valid is None else (valid,), ("test",)),)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of an official CSV file; cells are stripped.

    Raises:
        DataError: it cannot be read, lacks a column, or a row lacks a cell.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}; unpack the archive anew") from error
    head = list(rows[0]) if rows else []
    lacking = [name for name in columns if name not in head]
    if lacking:
        raise DataError(
            f"{path}: lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; it has "
            f"{', '.join(map(str, head)) or 'no rows'}: it is not the official file"
        )
    for number, row in enumerate(rows, 2):
        for name in columns:
            if not (row[name] or "").strip():
                raise DataError(f"{path}: row {number}: empty cell in column {name!r}")
    return [{name: row[name].strip() for name in columns} for row in rows]


def present(root: Path, clips: Sequence[Clip]) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The clips whose file is there, and (id, reason) of the others.

    Raises:
        DataError: not one is there.
    """
    here = [clip for clip in clips if clip.path is not None and Path(clip.path).is_file()]
    if not here:
        first = clips[0].path if clips else root
        raise DataError(
            f"{root}: none of the {len(clips)} clips that the tables name is there, such as "
            f"{first}; unpack the whole archive"
        )
    ids = {clip.id for clip in here}
    return here, [(clip.id, "file is missing") for clip in clips if clip.id not in ids]


def _absent_classes(source: Source) -> tuple[str, ...]:
    used = {c for clip in source.clips for c in clip.label}
    return tuple(name for c, name in enumerate(source.classes) if c not in used)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def fold_names(count: int) -> tuple[str, ...]:
    """The folds '1' to 'count'."""
    return order_names({str(k) for k in range(1, count + 1)})
