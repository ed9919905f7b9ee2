"""What the doctor says: findings with their severity, as a table and as JSON."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aatjax.errors import printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MOST_SHOWN = 5
NARROWEST = 20

KINDS: dict[str, tuple[Severity, str]] = {
    # error: training stops, leaves the clip out, or a figure measured on the set is too high
    "row": ("error", "wrong rows of the manifest; training refuses the file"),
    "undecodable": ("error", "files that cannot be read as sound; training leaves them out"),
    "non-finite": ("error", "files with NaN or infinite samples; training leaves them out"),
    "truncated": ("error", "files cut short; training leaves them out unless told to keep them"),
    "unscaled": ("error", "files beyond 4 times full scale, as integers saved as floats are"),
    "one-class": ("error", "a set of one class; there is nothing to tell apart"),
    "no-fold": ("error", "clips without a fold where others have one; folds cannot be used"),
    "source-in-parts": ("error", "recordings or speakers that lie in more than one part"),
    "duplicate-across": ("error", "pairs of identical clips in different parts"),
    "near-duplicate-across": ("error", "pairs of nearly the same sound in different parts"),
    # warning: it is trained on as it is, probably to no good
    "skipped": ("warning", "entries left out when the set was opened"),
    "too-short": ("warning", "clips shorter than one frame of 25 ms, padded to it"),
    "silent": ("warning", "clips that hold no sound at all"),
    "clipped": ("warning", "clips with 0.1 % or more of the samples at or beyond full scale"),
    "cancels": ("warning", "clips whose channels cancel when they are mixed"),
    "high-band": ("warning", "clips with most of the energy above 8 kHz, which no model hears"),
    "padding": ("warning", "more than half of the model's input is padding"),
    "duplicate": ("warning", "pairs of identical clips in the same part"),
    "label-conflict": ("warning", "pairs of the same sound with different labels"),
    "wrong-label": ("warning", "clips that sound more like another class; listen to them"),
    "few-clips": ("warning", "classes of fewer than 5 clips"),
    "imbalance": ("warning", "classes of less than a tenth of the largest"),
    "absent-class": ("warning", "classes absent from a part of the set"),
    # note: good to know
    "other-files": ("note", "other entries of the folder, which are not sound that is looked for"),
    "extension": ("note", "files of another format than their name says; read all the same"),
    "near-duplicate": ("note", "pairs of nearly the same sound in the same part"),
    "offset": ("note", "clips with a constant part above 5 % of full scale; features remove it"),
    "quiet": ("note", "clips that never exceed -50 dB of full scale"),
    "rates": ("note", "sampling rates differ; make sure that no class is known by its rate"),
    "low-rate": ("note", "clips with a rate below 16 kHz: the upper mel bands are empty"),
    "cut": ("note", "more than a tenth of the sound lies beyond the model's input"),
}
"""Every kind of finding: its severity, and what it means."""


@dataclass(frozen=True, slots=True)
class Item:
    """One case of a finding.

    Attributes:
        subject: a clip id, row, class, recording, or two clip ids joined by ' = '.
        detail: what was seen.
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
        items: the cases, the surest first where they can be ordered.
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
            "items": [
                {"subject": i.subject, "detail": i.detail, "clips": list(i.clips)}
                for i in self.items
            ],
        }


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured of one clip; None where it could not be.

    Attributes:
        id: the clip.
        path: its file.
        problem: why it cannot be used, or what is missing of it; the kind of a finding, or ''.
        detail: the problem in words.
        format: of the file by its content, such as 'wav'.
        seconds: length at 16 kHz.
        rate: sampling rate of the file in Hz.
        channels: channels of the file.
        peak: largest absolute sample, 1 at full scale.
        level: root mean square in dB of full scale; -inf is given as -200.
        full_scale: share of the samples at or beyond full scale.
        offset: mean sample, as a share of full scale.
        silence: share of 25 ms stretches below -60 dB of full scale.
        high: share of the energy above 8 kHz.
        kept: energy of the mix relative to that of the channels; near 0 where they cancel.
        padding: share of the model's input that is padding.
        unheard: seconds beyond the model's input.
        constant: whether all samples are equal.
        short: samples at 16 kHz of a clip shorter than one frame, else None.
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
    unheard: float | None = None
    constant: bool = False
    short: int | None = None


