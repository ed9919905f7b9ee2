"""From windows to segments: smoothing over time, thresholds, short ones dropped, gaps closed.

A window stands for the time around its centre: the border between two windows lies half-way
between their centres, so windows that do not overlap stand for just what they span.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from aatjax.errors import UsageError, printable
from aatjax.inference.calibration import DEFAULT_THRESHOLD, Calibration, decide
from aatjax.inference.classifier import RATE

UNSURE = "unsure"
Smoothing = Literal["median", "mean"]
Format = Literal["table", "csv", "json", "audacity", "rttm"]
_SLACK = 1e-6  # of a window or a second: 3 * 0.1 is three tenths


@dataclasses.dataclass(frozen=True)
class Rules:
    """How windows become segments.

    Attributes:
        smooth: seconds over which probabilities are smoothed, 0 for not at all. The odd number of
            windows that fits in counts, at the ends of a file as many of them as there are.
        kind: 'median' or 'mean' of those windows, each class by itself.
        on: probability from which on a class begins, one for all or one a class. None takes the
            thresholds of the artefact, 0.5 of a multi-label one without; of a single-label one the
            most probable class is given, and "unsure" where several are possible.
        off: probability below which a class that has begun ends; None: the same as `on`.
        min_duration: shorter segments (seconds) are left out, after gaps were closed.
        gap: two segments of a class that are at most so far apart (seconds) become one. Of a
            single-label task only where no other class was heard in between.
    """

    smooth: float = 0.0
    kind: Smoothing = "median"
    on: float | tuple[float, ...] | None = None
    off: float | tuple[float, ...] | None = None
    min_duration: float = 0.0
    gap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("smooth", "min_duration", "gap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name}={value} must be a number of seconds, 0 or more")
        if self.kind not in get_args(Smoothing):
            raise UsageError(f"kind={self.kind!r} is not 'median' or 'mean'")
        for name in ("on", "off"):
            value = getattr(self, name)
            if value is not None and not np.all(
                (np.asarray(value) >= 0) & (np.asarray(value) <= 1)
            ):
                raise UsageError(f"threshold {name}={value} must lie between 0 and 1")
        if self.off is not None and self.on is None:
            raise UsageError("a threshold off= needs one on=: give both")

    def half(self, step: int) -> int:
        """Windows on each side that smoothing takes in, for `step` samples between windows.

        Raises:
            UsageError: so few seconds that nothing would be smoothed.
        """
        half = int(self.smooth * RATE / step / 2 + _SLACK)
        if self.smooth > 0 and half == 0:
            raise UsageError(
                f"smoothing over {self.smooth:g} s does nothing to windows every {step / RATE:g} "
                f"s: give at least {2 * step / RATE:g} s, or a smaller hop"
            )
        return half

    def thresholds(
        self, classes: int, multi_label: bool, calibration: Calibration | None
    ) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]] | None:
        """Where each class begins and ends; None where the most probable one is taken.

        Raises:
            UsageError: a wrong number of thresholds, or one where a class ends above its begin.
        """
        on: float | tuple[float, ...] | None = self.on
        if on is None and multi_label:
            on = (
                DEFAULT_THRESHOLD
                if calibration is None or not calibration.thresholds
                else calibration.thresholds
            )
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
    """A stretch of a file in which a class was heard.

    Attributes:
        start: seconds.
        end: seconds.
        label: the class, "unsure" where `unsure`.
        probability: its mean over the windows in which it was heard, smoothed; of an unsure
            stretch that of the most probable classes.
        unsure: the decision was that several classes are possible.
    """

    start: float
    end: float
    label: str
    probability: float
    unsure: bool = False


@dataclasses.dataclass(frozen=True)
class Track:
    """What was heard in one file.

    Attributes:
        path: the file.
        seconds: how much of it was heard.
        segments: by their start.
        cut: why reading ended before the end of the file, if it did.
    """

    path: str
    seconds: float
    segments: tuple[Segment, ...]
    cut: str | None = None


@dataclasses.dataclass
class _Run:
    """Consecutive windows of one class; samples. `heard` leaves out what gaps added."""

    track: int
    start: int
    end: int
    heard: int
    total: float

    def take(self, other: _Run) -> None:
        self.end = other.end
        self.heard += other.heard
        self.total += other.total


class Segmenter:
    """Takes the windows of one file as they come and keeps only what smoothing needs.

    Args:
        classes: class names.
        rules: how windows become segments.
        size: samples of a window.
        step: samples between window starts.
        multi_label: any number of classes at a time, a track each.
        calibration: what validation clips told, if anything.
    """

    def __init__(
        self,
        classes: Sequence[str],
        rules: Rules,
        *,
        size: int,
        step: int,
        multi_label: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.rules = rules
        self._size, self._step, self._multi = size, step, multi_label
        self._calibration = calibration
        self._half = rules.half(step)
        self._thresholds = rules.thresholds(len(classes), multi_label, calibration)
        self._rows: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self._first = self._next = self._count = 0  # windows: kept, to be decided, seen
        self._active = np.zeros(len(classes), bool)
        self._runs: list[_Run] = []
        self._latest: dict[int, _Run] = {}

    def push(
        self, probabilities: Float[np.ndarray, "w c"], plain: Float[np.ndarray, "w c"]
    ) -> None:
        """Takes the next windows: calibrated probabilities and those at temperature 1."""
        for pair in zip(probabilities, plain, strict=True):
            self._rows.append(pair)
            self._count += 1
            # One window is always held back: the last one ends where the file ends.
            if self._next + max(self._half, 1) < self._count:
                self._decide(self._border(self._next + 1))

    def finish(self, samples: int) -> tuple[Segment, ...]:
        """The segments of a file of `samples` samples."""
        while self._next < self._count:
            last = self._next + 1 == self._count
            self._decide(samples if last else self._border(self._next + 1))
        gap, shortest = (
            round(seconds * RATE) for seconds in (self.rules.gap, self.rules.min_duration)
        )
        unsure = len(self.classes)
        if self._multi:
            runs = [
                run
                for track in range(unsure)
                for run in close([run for run in self._runs if run.track == track], gap)
            ]
            runs = [run for run in runs if run.end - run.start >= shortest]
        else:
            runs = close(self._runs, gap, unsure)
            runs = [run for run in runs if run.end - run.start >= shortest]
            runs = close(runs, gap, unsure)
        return tuple(
            Segment(
                run.start / RATE,
                run.end / RATE,
                UNSURE if run.track == unsure else self.classes[run.track],
                run.total / run.heard,
                run.track == unsure,
            )
            for run in sorted(runs, key=lambda run: (run.start, run.track))
        )

    def _border(self, window: int) -> int:
        """Where the time of a window begins, in samples."""
        return max(0, window * self._step + (self._size - self._step) // 2) if window else 0

    def _decide(self, end: int) -> None:
        """Classes of the next window, whose time ends at sample `end`, into runs."""
        window, start = self._next, self._border(self._next)
        while self._first < window - self._half:
            self._rows.popleft()
            self._first += 1
        rows = [
            self._rows[i]
            for i in range(min(len(self._rows), window - self._first + 1 + self._half))
        ]
        probability, plain = (self._smoothed([row[i] for row in rows]) for i in (0, 1))
        for track in self._tracks(probability, plain):
            p = float(probability.max() if track == len(probability) else probability[track])
            run = _Run(track, start, end, end - start, p * (end - start))
            before = self._latest.get(track)
            if before is not None and before.end == start:
                before.take(run)
            else:
                self._runs.append(run)
                self._latest[track] = run
        self._next += 1

    def _smoothed(self, rows: list[np.ndarray]) -> np.ndarray:
        if len(rows) == 1:
            return np.asarray(rows[0], np.float64)
        mean = np.median if self.rules.kind == "median" else np.mean
        return mean(np.stack(rows).astype(np.float64), axis=0)

    def _tracks(self, probability: np.ndarray, plain: np.ndarray) -> list[int]:
        """The classes heard in a window; the number of classes stands for "unsure"."""
        if self._thresholds is not None:
            on, off = self._thresholds
            reached: Bool[np.ndarray, " c"] = probability >= np.where(self._active, off, on)
            if not self._multi:
                best = int(probability.argmax())
                reached &= np.arange(len(reached)) == best
            self._active = reached
            found = np.flatnonzero(reached).tolist()
            return found if found or self._multi else [len(probability)]
        if self._calibration is not None:
            applied = decide(probability[None], plain[None], self._calibration)
            if applied.unsure[0]:
                return [len(probability)]
        return [int(probability.argmax())]


def segment(
    probabilities: Float[np.ndarray, "w c"],
    classes: Sequence[str],
    rules: Rules,
    *,
    size: int,
    step: int,
    samples: int,
    multi_label: bool = False,
    calibration: Calibration | None = None,
    plain: Float[np.ndarray, "w c"] | None = None,
) -> tuple[Segment, ...]:
    """Segments of a whole track of windows at once; see `Segmenter`.

    Args:
        probabilities: calibrated, one row a window.
        classes: class names.
        rules: how windows become segments.
        size: samples of a window.
        step: samples between window starts.
        samples: of the file.
        multi_label: any number of classes at a time.
        calibration: what validation clips told, if anything.
        plain: probabilities at temperature 1, where they differ.
    """
    segmenter = Segmenter(
        classes, rules, size=size, step=step, multi_label=multi_label, calibration=calibration
    )
    segmenter.push(probabilities, probabilities if plain is None else plain)
    return segmenter.finish(samples)


def close(runs: Iterable[_Run], gap: int, unsure: int | None = None) -> list[_Run]:
    """Runs by time with those of one class that are at most `gap` samples apart made one.

    Of runs of several classes, only those with nothing but silence or "unsure" in between.
    """
    closed: list[_Run] = []
    for run in runs:
        before = closed[-1] if closed else None
        if before is not None and before.track == unsure != run.track and len(closed) > 1:
            before = closed[-2]
        if before is not None and before.track == run.track and run.start - before.end <= gap:
            while closed[-1] is not before:
                closed.pop()
            before.take(run)
        else:
            closed.append(dataclasses.replace(run))
    return closed


# --- written down --------------------------------------------------------------------------------


def written(track: Track, form: Format, *, first: bool = True) -> str:
    """A file's segments as text that can follow that of the file before.

    Names are whole in CSV (quoted where they must be) and JSON (one object a line and file). In a
    table they are escaped as in every line of text. RTTM has no spaces in a field: each becomes
    "_". An Audacity label track has no file names; tabs and line breaks in labels become spaces.

    Args:
        track: what was heard.
        form: 'table', 'csv', 'json', 'audacity' or 'rttm'.
        first: with the heading of the file, where the format has one.
    """
    match form:
        case "table":
            return _table(track)
        case "csv":
            return _csv(track, first)
        case "json":
            return json.dumps(_plain(track)) + "\n"
        case "audacity":
            return "".join(
                f"{s.start:.6f}\t{s.end:.6f}\t{_one_line(s.label)}\n" for s in track.segments
            )
        case "rttm":
            name = field(track.path)
            return "".join(
                f"SPEAKER {name} 1 {s.start:.3f} {s.end - s.start:.3f} <NA> <NA> "
                f"{field(s.label)} <NA> <NA>\n"
                for s in track.segments
            )
        case _:
            raise UsageError(f"format {form!r} is not one of {', '.join(get_args(Format))}")


def field(text: str) -> str:
    """A name as one RTTM field: every kind of space becomes "_"; nothing becomes <NA>."""
    return re.sub(r"\s", "_", text) or "<NA>"


def clock(seconds: float) -> str:
    """Seconds as 1:02:03.45."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _one_line(label: str) -> str:
    """A label without tabs, line breaks and other characters of control."""
    return "".join(c if c.isprintable() else " " for c in label)


def _table(track: Track) -> str:
    lines = [f"{printable(track.path)}  {clock(track.seconds)}, {len(track.segments)} segments"]
    width = max((len(clock(s.end)) for s in track.segments), default=0)
    lines += [
        f"  {clock(s.start):>{width}}  {clock(s.end):>{width}}  {s.probability:.3f}  "
        f"{''.join(map(_escaped, s.label))}"
        for s in track.segments
    ]
    return "".join(f"{line}\n" for line in lines)


def _escaped(c: str) -> str:
    return c if c.isprintable() else c.encode("unicode_escape").decode()


def _csv(track: Track, first: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if first:
        writer.writerow(["file", "start", "end", "label", "probability", "unsure"])
    for s in track.segments:
        writer.writerow(
            [
                track.path,
                f"{s.start:.6f}",
                f"{s.end:.6f}",
                s.label,
                f"{s.probability:.6f}",
                int(s.unsure),
            ]
        )
    return text.getvalue()


def _plain(track: Track) -> dict[str, object]:
    cut = {} if track.cut is None else {"cut": track.cut}
    return {
        "path": os.fspath(track.path),
        "seconds": track.seconds,
        **cut,
        "segments": [dataclasses.asdict(segment) for segment in track.segments],
    }
