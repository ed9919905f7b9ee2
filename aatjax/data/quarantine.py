"""The quarantine file: clips that cannot be used, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from aatjax.audio.decode import AudioError
from aatjax.data.source import Clip
from aatjax.io.atomic import report_write_errors, write_text


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
    except ValueError:
        return None
    return record.get("path") if isinstance(record, dict) else None
