"""Labelled clips, and `Source`, the base of every collection of them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii as quote_json
from typing import Any, Protocol, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int, Int16, Int32

from aatjax.audio.decode import decode
from aatjax.data.splits import (
    SplitMethod,
    draw_shots,
    find_leaks,
    order_names,
    split_by_hash,
    stratify,
)
from aatjax.errors import AatjaxError, DataError, UsageError, check_kind, printable, suggest
from aatjax.io.digest import hash_lines


class Progress(Protocol):
    """Report of progress: the stage, items done, and items in total (0 while unknown)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled sound.

    Attributes:
        id: stable name, unique in its source (a relative path where there is one).
        label: class indices; exactly one in a single-label source.
        path: the audio file, or None for a sound made on demand.
        fold: cross-validation fold.
        split: part of an official division: 'train', 'valid' or 'test'.
        group: the recording or speaker it comes from; a split never cuts a group.
        observed: the annotated classes of a partially annotated clip in a multi-label source; None
            where all are annotated.
    """

    id: str
    label: tuple[int, ...]
    path: str | None
    fold: str | None = None
    split: str | None = None
    group: str | None = None
    observed: tuple[int, ...] | None = None


class Reader:
    """Reads the samples of a clip by decoding its file every time."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        """Return the waveform: mono, 16 kHz."""
        if clip.path is None:
            raise DataError(f"{clip.id}: the clip has no file to read")
        return decode(clip.path).waveform

    def read_log_mel(self, clip: Clip) -> Float32[np.ndarray, "t f"] | None:
        """Return the log-mel of a clip that has no waveform; None where it has one."""
        return None

    def key(self, clip: Clip) -> str | None:
        """Return what identifies the samples of the clip; None if unknown before reading."""
        return None

    def recall(self, name: str, clips: Iterable[Clip]) -> dict[str, Any]:
        """Return what `remember` was given under a name, by the ids of clips that are the same."""
        return {}

    def remember(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep what was computed of clips for the next start, by their ids, as JSON."""


