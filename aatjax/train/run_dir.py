"""Claims of a run folder: one config, one model and one data set per folder, checked first."""

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
from aatjax.errors import DataError, UsageError
from aatjax.io.atomic import report_write_errors
from aatjax.io.digest import hash_file
from aatjax.io.json_file import read_json, read_json_object, write_json
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl.base import Method
from aatjax.train.adapter_file import ARTEFACT
from aatjax.train.distributed import find_differences
from aatjax.train.logging import read_metrics
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

RESULT, METRICS = "result.json", "metrics.jsonl"
EPOCHS = "training.epochs"
MOST_BYTES = 2**30  # of a JSON file in a run folder; `clips.json` has an entry per clip


class RunClaims:
    """What a run folder states of its run, and what the next run in it is about to be.

    The checks compare and write nothing; `write` writes everything, once all have passed. A run
    that left neither a checkpoint nor a result claims nothing.

    Args:
        folder: the run folder.
        allow: fields that may have changed, such as `optim.lr`, whole parts, such as `optim`, or
            `clips`.
    """

    def __init__(self, folder: Path, allow: Sequence[str] = ()) -> None:
        self.folder: Path = folder
        self.changed: dict[str, str] = {}
        """Allowed changes by name: a field, or `clips` and the part; in words."""
        self.is_started: bool = has_checkpoint(folder) or (folder / RESULT).exists()
        self._allow = tuple(allow)
        self._files: dict[str, Any] = {}

    def check(
        self,
        name: str,
        fields: Mapping[str, Any],
        *,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Compare what a run is made of with what it was started with.

        Args:
            name: a JSON file in the run folder.
            fields: settings by part and name, such as those of a config.
            upgrade: brings fields that an older version wrote into today's form.

        Raises:
            UsageError: the folder holds another run; the differences are listed.
        """
        fields = json.loads(json.dumps(fields))
        self._files[name] = fields
        if not self.is_started or not (self.folder / name).exists():
            return
        before = upgrade(_read(self.folder / name))
        found = {
            field: f"{field}: {old!r} -> {new!r}"
            for field, old, new in find_differences(before, fields)
            if not _is_covered(field, FREE)
            and not (field.startswith(DESCRIBED) and _is_close(old, new))
        }
        refused = [field for field in found if not _is_covered(field, self._allow)]
        if refused:
            listed = "; ".join(found[field] for field in refused[:6])
            more = f"; and {len(refused) - 6} more" if refused[6:] else ""
            raise UsageError(
                f"{self.folder} holds a run of another config ({listed}{more}): choose another "
                "folder (run_dir=), delete it, or allow the change "
                f"(allow_change=['{refused[0]}']) to resume"
            )
        if EPOCHS in found and fields["optim"].get("schedule") == "cosine":
            raise UsageError(
                f"{self.folder}: {found[EPOCHS]} with optim.schedule 'cosine', whose learning rate "
                "falls to zero over the epochs of a run: what was trained is not the beginning of "
                "the other run. Train that in another folder (run_dir=), or go on at a rate "
                "that does not depend on the length (optim.schedule='constant', and allow the "
                "change of optim.schedule too)"
            )
        self.changed |= found

    def check_clips(self, parts: Mapping[str, Source]) -> None:
        """Compare the clips of a run with those it was started with.

        A clip is identified by its name, its labels and, where files are read, by their content.

        Raises:
            UsageError: clips were added, removed or changed since; they are listed.
        """
        now = self._files["clips.json"] = _describe_clips(parts)
        path = self.folder / "clips.json"
        if not self.is_started or not path.exists():
            return
        found = _compare_clips(_read(path), now)
        if found and not _is_covered("clips", self._allow):
            listed = "; ".join(text for texts in found.values() for text in texts)
            outcome = "to resume"
            if list(found) == ["test"]:
                outcome = "to have its figures made again: the weights do not depend on them"
            way = f", or allow it (allow_change=['clips']) {outcome}"
            if (self.folder / RESULT).exists() and list(found) != ["test"]:
                way = ", or delete it: the run is finished"
            raise UsageError(
                f"{self.folder} holds a run on other clips ({listed}): restore them, choose "
                f"another folder (run_dir=){way}"
            )
        self.changed |= {f"clips.{part}": "; ".join(texts) for part, texts in found.items()}

    def write(self, steps_left: int) -> None:
        """Write what was checked, after the last check.

        Args:
            steps_left: steps between the checkpoint that the run goes on from and its end.

        Raises:
            UsageError: more steps were done than the run has; or there is none left, and a change
                would have needed some.
        """
        # What data.* changes shows in the clips and in the front end.
        harmless = ("clips.test", "data.", EPOCHS)
        needed = [text for name, text in self.changed.items() if not name.startswith(harmless)]
        if needed and (steps_left <= 0 or self._has_ended()):
            raise UsageError(
                f"{self.folder}: the run is finished, so there is nothing left to train with the "
                f"change ({'; '.join(needed[:6])}): choose another folder (run_dir=), or "
                f"add epochs (training.epochs, with allow_change=['{EPOCHS}'])"
            )
        if steps_left < 0:
            raise UsageError(
                f"{self.folder}: the run has more epochs behind it than that "
                f"({self.changed.get(EPOCHS, 'its checkpoint is past the end')}): choose another "
                "folder (run_dir=)"
            )
        if self.changed:  # figures of what was before are no longer those of this run
            with report_write_errors(self.folder / RESULT):
                (self.folder / RESULT).unlink(missing_ok=True)
        for name, fields in self._files.items():
            write_json(self.folder / name, fields)

    def _has_ended(self) -> bool:
        """Whether the last epoch is done: with other clips it may have another number of steps."""
        settings, rows = self._files.get("settings.json"), read_metrics(self.folder / METRICS)
        if settings is None or EPOCHS in self.changed or not rows:
            return False
        return rows[-1]["epoch"] >= settings["training"]["epochs"]


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


def check_run(
    claims: RunClaims, sources: Mapping[str, Source], settings: Mapping[str, Any]
) -> None:
    """Compare what a run of `fit` is made of with what is in its folder."""
    claims.check("settings.json", settings, upgrade=_fill_defaults)
    if "batches" in settings and claims.is_started:
        warnings.warn(
            f"{claims.folder}: the run that is there goes on; the content of batches is not "
            "compared",
            stacklevel=4,
        )
    if sources:
        claims.check_clips(sources)


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run left a checkpoint in its folder."""
    return any((folder / "checkpoints").glob("[0-9]*"))


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None where it has none, or its adapter is missing.

    Raises:
        DataError: the result cannot be read, or the adapter is not the one that the run wrote.
    """
    adapter = folder / ARTEFACT
    if not (folder / RESULT).exists() or not adapter.exists():
        return None
    advice = "delete it, and the same command writes it again from the last checkpoint"
    result = read_json_object(folder / RESULT, advice=advice)
    if result.get("adapter") not in (None, hash_file(adapter)):
        raise DataError(
            f"{adapter}: is not the file that the run wrote: {RESULT} has the figures of another "
            "one; put it elsewhere, and the same command writes the run's own again"
        )
    return result


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


def _describe_clips(parts: Mapping[str, Source]) -> dict[str, Any]:
    return {
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


def _compare_clips(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Differences of classes and clips by part, at most three clips of a kind.

    A clip that left one part for another is neither gone nor new.
    """
    problems: dict[str, list[str]] = {}
    if before["classes"] != now["classes"]:
        problems["classes"] = [f"classes: {before['classes']} -> {now['classes']}"]
    names = sorted({*before["parts"], *now["parts"]})
    old = {name: before["parts"].get(name, {}) for name in names}
    new = {name: now["parts"].get(name, {}) for name in names}
    left = {id: name for name in names for id in old[name] if id not in new[name]}
    came = {id: name for name in names for id in new[name] if id not in old[name]}
    for name in names:
        kinds: dict[str, list[str]] = {
            "gone": [i for i in old[name] if i not in new[name] and i not in came],
            "new": [i for i in new[name] if i not in old[name] and i not in left],
            "changed": [i for i in old[name] if i in new[name] and old[name][i] != new[name][i]],
        }
        for id in new[name]:
            if came.get(id) == name and id in left:
                kinds.setdefault(f"moved here from {left[id]}", []).append(id)
        found = [f"{name}: {kind} {_list_first(ids)}" for kind, ids in kinds.items() if ids]
        if old[name].keys() == new[name].keys() and list(old[name]) != list(new[name]):
            found.append(f"{name}: in another order")
        elif not found and len(old[name]) > len(new[name]):
            found.append(f"{name}: others moved away")
        if found:
            problems[name] = found
    return problems


def _list_first(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 3} more" if ids[3:] else ""
    return ", ".join(map(repr, ids[:3])) + more


def _read(path: Path) -> Any:
    return read_json(path, limit=MOST_BYTES, advice="choose another run folder")


def _is_covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether a field, or the part of the config that it belongs to, is in a list of names."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _is_close(before: Any, after: Any) -> bool:
    """Return whether two descriptions of an array are those of the same numbers."""
    if not isinstance(before, list) or not isinstance(after, list):
        return False
    scale = 1e-5 * max(abs(before[1]), abs(after[1]))
    return all(abs(a - b) <= scale for a, b in zip(before, after, strict=True))