@dataclass(frozen=True)
class LabelCheck:
    """How the labels were looked at.

    Attributes:
        done: whether they were.
        why: why not, or what is left out.
        base: the weights that the embeddings are from.
        judged: clips that were judged.
        agreement: share of them whose most probable class, out of fold, is their label.
    """

    done: bool = False
    why: str = ""
    base: str | None = None
    judged: int = 0
    agreement: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        name: of the set.
        frames: input length of the model in 10 ms frames.
        classes: clips of each class.
        parts: clips of each fold or split; empty where the set is not divided.
        measures: of each clip.
        findings: errors first.
        labels: how the labels were looked at.
    """

    name: str
    frames: int
    classes: dict[str, int]
    parts: dict[str, int]
    measures: tuple[Measures, ...]
    findings: tuple[Finding, ...]
    labels: LabelCheck = field(default_factory=LabelCheck)

    def counts(self) -> dict[str, int]:
        """Cases of each severity."""
        return {
            severity: sum(len(f.items) for f in self.findings if f.severity == severity)
            for severity in SEVERITIES
        }

    def of(self, kind: str) -> tuple[Item, ...]:
        """The cases of one kind; empty where there are none."""
        return next((f.items for f in self.findings if f.kind == kind), ())

    def exit_code(self, *, strict: bool = False, ignore: Collection[str] = ()) -> int:
        """1 if there is an error, or with `strict` a warning, of a kind not ignored; else 0."""
        bad = ("error", "warning") if strict else ("error",)
        return int(any(f.severity in bad and f.kind not in ignore for f in self.findings))

    def summary(self) -> dict[str, Any]:
        """Figures of the whole set: lengths in seconds, shares from 0 to 1."""
        heard = [m for m in self.measures if m.seconds is not None]
        lengths = sorted(m.seconds for m in heard if m.seconds is not None)
        return {
            "clips": len(self.measures),
            "readable": len(heard),
            "seconds": _round(sum(lengths)),
            "shortest": _round(lengths[0]) if lengths else None,
            "median": _round(lengths[len(lengths) // 2]) if lengths else None,
            "longest": _round(lengths[-1]) if lengths else None,
            "rates": _tally(m.rate for m in heard),
            "channels": _tally(m.channels for m in heard),
            "formats": _tally(m.format for m in heard),
            "silence": _mean(m.silence for m in heard),
            "above_8_khz": _mean(m.high for m in heard),
            "padding": _mean(m.padding for m in heard),
            "unheard_seconds": _round(sum(m.unheard or 0.0 for m in heard)),
        }

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with every finding, every case and the measures of every clip."""
        return {
            "name": self.name,
            "frames": self.frames,
            "counts": self.counts(),
            "summary": self.summary(),
            "classes": self.classes,
            "parts": self.parts,
            "labels": asdict(self.labels),
            "findings": [finding.to_json() for finding in self.findings],
            "clips": [
                {k: _round(v) if isinstance(v, float) else v for k, v in asdict(m).items()}
                for m in self.measures
            ],
        }

    def text(self, *, width: int | None = None, most: int = MOST_SHOWN) -> str:
        """The same to be read, in lines of at most `width` columns.

        Args:
            width: columns; by default those of the terminal, 80 where there is none.
            most: cases shown of each finding.
        """
        width = max(NARROWEST, width or shutil.get_terminal_size().columns)
        lines = _table([], self._figures(), width)
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

    def _figures(self) -> list[list[str]]:
        figures = self.summary()
        rows = [["set", f"{printable(self.name)}: {figures['clips']} clips"]]
        if figures["readable"]:
            rows += [
                [
                    "length",
                    f"{figures['shortest']:.2f} to {figures['longest']:.2f} s, median "
                    f"{figures['median']:.2f} s, {figures['seconds'] / 60:.1f} min in all",
                ],
                ["rates", _listed(figures["rates"], " Hz")],
                ["channels", _listed(figures["channels"])],
                ["formats", _listed(figures["formats"])],
                ["silence", f"{_percent(figures['silence'])} of the sound is below -60 dB"],
                ["high band", f"{_percent(figures['above_8_khz'])} of the energy is above 8 kHz"],
                ["padding", f"{_percent(figures['padding'])} of an input of {self.frames} frames"],
            ]
        sizes = sorted(self.classes.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = ", ".join(f"{printable(name)} {count}" for name, count in sizes[:20])
        more = f" and {len(sizes) - 20} more" if len(sizes) > 20 else ""
        rows.append(["classes", f"{len(sizes)}: {shown}{more}"])
        if self.parts:
            parts = ", ".join(f"{printable(part)} {count}" for part, count in self.parts.items())
            rows.append(["parts", parts])
        if self.labels.done:
            judged = f"{self.labels.judged} clips judged by {self.labels.base}"
            if self.labels.agreement is not None:
                judged += f", which tells {_percent(self.labels.agreement)} of them as labelled"
            rows.append(["labels", judged + (f"; {self.labels.why}" if self.labels.why else "")])
        else:
            rows.append(["labels", f"not looked at: {self.labels.why}"])
        return rows


def _round(value: float) -> float:
    return round(value, 6)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _round(sum(known) / len(known)) if known else None


def _tally(values: Iterable[object]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        if value is not None:
            counts[str(value)] = counts.get(str(value), 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _listed(counts: dict[str, int], unit: str = "") -> str:
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
