"""Text formats of segments: table, CSV, JSON, Audacity labels, RTTM."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Literal, get_args

from aatjax.errors import UsageError, printable
from aatjax.inference.segmentation import Track
from aatjax.io.csv_text import escape_path, format_csv_rows

SegmentFormat = Literal["table", "csv", "json", "audacity", "rttm"]


def format_segments(track: Track, form: SegmentFormat, *, first: bool = True) -> str:
    """Return a file's segments as text that can follow that of another file.

    JSON (one object per line and file) holds names unchanged, CSV as in `aatjax.io.csv_text`; a
    table escapes them. RTTM has no spaces in a field: each becomes "_". An Audacity label track has
    no file names; tabs and line breaks in labels become spaces.

    Args:
        track: segments of one file.
        form: 'table', 'csv', 'json', 'audacity' or 'rttm'.
        first: with the header, where the format has one.
    """
    match form:
        case "table":
            return _format_table(track)
        case "csv":
            return _format_csv(track, first)
        case "json":
            fields = dataclasses.asdict(track)
            if track.cut is None:
                del fields["cut"]
            return json.dumps(fields) + "\n"
        case "audacity":
            return "".join(
                f"{s.start:.6f}\t{s.end:.6f}\t{_remove_controls(s.label)}\n" for s in track.segments
            )
        case "rttm":
            name = format_rttm_field(track.path)
            return "".join(
                f"SPEAKER {name} 1 {s.start:.3f} {s.end - s.start:.3f} <NA> <NA> "
                f"{format_rttm_field(s.label)} <NA> <NA>\n"
                for s in track.segments
            )
        case _:
            raise UsageError(f"format {form!r} is not one of {', '.join(get_args(SegmentFormat))}")


def format_rttm_field(text: str) -> str:
    """Return a name as one RTTM field: white space becomes "_", an empty name <NA>."""
    return re.sub(r"\s", "_", text) or "<NA>"


def format_clock(seconds: float) -> str:
    """Return seconds as 1:02:03.45."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _remove_controls(label: str) -> str:
    return "".join(c if c.isprintable() else " " for c in label)


def _format_table(track: Track) -> str:
    count = len(track.segments)
    plural = "" if count == 1 else "s"
    lines = [f"{printable(track.path)}  {format_clock(track.seconds)}, {count} segment{plural}"]
    width = max((len(format_clock(s.end)) for s in track.segments), default=0)
    lines += [
        f"  {format_clock(s.start):>{width}}  {format_clock(s.end):>{width}}  "
        f"{s.probability:.3f}  {printable(s.label)}"
        for s in track.segments
    ]
    return "".join(f"{line}\n" for line in lines)


def _format_csv(track: Track, first: bool) -> str:
    head = ["file", "start", "end", "label", "probability", "unsure"]
    rows: list[Sequence[object]] = [head] if first else []
    for s in track.segments:
        times = f"{s.start:.6f}", f"{s.end:.6f}"
        sure = f"{s.probability:.6f}", int(s.unsure)
        rows.append([escape_path(track.path), *times, s.label, *sure])
    return format_csv_rows(rows)
