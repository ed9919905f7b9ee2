"""What a benchmark is: its files, counts and protocols, and the reader that all of them share.

A new benchmark is one new module in this package, which the package finds by itself, and its name
in `aatjax.data.formats.SourceFormat`. The module holds

1. a function for `Benchmark.list_clips`: from the root to an `aatjax.data.source.Clip` for every
   clip that the official tables name, whether the file is there or not, with its id, the indices of
   its classes, its path, its fold or split (`train`, `valid`, `test`), and its group.
   `aatjax.data.tables.read_table` reads CSV files; the error of a `TableRow` names file and row.
2. a `Benchmark` at module level: marks, classes, official counts, publication, and protocols:
   `make_fold_protocols`, or `make_list_protocols` (`valid=None` where no list chooses).

Its recipes (`NAME_soft_moa`, ...) have the usual settings until `configs/recipes.py` has its own.
The tests read a small copy of the official layout, made by a function that `MAKERS` in
`tests/official_layouts.py` holds under the benchmark's name; without one they skip it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from aatjax.data.source import Clip, Source
from aatjax.errors import DataError, UsageError

Selection = Literal["last", "best", "mean_curve"]
AAT, PETL = "arXiv 2401.10544", "arXiv 2312.03694 and 2402.00828"
LOCATE_DEPTH = 3  # folders that an archive may put around a benchmark


@dataclasses.dataclass(frozen=True)
class Division:
    """Folds or splits that train, choose and report in one run of a protocol.

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
        """Whether validation and test share clips."""
        return bool(set(self.valid) & set(self.test))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a paper divides a benchmark and selects the weights that it reports.

    Attributes:
        name: `honest`, or the paper's short name.
        paper: source of the protocol.
        divisions: the runs; their figures are averaged.
        selection: weights that are reported: of the `last` epoch, of the `best` on the validation
            part, or of the one epoch at which the mean over all runs is best (`mean_curve`).
        few_shot: clips of a few-shot run: `random` draws, or the `first` in file order.
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
        name: name on the command line.
        title: name in papers.
        paper: publication that introduced it.
        licence: licence of the audio.
        marks: files or folders, relative to the root, that identify the root.
        signs: names with wildcards, relative to a folder, of which one is enough to recognise the
            benchmark without its name; none if a plain layout reads it as well.
        list_clips: from the root to all clips of the official tables.
        classes: the official class names in order.
        clips: official number of clips.
        parts: official number of clips per fold or split; empty where none is official.
        protocols: by name; `honest` first.
        home: where a person gets it.
        metric: `accuracy`, or `mean_ap` for a multi-label set.
        statistics: name of the normalisation preset made from it, or None.
        url: where it may be downloaded, or None where its licence asks for more than a click.
        checksum: `md5:...` or `sha256:...` of that archive, where it is known.
    """

    name: str
    title: str
    paper: str
    licence: str
    marks: tuple[str, ...]
    list_clips: Callable[[Path], Iterable[Clip] | Source]
    classes: tuple[str, ...]
    clips: int
    parts: Mapping[str, int]
    protocols: tuple[Protocol, ...]
    home: str
    metric: Literal["accuracy", "mean_ap"] = "accuracy"
    statistics: str | None = None
    signs: tuple[str, ...] = ()
    url: str | None = None
    checksum: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is recognised as this benchmark without its name."""
        if not any(True for sign in self.signs for _ in folder.glob(sign)):
            return False
        try:
            self.locate(folder)
        except DataError:
            return False
        return True

    def locate(self, folder: Path) -> Path:
        """Return the root of the benchmark in a folder, up to a few levels down.

        Raises:
            DataError: not found; the message names the marks.
        """
        level = [folder]
        for _ in range(LOCATE_DEPTH + 1):
            for candidate in level:
                if all((candidate / mark).exists() for mark in self.marks):
                    return candidate
            level = [child for candidate in level for child in _list_folders(candidate)][:1000]
        raise DataError(
            f"{folder}: {self.title} is not there: no folder in it holds "
            f"{' and '.join(self.marks)}; give the folder or archive as downloaded from {self.home}"
        )

    def read(self, folder: Path) -> Source:
        """Return the clips whose files are in a folder, with the official classes.

        Clips whose file is missing are in `skipped`.

        Raises:
            DataError: not this benchmark, no file is there, or its tables cannot be used.
        """
        root = self.locate(folder)
        listed = self.list_clips(root)
        skipped: tuple[tuple[str, str], ...] = ()
        if isinstance(listed, Source):
            clips, skipped = listed.clips, listed.skipped
        else:
            clips = tuple(listed)
        present = {clip.id for clip in clips if clip.path and Path(clip.path).is_file()}
        if not present:
            example = f", such as {clips[0].path}" if clips else ""
            raise DataError(
                f"{root}: none of the {len(clips)} clips in the tables was found{example}; unpack "
                "the whole archive"
            )
        missing = [(clip.id, "file is missing") for clip in clips if clip.id not in present]
        return Source(
            (clip for clip in clips if clip.id in present),
            self.classes,
            name=self.title,
            multi_label=self.metric == "mean_ap",
            skipped=[*skipped, *missing],
        )

    def protocol(self, name: str) -> Protocol:
        """Return the protocol of a name.

        Raises:
            UsageError: there is none.
        """
        known = {protocol.name: protocol for protocol in self.protocols}
        if name not in known:
            raise UsageError(f"{self.title} has no protocol {name!r}: there are {', '.join(known)}")
        return known[name]

    def census(self, source: Source) -> Census:
        """Count the clips of a source against the official numbers."""
        found = Counter(find_part(clip) for clip in source.clips)
        used = {c for clip in source.clips for c in clip.label}
        return Census(
            len(source),
            self.clips,
            {name: (found.get(name, 0), self.parts[name]) for name in self.parts},
            tuple(name for c, name in enumerate(source.classes) if c not in used),
        )


