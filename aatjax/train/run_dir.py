"""Claims of a run folder: one config, one model and one data set per folder, checked first."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Source
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.io.atomic import report_write_errors
from aatjax.io.digest import hash_file
from aatjax.io.json_file import read_json_object, write_json
from aatjax.models.config import ASTConfig
from aatjax.petl.base import Method
from aatjax.train.adapter_file import ARTEFACT
from aatjax.train.distributed import find_differences
from aatjax.train.logging import METRICS, read_metrics
from aatjax.train.optim import Optim
from aatjax.train.run_description import compare_clips, describe_clips, is_close
from aatjax.train.training import Training, upgrade_training

FREE = (
    "mesh",
    "name",
    "data.cache",
    "training.threads",
    "training.save_every",
    "training.on_save_error",
    "training.max_skipped",
    "training.kernels",
    "training.deterministic",
    "training.profile",
)
"""Fields that may change when a run is resumed: they do not change the trained weights, or by
rounding only."""

DESCRIBED = ("weights.", "optim.updates.", "loss.values")
"""Fields that are mean and root mean square of an array."""

RESULT, CLIPS = "result.json", "clips.json"
COPY = "checkpoints/run.json"
"""A second copy of what a run folder states of its run, by the name of the file."""
EPOCHS = "training.epochs"
RESULT_FIELDS = ("method", "trainable", "headline", "seconds")
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
        self._damaged: dict[str, dict[str, Any]] = {}

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
        stored = self.read(name)
        if stored is None:
            return
        before = _upgrade(stored, upgrade)
        found = {
            field: f"{field}: {old!r} -> {new!r}"
            for field, old, new in find_differences(before, fields)
            if not _is_covered(field, FREE)
            and not (field.startswith(DESCRIBED) and is_close(old, new))
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
        now = self._files[CLIPS] = describe_clips(parts)
        before = self.read(CLIPS)
        if before is None:
            return
        found = compare_clips(before, now)
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
        write_json(self.folder / COPY, self._files)

    def repair(self) -> None:
        """Write the damaged files again, after the last check of a run that stays as it is."""
        for name, copy in self._damaged.items():
            write_json(self.folder / name, self._files.get(name, copy))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what a file states of the run that is there, from its copy if it is damaged.

        Returns None where there is no run, or nothing states it.

        Raises:
            DataError: the file and its copy are damaged.
        """
        if not self.is_started:
            return None
        path = self.folder / name
        stored = _read_whole(path)
        if stored is not None and _is_whole(name, stored):
            return stored
        copy = _read_whole(self.folder / COPY, name)
        if copy is not None and _is_whole(name, copy):
            warnings.warn(
                f"{path} is damaged or missing: {COPY} has its content, and it is written again",
                stacklevel=3,
            )
            self._damaged[name] = copy
            return copy
        if not path.exists():
            return None
        raise DataError(
            f"{path}: is damaged, and what the run was started with cannot be compared: restore "
            "it, or delete it to go on without that comparison"
        )

    def _has_ended(self) -> bool:
        """Whether the last epoch is done: with other clips it may have another number of steps."""
        settings, rows = self._files.get("settings.json"), read_metrics(self.folder / METRICS)
        if settings is None or EPOCHS in self.changed or not rows:
            return False
        return rows[-1]["epoch"] >= settings["training"]["epochs"]


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


class DamagedResultError(DataError):
    """The result of a run exists and cannot be used."""


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None where it has none, or its adapter is missing.

    Raises:
        DamagedResultError: the result cannot be read.
        DataError: the adapter is not the one that the run wrote.
    """
    adapter = folder / ARTEFACT
    if not (folder / RESULT).exists() or not adapter.exists():
        return None
    result = _read_whole(folder / RESULT)
    if result is None or any(name not in result for name in RESULT_FIELDS):
        raise DamagedResultError(
            f"{folder / RESULT}: is damaged: delete it, and the same command writes it again from "
            "the last checkpoint"
        )
    if result.get("adapter") not in (None, hash_file(adapter)):
        raise DataError(
            f"{adapter}: is not the file that the run wrote: {RESULT} has the figures of another "
            "one; put it elsewhere, and the same command writes the run's own again"
        )
    return result


def restore_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None where its last checkpoint is to make it again.

    Raises:
        DataError: see `read_result`; a damaged result without any checkpoint.
    """
    try:
        return read_result(folder)
    except DamagedResultError:
        if not has_checkpoint(folder):
            raise
    warnings.warn(
        f"{folder / RESULT} is damaged: it is made again from the last checkpoint", stacklevel=2
    )
    return None


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
    stored = {**stored, "training": upgrade_training(stored["training"])}
    filled = {name: {**fields, **stored[name]} for name, fields in defaults.items()}
    if stored["petl"] is not None:
        filled["petl"] = Method.from_json(stored["petl"]).to_json()
    return json.loads(json.dumps({**stored, **filled}))


def _read_whole(path: Path, name: str | None = None) -> dict[str, Any] | None:
    """Return the JSON object of a file, or the one that is in it by name; None without."""
    try:
        found = read_json_object(path, limit=MOST_BYTES)
    except DataError:
        return None
    value = found if name is None else found.get(name)
    return value if isinstance(value, dict) else None


def _is_whole(name: str, stored: dict[str, Any]) -> bool:
    """Whether what was read is of the form that a run writes."""
    if name != CLIPS:
        return bool(stored)
    parts = stored.get("parts")
    return (
        isinstance(stored.get("classes"), list)
        and isinstance(parts, dict)
        and all(isinstance(part, dict) for part in parts.values())
    )


def _upgrade(
    stored: dict[str, Any], upgrade: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Bring stored fields into today's form; what has no such form is compared as it is."""
    try:
        return upgrade(stored)
    except AatjaxError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        return stored


def _is_covered(name: str, allowed: Sequence[str]) -> bool:
    """Whether a field, or the part of the config that it belongs to, is in a list of names."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)
