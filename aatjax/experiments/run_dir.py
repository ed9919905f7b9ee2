"""What a run folder promises: one config, one data set, one run at a time."""

import json
from collections.abc import Sequence
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
"""Fields that may change between the parts of a run: they do not change what is learnt."""


MOST_BYTES = 2**30
"""Of a JSON file in a run folder; `clips.json` has an entry per clip."""


def started(folder: Path) -> bool:
    """Whether a run left a checkpoint or a result; one that failed before binds nobody."""
    return any((folder / "checkpoints").glob("[0-9]*")) or (folder / "result.json").exists()


def covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether a field, or the part of the config that it belongs to, is in a list of names."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def claim_config(folder: Path, config: Config, allow: Sequence[str] = ()) -> None:
    """Writes the config, or checks that it is the one that the run was started with.

    Args:
        folder: the run folder.
        config: the experiment.
        allow: fields that may have changed, such as `optim.lr`, or whole parts, such as `optim`.

    Raises:
        UsageError: the folder holds a run of another config; the differences are listed.
    """
    path = folder / "config.json"
    fields = json.loads(json.dumps(config.to_json()))
    if path.exists() and started(folder):
        found = find_differences(
            _completed(read_json(path, limit=MOST_BYTES, advice="choose another run folder")),
            fields,
        )
        found = [one for one in found if not covered(one[0], (*FREE, *allow))]
        changed = [f"{path}: {before!r} -> {after!r}" for path, before, after in found]
        if changed:
            first = found[0][0]
            raise UsageError(
                f"{folder} holds a run of another config ({'; '.join(changed[:6])}"
                f"{f'; and {len(changed) - 6} more' if changed[6:] else ''}): choose another "
                f"folder with --run, delete it, or go on with --allow-change {first}"
            )
    write_json(path, fields)


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of fields that its version did not have yet."""
    try:
        return json.loads(json.dumps(Config.from_json(fields).to_json()))
    except UsageError:  # a field that is gone: it will be told as a difference
        return fields


def claim_clips(folder: Path, parts: dict[str, Source], allow: Sequence[str] = ()) -> None:
    """Writes which clips the run is made of, or checks that they are still the same.

    A clip is known by its name, its labels and, where files are read, by what is in them.

    Raises:
        UsageError: clips were added, removed or changed since the run was started; they are
            listed.
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
    if path.exists() and started(folder) and not covered("clips", allow):
        before = read_json(path, limit=MOST_BYTES, advice="choose another run folder")
        problems = []
        if before["classes"] != now["classes"]:
            problems.append(f"classes: {before['classes']} -> {now['classes']}")
        for name in sorted(set(before["parts"]) | set(now["parts"])):
            old, new = before["parts"].get(name, {}), now["parts"].get(name, {})
            groups = {
                "gone": [id for id in old if id not in new],
                "new": [id for id in new if id not in old],
                "changed": [id for id in old if id in new and old[id] != new[id]],
            }
            for what, ids in groups.items():
                if ids:
                    more = f" and {len(ids) - 3} more" if ids[3:] else ""
                    problems.append(f"{name}: {what} {', '.join(map(repr, ids[:3]))}{more}")
        if problems:
            raise UsageError(
                f"{folder} holds a run on other clips ({'; '.join(problems)}): restore them, "
                "choose another folder with --run, or go on with --allow-change clips"
            )
    write_json(path, now)
