"""The quarantine file: clips that cannot be used, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from aatjax.audio.decode import AudioError
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError, UsageError
from aatjax.io.atomic import report_write_errors, write_text

MOST_SHOWN = 5


def write_quarantine(
    path: Path, clips: Iterable[Clip], bad: Sequence[tuple[Clip, AudioError]]
) -> None:
    """Replace the entries of these clips in a quarantine file; without failures it is not created.

    Args:
        path: JSON-lines file of path, id, reason and detail.
        clips: every clip that was tried; entries for other files stay.
        bad: the clips that failed, with their errors.

    Raises:
        WriteError: the file cannot be read or written.
    """
    tried = {clip.path for clip in clips}
    lines: list[str] = []
    if path.exists():
        with report_write_errors(path):
            old = path.read_text("utf-8", errors="replace").split("\n")
        lines = [line for line in old if line.strip() and _parse_path(line) not in tried]
    elif not bad:
        return
    lines += [
        json.dumps({"path": c.path, "id": c.id, "reason": e.reason, "detail": str(e)})
        for c, e in bad
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _parse_path(line: str) -> object:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    path = record.get("path") if isinstance(record, dict) else None
    return path if isinstance(path, str) else None


def check_failures(source: Source, errors: Sequence[str], max_bad: float | int) -> None:
    """Refuse a set of which too many clips cannot be used.

    Args:
        source: the set.
        errors: why, for each clip that cannot.
        max_bad: how many may fail, as in `decode_all`.

    Raises:
        DataError: more than `max_bad`, or all.
        UsageError: `max_bad` out of range.
    """
    allowed = count_allowed(max_bad, len(source))
    if len(errors) > allowed or len(errors) == len(source):
        shown = "; ".join(errors[:MOST_SHOWN])
        more = f"; and {len(errors) - MOST_SHOWN} more" if len(errors) > MOST_SHOWN else ""
        raise DataError(
            f"{source.name}: {len(errors)} of {len(source)} clips cannot be used and "
            f"{min(allowed, len(source) - 1)} may fail: {shown}{more}; fix or remove them, or "
            "raise --data.max-bad"
        )


def count_allowed(max_bad: float | int, clips: int) -> int:
    """Return how many of a number of clips may fail.

    Raises:
        UsageError: `max_bad` out of range.
    """
    number = isinstance(max_bad, int) and not isinstance(max_bad, bool)
    if isinstance(max_bad, bool) or max_bad < 0 or (not number and not max_bad <= 1):
        raise UsageError(
            f"max_bad is {max_bad!r}; give a share from 0.0 to 1.0 or a whole number of clips"
        )
    return int(max_bad) if number else int(round(max_bad * clips, 9))
