"""Findings of the data checks with their severity, as text and as JSON."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aatjax.errors import DataError, printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MOST_SHOWN = 5
NARROWEST = 20

KINDS: dict[str, tuple[Severity, str]] = {
    # error: training refuses the set
    "refused": ("error", "training refuses the set"),
    "row": ("error", "wrong rows of the manifest"),
    "one-class": ("error", "a set of one class: there is nothing to classify"),
    "no-fold": ("error", "clips without a fold in a set with folds; the folds cannot be used"),
    "source-in-parts": ("error", "recordings or speakers in more than one part"),
    # warning: training omits the clip, or uses it and the model is probably worse for it, or a
    # metric measured on the set is too high
    "undecodable": ("warning", "files that cannot be decoded; training omits them"),
    "non-finite": ("warning", "files with NaN or infinite samples; training omits them"),
    "truncated": ("warning", "files cut short; training omits them without --data.truncated keep"),
    "unscaled": ("warning", "files beyond 4 times full scale, such as integers saved as floats"),
    "duplicate-across": ("warning", "pairs of identical clips in different parts"),
    "near-duplicate-across": ("warning", "pairs of nearly identical clips in different parts"),
    "skipped": ("warning", "entries omitted when the set was opened"),
    "too-short": ("warning", "clips shorter than one frame of 25 ms, padded to it"),
    "silent": ("warning", "clips without any sound"),
    "clipped": ("warning", "clips with 0.1 % or more of the samples at or beyond full scale"),
    "cancels": ("warning", "clips whose channels cancel when mixed"),
    "high-band": ("warning", "clips with most of the energy above 8 kHz, beyond the mel bands"),
    "padding": ("warning", "more than half of the model's input is padding"),
    "duplicate": ("warning", "pairs of identical clips in the same part"),
    "label-conflict": ("warning", "pairs of the same sound with different labels"),
    "wrong-label": ("warning", "clips that resemble another class more; listen to them"),
    "few-clips": ("warning", "classes with fewer than 5 clips"),
    "imbalance": ("warning", "classes with less than a tenth of the clips of the largest"),
    "absent-class": ("warning", "classes absent from a part of the set"),
    "level": ("warning", "speakers or parts far softer or louder than the others: --augment.gain"),
    # note: for information
    "other-files": ("note", "entries of the folder that are not audio files"),
    "extension": ("note", "files of another format than their extension; decoded by content"),
    "near-duplicate": ("note", "pairs of nearly identical clips in the same part"),
    "offset": ("note", "clips with a DC offset above 5 % of full scale; the features remove it"),
    "quiet": ("note", "clips that never exceed -50 dB of full scale"),
    "rates": ("note", "different sampling rates; check that no class is recognisable by its rate"),
    "low-rate": ("note", "clips sampled below 16 kHz: the upper mel bands are empty"),
    "cut": ("note", "more than a tenth of the sound is beyond the model's input"),
}
"""Every kind of finding: its severity, and its meaning."""


@dataclass(frozen=True, slots=True)
class Item:
    """One case of a finding.

    Attributes:
        subject: a clip id, row, class, recording, or two clip ids joined by ' = '.
        detail: the evidence.
        clips: ids of the clips concerned.
    """

    subject: str
    detail: str = ""
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """All cases of one kind.

    Attributes:
        kind: one of `KINDS`.
        items: the cases, the most certain first where they can be ordered.
    """

    kind: str
    items: tuple[Item, ...]

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind][0]

    @property
    def message(self) -> str:
        return KINDS[self.kind][1]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "message": self.message,
            "count": len(self.items),
            "items": [asdict(item) for item in self.items],
        }


@dataclass(frozen=True, slots=True)
class ClipMeasurements:
    """Measurements of one clip; None where it could not be decoded.

    Attributes:
        id, path: the clip and its file.
        problem, detail: why it cannot be used or is incomplete: a kind of finding, and the
            reason in words; both empty where there is none.
        format, rate, channels: of the file, by its content; the rate in Hz.
        seconds: length at 16 kHz, and `short`, its samples, of a clip shorter than one frame.
        peak, offset: largest absolute and mean sample, 1 at full scale.
        level: root mean square in dB of full scale; -inf is given as -200.
        full_scale: share of the samples at or beyond full scale.
        silence: share of 25 ms frames below -60 dB of full scale.
        high: share of the energy above 8 kHz.
        kept: energy of the mix relative to that of the channels; near 0 where they cancel.
        padding, beyond: share of the model's input that is padding; seconds beyond the input.
        constant: whether all samples are equal.
    """

    id: str
    path: str | None
    problem: str = ""
    detail: str = ""
    format: str | None = None
    seconds: float | None = None
    rate: int | None = None
    channels: int | None = None
    peak: float | None = None
    level: float | None = None
    full_scale: float | None = None
    offset: float | None = None
    silence: float | None = None
    high: float | None = None
    kept: float | None = None
    padding: float | None = None
    beyond: float | None = None
    constant: bool = False
    short: int | None = None


@dataclass(frozen=True)
class LabelCheck:
    """Outcome of the search for wrong labels.

    Attributes:
        done: whether the labels were checked.
        why: why not, or which clips were omitted.
        base: the weights of the embeddings.
        judged: number of clips checked.
        agreement: share of them whose most probable class, held out, is their label.
        precision, recall: of the search, for labels changed on purpose.
    """

    done: bool = False
    why: str = ""
    base: str | None = None
    judged: int = 0
    agreement: float | None = None
    precision: float | None = None
    recall: float | None = None

    def text(self) -> str:
        """The outcome in one line."""
        if not self.done:
            return f"not checked: {self.why}"
        text = f"{self.judged} clips checked with {self.base} embeddings"
        if self.agreement is not None:
            text += f", {_percent(self.agreement)} of them predicted as labelled"
        if self.precision is not None:
            text += (
                f"; of labels changed on purpose {_percent(self.recall)} are found, and "
                f"{_percent(self.precision)} of the clips then listed are such"
            )
        return f"{text}; {self.why}" if self.why else text


@dataclass(frozen=True)
class Diagnosis:
    """Everything found in a data set.

    Attributes:
        name: of the set.
        frames: input length of the model in 10 ms frames.
        classes: clips per class.
        parts: clips per fold or split; empty where the set is not divided.
        measurements: of each clip.
        findings: errors first.
        labels: outcome of the search for wrong labels.
        groups: the number of recordings or speakers in words; empty where none is known.
    """

    name: str
    frames: int
    classes: dict[str, int]
    parts: dict[str, int]
    measurements: tuple[ClipMeasurements, ...]
    findings: tuple[Finding, ...]
    labels: LabelCheck = field(default_factory=LabelCheck)
    groups: str = ""

    def counts(self) -> dict[str, int]:
        """Cases of each severity."""
        return {
            severity: sum(len(f.items) for f in self.findings if f.severity == severity)
            for severity in SEVERITIES
        }

    def cases(self, kind: str) -> tuple[Item, ...]:
        """The cases of one kind; empty where there are none."""
        return next((f.items for f in self.findings if f.kind == kind), ())

    @property
    def refusal(self) -> str | None:
        """The sentence with which training refuses the set; None where it does not."""
        return next((item.detail for item in self.cases("refused")), None)

    def exit_code(self, *, strict: bool = False, ignore: Collection[str] = ()) -> int:
        """65 where there is an error, 1 with `strict` and a warning, of a kind not ignored."""
        severities = {f.severity for f in self.findings if f.kind not in ignore}
        if "error" in severities:
            return DataError.exit_code
        return int(strict and "warning" in severities)

    def summary(self) -> dict[str, Any]:
        """Statistics of the whole set: lengths in seconds, shares from 0 to 1."""
        readable = [m for m in self.measurements if m.seconds is not None]
        lengths = sorted(m.seconds for m in readable if m.seconds is not None)
        return {
            "clips": len(self.measurements),
            "readable": len(readable),
            "seconds": _round(sum(lengths)),
            "shortest": _round(lengths[0]) if lengths else None,
            "median": _round(lengths[len(lengths) // 2]) if lengths else None,
            "longest": _round(lengths[-1]) if lengths else None,
            "rates": _count(m.rate for m in readable),
            "channels": _count(m.channels for m in readable),
            "formats": _count(m.format for m in readable),
            "silence": _mean(m.silence for m in readable),
            "above_8_khz": _mean(m.high for m in readable),
            "padding": _mean(m.padding for m in readable),
            "beyond_input_seconds": _round(sum(m.beyond or 0.0 for m in readable)),
        }

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with every finding, every case and the measurements of every clip."""
        return {
            "name": self.name,
            "frames": self.frames,
            "counts": self.counts(),
            "summary": self.summary(),
            "classes": self.classes,
            "parts": self.parts,
            "groups": self.groups,
            "labels": asdict(self.labels),
            "findings": [finding.to_json() for finding in self.findings],
            "clips": [
                {k: _round(v) if isinstance(v, float) else v for k, v in asdict(m).items()}
                for m in self.measurements
            ],
        }

    def text(self, *, width: int | None = None, most: int = MOST_SHOWN) -> str:
        """The findings as text, in lines of at most `width` columns.

        Args:
            width: columns; by default those of the terminal, or 80.
            most: cases shown per finding.
        """
        width = max(NARROWEST, width or shutil.get_terminal_size().columns)
        lines = _table([], self._list_statistics(), width)
        if self.findings:
            rows = [[f.severity, f.kind, str(len(f.items))] for f in self.findings]
            lines += ["", *_table(["severity", "finding", "cases"], rows, width), ""]
        for finding in self.findings:
            count = len(finding.items)
            head = f"{finding.severity}: {finding.kind} ({count}): {finding.message}"
            lines += _wrap(head, width, "")
            for item in finding.items[:most]:
                text = ": ".join(printable(part) for part in (item.subject, item.detail) if part)
                lines += _wrap(text, width, "  ")
            if count > most:
                lines += _wrap(f"and {count - most} more", width, "  ")
        counts = self.counts()
        total = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items())
        return "\n".join([*lines, "", *_wrap(total, width, "")])

    def _list_statistics(self) -> list[list[str]]:
        found = self.summary()
        rows = {"set": f"{printable(self.name)}: {found['clips']} clips"}
        if found["readable"]:
            rows |= {
                "length": f"{found['shortest']:.2f} to {found['longest']:.2f} s, median "
                f"{found['median']:.2f} s, {found['seconds'] / 60:.1f} min in total",
                "rates": _list_counts(found["rates"], " Hz"),
                "channels": _list_counts(found["channels"]),
                "formats": _list_counts(found["formats"]),
                "silence": f"{_percent(found['silence'])} of the sound is below -60 dB",
                "high band": f"{_percent(found['above_8_khz'])} of the energy is above 8 kHz",
                "padding": f"{_percent(found['padding'])} of an input of {self.frames} frames",
            }
        sizes = sorted(self.classes.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = ", ".join(f"{printable(name)} {count}" for name, count in sizes[:20])
        more = f" and {len(sizes) - 20} more" if len(sizes) > 20 else ""
        rows["classes"] = f"{len(sizes)}: {shown}{more}"
        if self.parts:
            parts = ", ".join(f"{printable(part)} {count}" for part, count in self.parts.items())
            rows["parts"] = parts
        if self.groups:
            rows["groups"] = self.groups
        rows["labels"] = self.labels.text()
        return [list(row) for row in rows.items()]


def _round(value: float) -> float:
    return round(value, 6)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _round(sum(known) / len(known)) if known else None


def _count(values: Iterable[object]) -> dict[str, int]:
    counts = Counter(str(value) for value in values if value is not None)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _list_counts(counts: dict[str, int], unit: str = "") -> str:
    return ", ".join(f"{name}{unit} ({count})" for name, count in counts.items()) or "unknown"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def _table(heads: list[str], rows: list[list[str]], width: int) -> list[str]:
    """Columns side by side, the last one wrapped; one cell a line where that leaves no room."""
    every = [heads, *rows] if heads else rows
    widths = [max(len(row[k]) for row in every) for k in range(len(every[0]) - 1)]
    left = sum(widths) + 2 * len(widths)
    lines: list[str] = []
    for row in every:
        if width - left < min(24, max(len(r[-1]) for r in every)):
            lines += _wrap(" ".join(row), width, "")
            continue
        *cells, last = row
        start = "".join(cell.ljust(w + 2) for cell, w in zip(cells, widths, strict=True))
        lines += textwrap.wrap(last, width, initial_indent=start, subsequent_indent=" " * left) or [
            start.rstrip()
        ]
    return lines


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
    )
