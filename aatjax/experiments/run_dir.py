"""Claims of a run folder: one config and one data set per folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aatjax.config import Config
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.io.json_file import read_json, write_json
from aatjax.train.distributed import find_differences

FREE = (
    "mesh",
    "name",
    "data.cache",
    "training.threads",
    "training.save_every",
    "training.on_save_error",
    "training.max_skipped",
)
"""Fields that may change when a run is resumed: they do not change the trained weights."""

MOST_BYTES = 2**30  # of a JSON file in a run folder; `clips.json` has an entry per clip


def claim_config(folder: Path, config: Config, allow: Sequence[str] = ()) -> None:
    """Write the config, or check that it is the one that the run was started with.

    Args:
        folder: the run folder.
        config: the experiment.
        allow: fields that may have changed, such as `optim.lr`, or whole parts, such as `optim`.

    Raises:
        UsageError: the folder holds a run of another config; the differences are listed.
    """
    path = folder / "config.json"
    fields = json.loads(json.dumps(config.to_json()))
    if path.exists() and _is_started(folder):
        found = [
            (name, f"{name}: {before!r} -> {after!r}")
            for name, before, after in find_differences(_fill_defaults(_read(path)), fields)
            if not _is_covered(name, (*FREE, *allow))
        ]
        if found:
            listed = "; ".join(text for _, text in found[:6])
            more = f"; and {len(found) - 6} more" if found[6:] else ""
            raise UsageError(
                f"{folder} holds a run of another config ({listed}{more}): choose another folder "
                f"with --run, delete it, or add --allow-change {found[0][0]} to resume"
            )
    write_json(path, fields)


def claim_clips(folder: Path, parts: Mapping[str, Source], allow: Sequence[str] = ()) -> None:
    """Write the clips of a run, or check that they are those it was started with.

    A clip is identified by its name, its labels and, where files are read, by their content.

    Raises:
        UsageError: clips were added, removed or changed since; they are listed.
    """
    path = folder / "clips.json"
    now = {
        "classes": list(next(iter(parts.values())).classes),
        "parts": {
            name: {
                clip.id: [list(clip.label), part.reader.key(clip)]
                + ([] if clip.observed is None else [list(clip.observed)])
                for clip in part.clips
            }
            for name, part in parts.items()
        },
    }
    if path.exists() and _is_started(folder) and not _is_covered("clips", allow):
        problems = _compare_clips(_read(path), now)
        if problems:
            raise UsageError(
                f"{folder} holds a run on other clips ({'; '.join(problems)}): restore them, "
                "choose another folder with --run, or add --allow-change clips to resume"
            )
    write_json(path, now)


def _compare_clips(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of classes and clips, at most three clips of a kind."""
    problems = []
    if before["classes"] != now["classes"]:
        problems.append(f"classes: {before['classes']} -> {now['classes']}")
    for name in sorted({*before["parts"], *now["parts"]}):
        old, new = before["parts"].get(name, {}), now["parts"].get(name, {})
        groups = {
            "gone": [id for id in old if id not in new],
            "new": [id for id in new if id not in old],
            "changed": [id for id in old if id in new and old[id] != new[id]],
        }
        for kind, ids in groups.items():
            if ids:
                more = f" and {len(ids) - 3} more" if ids[3:] else ""
                problems.append(f"{name}: {kind} {', '.join(map(repr, ids[:3]))}{more}")
    return problems


def _read(path: Path) -> Any:
    return read_json(path, limit=MOST_BYTES, advice="choose another run folder")


def _is_started(folder: Path) -> bool:
    """Whether a run left a checkpoint or a result; a run that failed before claims nothing."""
    return any((folder / "checkpoints").glob("[0-9]*")) or (folder / "result.json").exists()


def _is_covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether a field, or the part of the config that it belongs to, is in a list of names."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _fill_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of fields that its version did not have yet."""
    try:
        return json.loads(json.dumps(Config.from_json(fields).to_json()))
    except UsageError:  # a field that no longer exists: reported as a difference
        return fields
