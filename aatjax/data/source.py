"""Labelled clips and `Source`, the base of everything that hands them out."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int, Int16

from aatjax.audio.decode import decode
from aatjax.data.splits import draw_shots, find_leaks, order_names, stratify
from aatjax.errors import AatjaxError, DataError, UsageError, printable
from aatjax.io.digest import hash_bytes


class Progress(Protocol):
    """Report of progress: the stage, items done, and items in total (0 while unknown)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled sound.

    Attributes:
        id: stable name shown to people, unique in its source (a relative path where there is one).
        label: class indices; exactly one in a single-label source.
        path: the audio file, or None for a sound made on demand.
        fold: cross-validation fold.
        split: part of an official division: 'train', 'valid' or 'test'.
        group: the recording or speaker it comes from; a split never cuts a group.
        observed: the classes of which it is known whether the clip has them, in a multi-label
            source that was annotated in part; None where that is known of all.
    """

    id: str
    label: tuple[int, ...]
    path: str | None
    fold: str | None = None
    split: str | None = None
    group: str | None = None
    observed: tuple[int, ...] | None = None


class Reader:
    """Turns a clip into samples by decoding its file anew each time."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        """The waveform: mono, 16 kHz."""
        if clip.path is None:
            raise DataError(f"{clip.id}: the clip has no file to read")
        return decode(clip.path).waveform

    def key(self, clip: Clip) -> str | None:
        """What identifies the samples of the clip, where that is known without reading them."""
        return None


class Source:
    """A sequence of labelled clips, with their waveforms at 16 kHz.

    A clip carries its label, so leaving clips out can never shift labels. Parts made by `subset`,
    `split`, `fold` and `by_split` keep the classes and read waveforms the same way.

    Args:
        clips: the clips, in the order in which they are indexed.
        classes: class names; `Clip.label` indexes them.
        name: name shown to people.
        multi_label: whether a clip may have any number of classes.
        reader: how waveforms are read; decodes files by default.
        skipped: (what, why) for every file or row left out.
        notes: (clip id, remark) about clips that are used although something is odd with them.

    Raises:
        DataError: no clip, two clips of one id, or a label that does not fit the classes.
    """

    def __init__(
        self,
        clips: Iterable[Clip],
        classes: Sequence[str],
        *,
        name: str,
        multi_label: bool = False,
        reader: Reader | None = None,
        skipped: Sequence[tuple[str, str]] = (),
        notes: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.clips = tuple(clips)
        self.classes = tuple(classes)
        self.name = name
        self.multi_label = multi_label
        self.reader = reader or Reader()
        self.skipped = tuple(skipped)
        self.notes = tuple(notes)
        self._check()

    def _check(self) -> None:
        if not self.clips:
            raise DataError(f"{self.name}: no clips; at least one is needed")
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"{self.name}: a class name occurs twice; class names must differ")
        seen: set[str] = set()
        for clip in self.clips:
            if clip.id in seen:
                raise DataError(f"{self.name}: clip {clip.id!r} occurs twice; keep one of them")
            seen.add(clip.id)
            if any(not 0 <= c < len(self.classes) for c in clip.label):
                raise DataError(
                    f"{self.name}: clip {clip.id!r} has label {clip.label}, "
                    f"but there are {len(self.classes)} classes"
                )
            if not self.multi_label and len(clip.label) != 1:
                raise DataError(
                    f"{self.name}: clip {clip.id!r} has {len(clip.label)} labels in a "
                    "single-label set; give it one, or make the set multi-label"
                )
            if clip.observed is not None and not set(clip.label) <= set(clip.observed):
                raise DataError(
                    f"{self.name}: clip {clip.id!r} has a class that it was not annotated for"
                )
            if clip.observed is not None and not self.multi_label:
                raise DataError(
                    f"{self.name}: clip {clip.id!r} is annotated in part, which only a "
                    "multi-label set can be"
                )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: SupportsIndex) -> Clip:
        return self.clips[i]

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<{kind} {self.name!r}: {len(self)} clips, {len(self.classes)} classes>"

    def waveform(self, i: SupportsIndex) -> Int16[np.ndarray, " s"]:
        """Samples of clip i: int16, mono, 16 kHz.

        Raises:
            DataError: the sound cannot be read; the message names the file.
        """
        clip = self.clips[i]
        try:
            return self.reader.read(clip)
        except AatjaxError:
            raise
        except Exception as error:
            raise DataError(
                f"{printable(clip.path or clip.id)}: could not be read: {error}"
            ) from error

    def targets(self) -> Float32[np.ndarray, "b c"]:
        """One row a clip: 1 for its classes, 0 for others, NaN where that was not annotated."""
        rows = [i for i, clip in enumerate(self.clips) for _ in clip.label]
        targets = np.zeros((len(self.clips), len(self.classes)), np.float32)
        for i, clip in enumerate(self.clips):
            if clip.observed is not None:
                targets[i] = np.nan
                targets[i, list(clip.observed)] = 0
        targets[rows, [c for clip in self.clips for c in clip.label]] = 1
        return targets

    def with_clips(
        self,
        clips: Iterable[Clip],
        *,
        reader: Reader | None = None,
        skipped: Sequence[tuple[str, str]] | None = None,
        notes: Sequence[tuple[str, str]] | None = None,
    ) -> Source:
        """The same set holding only these clips; the other arguments replace what it had."""
        return Source(
            clips,
            self.classes,
            name=self.name,
            multi_label=self.multi_label,
            reader=reader or self.reader,
            skipped=self.skipped if skipped is None else skipped,
            notes=self.notes if notes is None else notes,
        )

    def subset(self, indices: Iterable[int] | Int[np.ndarray, " b"]) -> Source:
        """The clips at these indices, in this order."""
        return self.with_clips(self.clips[int(i)] for i in indices)

    def split(self, fraction: float, seed: int = 0) -> tuple[Source, Source]:
        """Divide into (train, test): stratified by class, groups kept whole, same for same seed.

        Args:
            fraction: share of the clips in the test part, between 0 and 1.
            seed: chooses which clips.

        Raises:
            UsageError: the fraction is not between 0 and 1.
            DataError: nothing would be left on one side.
        """
        labels = [clip.label for clip in self.clips]
        groups = [clip.group for clip in self.clips]
        try:
            train, test = stratify(labels, groups, fraction, seed)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        return self.subset(train), self.subset(test)

    def shots(self, shots: int, seed: int | None = 0) -> Source:
        """The clips of a few-shot training set: `shots` of each class.

        Args:
            shots: clips of each class.
            seed: which draw; None takes the first of each class, as arXiv 2312.03694 does.

        Raises:
            UsageError: fewer than one.
            DataError: a class has fewer clips.
        """
        labels = [clip.label for clip in self.clips]
        groups = [clip.group for clip in self.clips]
        try:
            return self.subset(draw_shots(labels, groups, self.classes, shots, seed))
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, in order; empty where no clip has one.

        Raises:
            DataError: some clips have a fold and some have none, or a group lies in two folds.
        """
        without = [clip.id for clip in self.clips if clip.fold is None]
        if len(without) == len(self.clips):
            return ()
        if without:
            raise DataError(
                f"{self.name}: {len(without)} of {len(self)} clips have no fold "
                f"({_first(without)}); give every clip a fold, or none"
            )
        leaks = self.leaks("fold")
        if leaks:
            report = [f"{group!r} in {', '.join(where)}" for group, where in leaks.items()]
            raise DataError(
                f"{self.name}: {len(leaks)} groups lie in more than one fold, so the held-out fold "
                f"leaks into training: {_first(report, '; ')}; put all clips of a group in one fold"
            )
        return order_names({clip.fold for clip in self.clips if clip.fold is not None})

    def fold(self, k: str | int) -> tuple[Source, Source]:
        """Divide into (all other folds, fold k).

        Raises:
            DataError: the set has no folds, or its folds cannot be used (see `folds`).
            UsageError: there is no fold k.
        """
        folds = self.folds
        if len(folds) < 2:
            raise DataError(
                f"{self.name}: has {len(folds)} folds, cross-validation needs two or more; "
                "fill a fold column, or use split()"
            )
        if str(k) not in folds:
            raise UsageError(f"{self.name}: no fold {k!r}; the folds are {', '.join(folds)}")
        held_out = [clip.fold == str(k) for clip in self.clips]
        return (
            self.with_clips(c for c, out in zip(self.clips, held_out, strict=True) if not out),
            self.with_clips(c for c, out in zip(self.clips, held_out, strict=True) if out),
        )

    def by_split(self, name: str) -> Source:
        """The clips of one part of the official division: 'train', 'valid' or 'test'.

        Raises:
            DataError: the set has no official division.
            UsageError: it has no part of this name.
        """
        names = order_names({clip.split for clip in self.clips if clip.split is not None})
        if not names:
            raise DataError(f"{self.name}: has no official division; use split() or folds")
        if name not in names:
            raise UsageError(f"{self.name}: no split {name!r}; there are {', '.join(names)}")
        return self.with_clips(clip for clip in self.clips if clip.split == name)

    def leaks(self, by: str = "fold") -> dict[str, list[str]]:
        """Groups whose clips lie in more than one 'fold' or 'split', with the names of those."""
        if by not in ("fold", "split"):
            raise UsageError(f"leaks are looked for by 'fold' or 'split', not {by!r}")
        return find_leaks([clip.group for clip in self.clips], [getattr(c, by) for c in self.clips])

    def fingerprint(self) -> str:
        """SHA-256 over classes, clip ids, labels, and the keys of the samples where known.

        It does not depend on where the files lie.
        """
        lines = [json.dumps([self.classes, self.multi_label])]
        for clip in self.clips:
            name = unicodedata.normalize("NFC", clip.id)
            record = [name, sorted(clip.label), self.reader.key(clip)]
            if clip.observed is not None:
                record.append(sorted(clip.observed))
            lines.append(json.dumps(record))
        return hash_bytes("\n".join(lines))


def _first(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
