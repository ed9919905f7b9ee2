"""Claims of a run folder: one config, one model and one data set per folder."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.io.json_file import read_json, write_json
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl.base import Method
from aatjax.train.distributed import find_differences
from aatjax.train.loop import Training
from aatjax.train.optim import Optim, compute_updates
from aatjax.train.step import LossFunction, compute_losses

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

DESCRIBED = ("weights.", "optim.updates.", "loss.values")
"""Fields that are mean and root mean square of an array."""

MOST_BYTES = 2**30  # of a JSON file in a run folder; `clips.json` has an entry per clip


def claim_fields(
    path: Path,
    fields: Mapping[str, Any],
    allow: Sequence[str] = (),
    *,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write what a run is made of, or check that it is what the run was started with.

    Args:
        path: a JSON file in the run folder.
        fields: settings by part and name, such as those of a config.
        allow: fields that may have changed, such as `optim.lr`, or whole parts, such as `optim`.
        upgrade: brings fields that an older version wrote into today's form.

    Raises:
        UsageError: the folder holds another run; the differences are listed.
    """
    folder, fields = path.parent, json.loads(json.dumps(fields))
    if path.exists() and _is_started(folder):
        found = [
            (name, f"{name}: {before!r} -> {after!r}")
            for name, before, after in find_differences(upgrade(_read(path)), fields)
            if not _is_covered(name, (*FREE, *allow))
            and not (name.startswith(DESCRIBED) and _is_close(before, after))
        ]
        if found:
            listed = "; ".join(text for _, text in found[:6])
            more = f"; and {len(found) - 6} more" if found[6:] else ""
            raise UsageError(
                f"{folder} holds a run of another config ({listed}{more}): choose another folder "
                f"(run_dir=, --run), delete it, or allow the change (allow_change=, "
                f"--allow-change {found[0][0]}) to resume"
            )
    write_json(path, fields)


def describe_weights(model: AST) -> dict[str, list[float]]:
    """Return mean and root mean square of every array by path.

    They tell other weights apart, also on another device, where the last digits differ.
    """
    kinds = (nnx.Param, surgery.Frozen, nnx.BatchStat)
    variables = surgery.variables(model).items()
    return {path: _describe(v[...]) for path, v in variables if isinstance(v, kinds)}


def describe_updates(tx: optax.GradientTransformation, model: AST) -> dict[str, list[float]]:
    """Return mean and root mean square of the first three updates, for stated gradients.

    A transformation of optax holds functions only, which cannot be compared: this tells apart what
    differs in rate, moments, decay, and in the start of the schedule.
    """
    trainable: Any = surgery.split(model).trainable
    state, found = tx.init(trainable), {}
    for step in range(3):
        gradient = jax.tree.map(
            lambda leaf, step=step: jnp.cos((step + 1.0) * jnp.arange(leaf.size)).reshape(
                leaf.shape
            ),
            trainable,
        )
        updates, state = compute_updates(tx, gradient, state, trainable)
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(updates)]
        found[str(step)] = _describe(np.concatenate(leaves))
    return found


def describe_loss(loss: LossFunction) -> list[float]:
    """Return mean and root mean square of a loss of stated logits and targets."""
    logits = jnp.cos(jnp.arange(12.0)).reshape(4, 3)
    return _describe(compute_losses(logits, jnp.eye(4, 3), loss))


def _describe(array: Any) -> list[float]:
    value = np.asarray(array, np.float32)
    return [float(value.mean()), float(np.sqrt(np.square(value).mean()))]


def claim_run(
    folder: Path,
    sources: Mapping[str, Source],
    settings: Mapping[str, Any],
    allow: Sequence[str],
) -> None:
    """Write what a run of `fit` is made of, or compare it with what is in the folder."""
    claim_fields(folder / "settings.json", settings, allow, upgrade=_fill_defaults)
    if "batches" in settings and _is_started(folder):
        warnings.warn(
            f"{folder}: the run that is there goes on; the content of batches is not compared",
            stacklevel=4,
        )
    if sources:
        claim_clips(folder, sources, allow)


def _fill_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """Return stored settings with the defaults of fields that their version did not have yet."""
    defaults: dict[str, dict[str, Any]] = {
        "training": dataclasses.asdict(Training()),
        "augment": dataclasses.asdict(Augment()),
        "frontend": FrontEnd().to_dict(),
        "model": ASTConfig().to_json(),
    }
    if "updates" not in stored["optim"]:
        defaults["optim"] = dataclasses.asdict(Optim())
    filled = {name: {**fields, **stored[name]} for name, fields in defaults.items()}
    if stored["petl"] is not None:
        filled["petl"] = Method.from_json(stored["petl"]).to_json()
    return json.loads(json.dumps({**stored, **filled}))


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
                "choose another folder (run_dir=, --run), or allow it (allow_change=, "
                "--allow-change clips) to resume"
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
        if old.keys() == new.keys() and list(old) != list(new):
            problems.append(f"{name}: in another order")
    return problems


def _read(path: Path) -> Any:
    return read_json(path, limit=MOST_BYTES, advice="choose another run folder")


def _is_started(folder: Path) -> bool:
    """Whether a run left a checkpoint or a result; a run that failed before claims nothing."""
    return any((folder / "checkpoints").glob("[0-9]*")) or (folder / "result.json").exists()


def _is_covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether a field, or the part of the config that it belongs to, is in a list of names."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _is_close(before: Any, after: Any) -> bool:
    """Return whether two descriptions of an array are those of the same numbers."""
    if not isinstance(before, list) or not isinstance(after, list):
        return False
    scale = 1e-5 * max(abs(before[1]), abs(after[1]))
    return all(abs(a - b) <= scale for a, b in zip(before, after, strict=True))
