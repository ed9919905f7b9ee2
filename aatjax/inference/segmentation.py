"""From windows to segments: smoothing over time, thresholds, minimum durations, closed gaps.

A window stands for the time around its centre: the border between two windows lies half-way
between their centres, so windows that do not overlap stand for exactly their span.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float

from aatjax.audio.windows import RATE
from aatjax.errors import Range, UsageError, check_fields
from aatjax.inference.calibration import DEFAULT_THRESHOLD, Calibration, decide

UNSURE = "unsure"
_SLACK = 1e-6  # windows: 3 * 0.1 s counts as three tenths of a second

Seconds = Annotated[float, Range(0)]
Threshold = Annotated[float | tuple[float, ...], Range(0, 1)]


@dataclasses.dataclass(frozen=True)
class SegmentationRules:
    """How windows become segments.

    Attributes:
        smooth: seconds of smoothing, 0 for none: over the largest odd number of windows that fits;
            over fewer at the ends of a file.
        kind: 'median' or 'mean' of those windows, per class.
        on: probability from which a class begins, one for all or one per class. None: the
            calibrated thresholds, or 0.5 for a multi-label model without; for a single-label model
            the most probable class, and "unsure" where several are possible.
        off: probability below which a class ends; None: the same as `on`.
        min_duration: shorter segments (seconds) are dropped, after gaps were closed.
        gap: two segments of a class at most this far apart (seconds) become one. For a
            single-label model only where no other class lies in between.
    """

    smooth: Seconds = 0.0
    kind: Literal["median", "mean"] = "median"
    on: Threshold | None = None
    off: Threshold | None = None
    min_duration: Seconds = 0.0
    gap: Seconds = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.off is not None and self.on is None:
            raise UsageError("off= needs on=: give both thresholds")

    def count_neighbours(self, step: int) -> int:
        """Return the windows on each side that smoothing includes, for `step` between windows.

        Raises:
            UsageError: `smooth` is too short to include any.
        """
        count = int(self.smooth * RATE / step / 2 + _SLACK)
        if self.smooth > 0 and count == 0:
            raise UsageError(
                f"smoothing over {self.smooth:g} s has no effect on windows every "
                f"{step / RATE:g} s: give at least {2 * step / RATE:g} s, or a smaller hop"
            )
        return count

    def find_thresholds(
        self, classes: int, multi_label: bool, calibration: Calibration | None
    ) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]] | None:
        """Return where each class begins and ends; None if the most probable one is taken.

        Raises:
            UsageError: a wrong number of thresholds, or a class with off above on.
        """
        on: float | tuple[float, ...] | None = self.on
        if on is None and multi_label:
            fitted = None if calibration is None else calibration.thresholds
            on = fitted or DEFAULT_THRESHOLD
        if on is None:
            return None
        pair = []
        for name, value in (("on", on), ("off", on if self.off is None else self.off)):
            array = np.asarray(value, np.float64)
            if array.shape not in ((), (classes,)):
                raise UsageError(f"{array.size} thresholds {name}= for {classes} classes")
            pair.append(np.broadcast_to(array, (classes,)))
        if np.any(pair[1] > pair[0]):
            raise UsageError("a class cannot end above where it begins: give off= at most on=")
        return pair[0], pair[1]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a file with one class.

    Attributes:
        start: seconds.
        end: seconds.
        label: the class, "unsure" where `unsure`.
        probability: mean smoothed probability over its windows (not over closed gaps); of an
            unsure segment that of the most probable classes.
        unsure: several classes are possible.
    """

    start: float
    end: float
    label: str
    probability: float
    unsure: bool = False


@dataclasses.dataclass(frozen=True)
class Track:
    """The segments of one file.

    Attributes:
        path: the file.
        seconds: duration that was read.
        segments: ordered by start.
        cut: why reading ended before the end of the file, if it did.
        notes: what is odd with the file: silent, clipped, padded.
    """

    path: str
    seconds: float
    segments: tuple[Segment, ...]
    cut: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class _Run:
    """Consecutive windows of one class, in samples; `active` excludes closed gaps."""

    track: int
    start: int
    end: int
    active: int
    total: float

    def extend(self, other: _Run) -> None:
        self.end = other.end
        self.active += other.active
        self.total += other.total


