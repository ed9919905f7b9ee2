"""The list of clips that cannot be used, and writing files so that they are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

from aatjax.audio.decode import AudioError
from aatjax.data.source import Clip
from aatjax.io.atomic import report_write_errors, write_text


def write_quarantine(path: Path, clips: list[Clip], bad: list[tuple[Clip, AudioError]]) -> None:
    """Replace what a quarantine file says about these clips; nothing is made of no failures.

    Raises:
        WriteError: the file cannot be read or written.
    """
    tried = {clip.path for clip in clips}
    kept: list[str] = []
    if path.exists():
        with report_write_errors(path):
            lines = path.read_text("utf-8", errors="replace").split("\n")
        kept = [line for line in lines if line.strip() and _path_of(line) not in tried]
    elif not bad:
        return
    lines = [
        json.dumps({"path": c.path, "id": c.id, "reason": e.reason, "detail": str(e)})
        for c, e in bad
    ]
    write_text(path, "".join(f"{line}\n" for line in kept + lines))


def _path_of(line: str) -> object:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("path") if isinstance(record, dict) else None