class Source:
    """A sequence of labelled clips, with their waveforms at 16 kHz.

    A clip carries its label, so removing clips can never shift labels. Parts made by `subset`,
    `split`, `fold` and `by_split` keep the classes and the reader.

    Args:
        clips: the clips, in the order in which they are indexed.
        classes: class names; `Clip.label` indexes them.
        name: name shown to people.
        multi_label: whether a clip may have any number of classes.
        reader: reads waveforms; decodes files by default.
        skipped: (what, why) for every file or row that is not used.
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
        self.clips: tuple[Clip, ...] = tuple(clips)
        self.classes: tuple[str, ...] = tuple(classes)
        self.name = name
        self.multi_label = multi_label
        self.reader: Reader = reader or Reader()
        self.skipped: tuple[tuple[str, str], ...] = tuple(skipped)
        self.notes: tuple[tuple[str, str], ...] = tuple(notes)
        self._fingerprint: str | None = None
        self._check()

    def _check(self) -> None:
        if not self.clips:
            raise DataError(f"{self.name}: no clips; at least one is needed")
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"{self.name}: a class name occurs twice; class names must differ")
        if self._is_sound():
            return
        seen: set[str] = set()
        for clip in self.clips:
            if wrong := self._find_fault(clip, seen):
                raise DataError(f"{self.name}: clip {clip.id!r} {wrong}")
            seen.add(clip.id)

    def _is_sound(self) -> bool:
        """Whether no clip has a fault, without a look at which one: every part is checked again."""
        if self.multi_label or len({clip.id for clip in self.clips}) < len(self.clips):
            return False
        count = len(self.classes)
        return all(
            len(clip.label) == 1 and 0 <= clip.label[0] < count and clip.observed is None
            for clip in self.clips
        )

    def _find_fault(self, clip: Clip, seen: set[str]) -> str:
        count = len(clip.label)
        if clip.id in seen:
            return "occurs twice; keep one of them"
        if any(not 0 <= c < len(self.classes) for c in clip.label):
            return f"has label {clip.label}, but there are {len(self.classes)} classes"
        if not self.multi_label and count != 1:
            return (
                f"has {count} labels in a single-label set; give it one, or make the set "
                "multi-label"
            )
        if clip.observed is not None and not set(clip.label) <= set(clip.observed):
            return "has a class that it was not annotated for"
        if clip.observed is not None and not self.multi_label:
            return "is annotated in part, which only a multi-label set can be"
        return ""

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: SupportsIndex) -> Clip:
        return self.clips[i]

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<{kind} {self.name!r}: {len(self)} clips, {len(self.classes)} classes>"

    def waveform(self, i: SupportsIndex) -> Int16[np.ndarray, " s"]:
        """Return the samples of clip i: int16, mono, 16 kHz.

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

    def log_mel(self, i: SupportsIndex) -> Float32[np.ndarray, "t f"] | None:
        """Return the log-mel of clip i before normalisation, where that is what is given of it."""
        return self.reader.read_log_mel(self.clips[i])

    def targets(
        self, rows: Sequence[int] | Int[np.ndarray, " b"] | None = None
    ) -> Float32[np.ndarray, "b c"]:
        """Return one row per clip: 1 for its classes, 0 for others, NaN where not annotated.

        Args:
            rows: the clips, by default all: then a set of many classes needs 4 bytes for each clip
                and class.
        """
        clips = self.clips if rows is None else [self.clips[int(row)] for row in rows]
        targets = np.zeros((len(clips), len(self.classes)), np.float32)
        for i, clip in enumerate(clips):
            if clip.observed is not None:
                targets[i] = np.nan
                targets[i, list(clip.observed)] = 0
        owner = [i for i, clip in enumerate(clips) for _ in clip.label]
        targets[owner, [c for clip in clips for c in clip.label]] = 1
        return targets

    def labels(self) -> Int32[np.ndarray, " b"]:
        """Return the class index of each clip of a single-label set.

        Raises:
            UsageError: clips may have any number of classes.
        """
        if self.multi_label:
            raise UsageError(f"{self.name}: clips may have several classes: use targets()")
        return np.array([clip.label[0] for clip in self.clips], np.int32)

    def with_clips(
        self,
        clips: Iterable[Clip],
        *,
        reader: Reader | None = None,
        skipped: Sequence[tuple[str, str]] | None = None,
        notes: Sequence[tuple[str, str]] | None = None,
    ) -> Source:
        """Return the same set with these clips; the other arguments replace what it had."""
        return Source(
            clips,
            self.classes,
            name=self.name,
            multi_label=self.multi_label,
            reader=reader or self.reader,
            skipped=self.skipped if skipped is None else skipped,
            notes=self.notes if notes is None else notes,
        )

    def with_classes(
        self, classes: Sequence[str], owner: str, *, multi_label: bool | None = None
    ) -> Source:
        """Return the same clips with other classes, matched by name; their order may differ.

        Args:
            classes: all classes that the clips have, and any that no clip has.
            owner: whose classes these are, for the message.
            multi_label: whether a clip may have any number of them; None leaves that as it is.

        Raises:
            UsageError: a clip has a class that is not among them; the nearest ones are named.
        """
        if multi_label is None:
            multi_label = self.multi_label
        if self.multi_label and not multi_label:
            raise UsageError(
                f"{self.name}: its clips may have several classes, those of {owner} have one: "
                "evaluate it on clips with one class each"
            )
        if tuple(classes) == self.classes and multi_label == self.multi_label:
            return self
        places = {_normalize(name): place for place, name in enumerate(classes)}
        found = [places.get(_normalize(name)) for name in self.classes]
        used = {c for clip in self.clips for c in clip.label}
        if strange := [self.classes[c] for c in sorted(used) if found[c] is None]:
            hints = [f"{name!r}{_suggest_class(name, classes)}" for name in strange]
            raise UsageError(
                f"{self.name}: {_join_first(hints, '; ')}: not among the classes of {owner} "
                f"({_join_first(list(classes))}): rename them in the data, or omit their clips"
            )

        def translate(label: Iterable[int]) -> tuple[int, ...]:
            return tuple(sorted(place for c in label if (place := found[c]) is not None))

        clips = [
            replace(
                clip,
                label=translate(clip.label),
                observed=None if clip.observed is None else translate(clip.observed),
            )
            for clip in self.clips
        ]
        return Source(
            clips,
            classes,
            name=self.name,
            multi_label=multi_label,
            reader=self.reader,
            skipped=self.skipped,
            notes=self.notes,
        )

    def subset(self, indices: Iterable[int] | Int[np.ndarray, " b"]) -> Source:
        """Return the clips at these indices, in this order."""
        return self.with_clips(self.clips[int(i)] for i in indices)

    def split(
        self,
        fraction: float,
        seed: int = 0,
        *,
        method: SplitMethod = "stratified",
        part: str = "test",
    ) -> tuple[Source, Source]:
        """Divide into (train, test): groups kept whole, same for same seed.

        Args:
            fraction: share of the clips in the test part, between 0 and 1.
            seed: chooses among equally good divisions.
            method: `stratified` cuts every class at the fraction and depends on all the clips;
                `hash` assigns each by its name, so that added clips move no others, and keeps near
                the fraction (see `split_by_hash`).
            part: name of the test part, which `hash` depends on.

        Raises:
            UsageError: the fraction is not between 0 and 1.
            DataError: one side would be empty.
        """
        labels, groups = self._labels_and_groups()
        try:
            if method == "hash":
                ids = [clip.id for clip in self.clips]
                train, test = split_by_hash(ids, labels, groups, fraction, seed, part)
            else:
                train, test = stratify(labels, groups, fraction, seed)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        return self.subset(train), self.subset(test)

    def _labels_and_groups(self) -> tuple[list[tuple[int, ...]], list[str | None]]:
        return [clip.label for clip in self.clips], [clip.group for clip in self.clips]

    def shots(self, shots: int, seed: int | None = 0) -> Source:
        """Return a few-shot training set: `shots` clips per class.

        Args:
            shots: clips per class.
            seed: which draw; None takes the first of each class, as arXiv 2312.03694 does.

        Raises:
            UsageError: fewer than one.
            DataError: a class has fewer clips.
        """
        labels, groups = self._labels_and_groups()
        try:
            return self.subset(draw_shots(labels, groups, self.classes, shots, seed))
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, in order; empty if no clip has one.

        Raises:
            DataError: some clips have a fold and some have none, or a group lies in two folds.
        """
        without = [clip.id for clip in self.clips if clip.fold is None]
        if len(without) == len(self.clips):
            return ()
        if without:
            raise DataError(
                f"{self.name}: {len(without)} of {len(self)} clips have no fold "
                f"({_join_first(without)}); give every clip a fold, or none"
            )
        leaks = self.leaks("fold")
        if leaks:
            report = [f"{group!r} in {', '.join(where)}" for group, where in leaks.items()]
            raise DataError(
                f"{self.name}: groups in more than one fold ({len(leaks)}), so the held-out fold "
                f"leaks into training: {_join_first(report, '; ')}; put all clips of a group in "
                "one fold"
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
        return (
            self.with_clips(clip for clip in self.clips if clip.fold != str(k)),
            self.with_clips(clip for clip in self.clips if clip.fold == str(k)),
        )

    def by_split(self, name: str) -> Source:
        """Return one part of the official division: 'train', 'valid' or 'test'.

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
        """Return groups with clips in more than one 'fold' or 'split', with those names."""
        if by not in ("fold", "split"):
            raise UsageError(f"by is {by!r}; give 'fold' or 'split'")
        return find_leaks([clip.group for clip in self.clips], [getattr(c, by) for c in self.clips])

    def fingerprint(self) -> str:
        """Return a SHA-256 of classes, ids, labels and sample keys; independent of file paths."""
        if self._fingerprint is None:
            self._fingerprint = hash_lines(self._describe())
        return self._fingerprint

    def _describe(self) -> Iterator[str]:
        """Yield JSON: the classes, then id, labels, key and annotated classes of each clip."""
        yield json.dumps([self.classes, self.multi_label])
        for clip in self.clips:
            key = self.reader.key(clip)
            parts = [quote_json(_normalize(clip.id)), _list_json(clip.label)]
            parts.append("null" if key is None else quote_json(key))
            if clip.observed is not None:
                parts.append(_list_json(clip.observed))
            yield f"[{', '.join(parts)}]"


def check_source(source: object, what: str, more: str = "") -> None:
    """Refuse what is no source of clips, such as a path or a pair of arrays.

    Raises:
        UsageError: it says how to make one; `what` is the function and its argument.
    """
    advice = f"give a source, data.Arrays(X, y, classes) or data.AudioFolder(path){more}"
    check_kind(what, source, Source, advice)


def _suggest_class(name: str, classes: Sequence[str]) -> str:
    """Return `, did you mean 'x'?`, a number of the same value first."""
    try:
        equal = [other for other in classes if float(other) == float(name)]
    except ValueError:
        equal = []
    return f", did you mean {equal[0]!r}?" if equal else suggest(name, classes)


def _list_json(numbers: Iterable[int]) -> str:
    return f"[{', '.join(map(str, sorted(numbers)))}]"


def _normalize(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _join_first(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