class Segmenter:
    """Makes segments from the windows of one file; holds only the windows that smoothing needs.

    Args:
        classes: class names.
        rules: how windows become segments.
        size: samples of a window.
        step: samples between window starts.
        multi_label: any number of classes at a time, each in a track of its own.
        calibration: fitted on validation clips, if any.
    """

    def __init__(
        self,
        classes: Sequence[str],
        rules: SegmentationRules,
        *,
        size: int,
        step: int,
        multi_label: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        self.classes: tuple[str, ...] = tuple(classes)
        self.rules = rules
        self._size, self._step, self._multi = size, step, multi_label
        self._calibration = calibration
        self._neighbours = rules.count_neighbours(step)
        self._thresholds = rules.find_thresholds(len(classes), multi_label, calibration)
        self._rows: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self._first = self._next = self._count = 0  # windows: kept, to be decided, pushed
        self._active = np.zeros(len(classes), bool)
        self._runs: list[_Run] = []
        self._latest: dict[int, _Run] = {}

    def push(
        self, probabilities: Float[np.ndarray, "w c"], uncalibrated: Float[np.ndarray, "w c"]
    ) -> None:
        """Add the next windows: calibrated probabilities and those at temperature 1."""
        for pair in zip(probabilities, uncalibrated, strict=True):
            self._rows.append(pair)
            self._count += 1
            # The latest window always waits: the last one ends where the file ends.
            if self._next + max(self._neighbours, 1) < self._count:
                self._decide(self._find_border(self._next + 1))

    def finish(self, samples: int) -> tuple[Segment, ...]:
        """Return the segments of a file of `samples` samples."""
        while self._next < self._count:
            last = self._next + 1 == self._count
            self._decide(samples if last else self._find_border(self._next + 1))
        gap, shortest = (round(s * RATE) for s in (self.rules.gap, self.rules.min_duration))
        unsure = len(self.classes)
        tracks = range(unsure) if self._multi else [None]
        runs: list[_Run] = []
        for track in tracks:
            chosen = [run for run in self._runs if track in (None, run.track)]
            closed = close_gaps(chosen, gap, unsure)
            # Dropped segments leave gaps between those of a single-label track.
            kept = [run for run in closed if run.end - run.start >= shortest]
            runs += close_gaps(kept, gap, unsure) if track is None else kept
        return tuple(
            Segment(
                run.start / RATE,
                run.end / RATE,
                UNSURE if run.track == unsure else self.classes[run.track],
                run.total / run.active,
                run.track == unsure,
            )
            for run in sorted(runs, key=lambda run: (run.start, run.track))
        )

    def _find_border(self, window: int) -> int:
        """The sample where the time of a window begins."""
        return max(0, window * self._step + (self._size - self._step) // 2) if window else 0

    def _decide(self, end: int) -> None:
        """Add the classes of the next window, whose time ends at sample `end`, to runs."""
        window, start = self._next, self._find_border(self._next)
        while self._first < window - self._neighbours:
            self._rows.popleft()
            self._first += 1
        count = min(len(self._rows), window - self._first + 1 + self._neighbours)
        rows = [self._rows[i] for i in range(count)]
        probability, uncalibrated = (self._smooth([row[i] for row in rows]) for i in (0, 1))
        for track in self._find_tracks(probability, uncalibrated):
            p = float(probability.max() if track == len(probability) else probability[track])
            run = _Run(track, start, end, end - start, p * (end - start))
            before = self._latest.get(track)
            if before is not None and before.end == start:
                before.extend(run)
            else:
                self._runs.append(run)
                self._latest[track] = run
        self._next += 1

    def _smooth(self, rows: list[np.ndarray]) -> np.ndarray:
        if len(rows) == 1:
            return np.asarray(rows[0], np.float64)
        average = np.median if self.rules.kind == "median" else np.mean
        return average(np.stack(rows).astype(np.float64), axis=0)

    def _find_tracks(self, probability: np.ndarray, uncalibrated: np.ndarray) -> list[int]:
        """The classes of a window; the number of classes stands for "unsure"."""
        if not probability.any():  # without sound
            self._active = np.zeros(len(self.classes), bool)
            return []
        if self._thresholds is not None:
            on, off = self._thresholds
            reached: Bool[np.ndarray, " c"] = probability >= np.where(self._active, off, on)
            if not self._multi:
                reached &= np.arange(len(reached)) == probability.argmax()
            self._active = reached
            found = np.flatnonzero(reached).tolist()
            return found if found or self._multi else [len(probability)]
        if self._calibration is not None:
            sets = decide(probability[None], uncalibrated[None], self._calibration)
            if sets.unsure[0]:
                return [len(probability)]
        return [int(probability.argmax())]


def close_gaps(runs: Iterable[_Run], gap: int, unsure: int) -> list[_Run]:
    """Join runs of one class, ordered by time, that are at most `gap` samples apart.

    Of runs of several classes, only those with nothing but silence or `unsure` in between.
    """
    closed: list[_Run] = []
    for run in runs:
        before = closed[-1] if closed else None
        if before is not None and before.track == unsure != run.track and len(closed) > 1:
            before = closed[-2]
        if before is not None and before.track == run.track and run.start - before.end <= gap:
            while closed[-1] is not before:
                closed.pop()
            before.extend(run)
        else:
            closed.append(dataclasses.replace(run))
    return closed