@dataclasses.dataclass(frozen=True)
class Census:
    """Clips present of a benchmark, against the official numbers.

    Attributes:
        clips: clips present.
        official: official number of clips.
        parts: of each official part, the clips present and the official number.
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
        """Return `320 of 2,000 clips (fold 1: 80 of 400, ...)`."""
        odd = [f"{n}: {a:,} of {b:,}" for n, (a, b) in self.parts.items() if a != b]
        rest = f" ({', '.join(odd)})" if odd else ""
        lacking = f"; no clip of {', '.join(self.absent[:5])}" if self.absent else ""
        more = f" and {len(self.absent) - 5} more classes" if len(self.absent) > 5 else ""
        return f"{self.clips:,} of {self.official:,} clips{rest}{lacking}{more}"


def find_part(clip: Clip) -> str | None:
    """Return the fold or split of a clip, whichever the set has."""
    return clip.fold if clip.fold is not None else clip.split


def split_names(text: str) -> tuple[str, ...]:
    """Return class names that are separated by spaces."""
    return tuple(text.split())


def hold_out_folds(folds: Sequence[str], *, on_test: bool = False) -> tuple[Division, ...]:
    """Return one run per fold: it tests, all others train; `on_test` makes it choose as well."""
    return tuple(
        Division(fold, tuple(f for f in folds if f != fold), (fold,) if on_test else (), (fold,))
        for fold in folds
    )


def use_lists(valid: str | None = "valid") -> tuple[Division, ...]:
    """Return the one run of official lists: `train` trains, `valid` chooses, `test` reports."""
    return (Division("official", ("train",), (valid,) if valid else (), ("test",)),)


def make_fold_protocols(folds: Sequence[str], petl: tuple[Division, ...]) -> tuple[Protocol, ...]:
    """Return the protocols of a benchmark with folds; `petl` are the runs of that paper."""
    honest = f"{len(folds)} folds, each held out once; weights of the last epoch"
    return (
        Protocol("honest", honest, hold_out_folds(folds)),
        Protocol("aat", AAT, hold_out_folds(folds, on_test=True), selection="mean_curve"),
        Protocol("petl", PETL, petl, few_shot="first"),
    )


def make_list_protocols(*papers: str, valid: str | None = "valid") -> tuple[Protocol, ...]:
    """Return the protocols of a benchmark with official lists: honest, and of the papers.

    Args:
        papers: names of the papers' protocols to include, `aat` and `petl`.
        valid: the list that chooses an epoch in the honest protocol; None where there is none.
    """
    epoch = "the best epoch on the validation list" if valid else "weights of the last epoch"
    honest = Protocol(
        "honest",
        f"the official lists; {epoch}",
        use_lists(valid),
        selection="best" if valid else "last",
    )
    every = (
        honest,
        Protocol("aat", AAT, use_lists(), selection="best"),
        Protocol("petl", PETL, use_lists(), few_shot="first"),
    )
    return tuple(protocol for protocol in every if protocol.name in ("honest", *papers))


def _list_folders(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [e for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX"))]
