"""Checkpoints of a run (Orbax V1): the arrays that change in training, never the frozen ones."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from aatjax.errors import DataError, WriteError
from aatjax.io.atomic import flush_folder, report_write_errors
from aatjax.io.digest import hash_arrays, hash_file, hash_json
from aatjax.io.json_file import read_json_object, write_json
from aatjax.io.root_logger import drop_messages, keep_root_logger
from aatjax.train.distributed import is_distributed, is_main, run_on_main
from aatjax.train.sharding import fetch

with keep_root_logger():
    import orbax.checkpoint.experimental.v1 as ocp

FILES = "files.json"
"""In a checkpoint: the checksum of every other file."""
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp")


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    pairs, structure = tree_flatten_with_path(tree)
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}, structure


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class DamagedCheckpointError(DataError):
    """A checkpoint exists and cannot be used."""


class Checkpoints:
    """The checkpoints in one folder, newest kept.

    A checkpoint is a pytree (flattened to one array per name) and a small JSON dictionary. It is
    written under a temporary name and renamed when complete, so a killed save leaves no partial
    one. Damage is detected by a checksum over both, and named by those of the files, in
    `files.json`. Only older checkpoints beyond `keep` and temporary files of killed saves are
    deleted.

    Where several processes run, all of them make the same calls on a shared folder.

    Args:
        directory: created on the first save.
        keep: how many to keep.
        say: called with a line about what was skipped or removed.

    Raises:
        WriteError: what a killed save left cannot be removed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        say: Callable[[str], None] = _warn,
    ) -> None:
        self.directory: Path = Path(directory).absolute()
        self._keep, self._say = keep, say
        self._writing: tuple[int, Any] | None = None
        if not is_main():
            return
        with report_write_errors(self.directory):
            left = sorted(path for path in self._list() if _TEMPORARY.match(path.name))
            for path in left:
                shutil.rmtree(path)
        if left:
            names = ", ".join(path.name for path in left)
            say(f"{self.directory}: removed {names}, left by a save that was killed")

    def _list(self) -> list[Path]:
        try:
            return list(self.directory.iterdir())
        except FileNotFoundError:
            return []

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return next(iter(self.steps), None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, newest first; some may be damaged."""
        found = [int(path.name) for path in self._list() if path.name.isdecimal()]
        return sorted(found, reverse=True)

    def save(self, step: int, tree: Any, progress: dict[str, Any]) -> None:
        """Start writing a checkpoint in the background; `settle` waits for it.

        The arrays are copied before this returns, so they may be donated.

        Raises:
            WriteError: this one, or the one before, could not be written; earlier ones remain.
        """
        self.settle()
        # Copies: the state is donated to the next step while this is being written.
        leaves, _ = _flatten(jax.tree.map(jnp.copy, tree))
        metadata = {"progress": progress, "sha256": _digest(leaves, progress)}
        # Folders are made first: threads of Orbax would wait minutes for one that cannot be made.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with ocp.Context(async_options=at_once):
                response = ocp.save_pytree_async(
                    str(self.directory / str(step)),
                    leaves,
                    custom_metadata=metadata,
                    overwrite=True,
                )
        except Exception as error:
            raise self._explain(step, error) from error
        self._writing = (step, response)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is on disk.

        Raises:
            WriteError: it could not be written.
        """
        if self._writing is None:
            return
        step, response = self._writing
        self._writing = None
        try:
            response.result()
            if is_main():
                self._complete(step)
        except Exception as error:
            raise self._explain(step, error) from error

    def _complete(self, step: int) -> None:
        """Flush a checkpoint to disk, list its files, and delete the oldest one."""
        folder = self.directory / str(step)
        flush_folder(folder)
        files = {name: hash_file(path) for name, path in _find_files(folder).items()}
        write_json(folder / FILES, {"files": files, "sha256": hash_json(files)})
        older = [one for one in self.steps if one < step]
        for one in older[self._keep - 1 :]:
            shutil.rmtree(self.directory / str(one))

    def _explain(self, step: int, error: Exception) -> Exception:
        # The array writer has its own error type for a full disk, which is not an OSError.
        full = isinstance(error, OSError) or "No space left" in str(error)
        if is_distributed() and not full:
            return error  # a lost peer fails here too: the watchdog names it
        why = "No space left on device" if "No space left" in str(error) else _first_line(error)
        return WriteError(
            f"{self.directory}: the checkpoint of step {step} could not be written: {why}; "
            "free some space or choose another run folder"
        )

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Return the newest whole checkpoint (or that of a step) in the shape of `template`.

        A damaged one stays in place, with a warning, and the one before is used. Arrays are placed
        as the template's are, however many devices they were on when they were saved.

        Raises:
            DataError: there is none, all are damaged, or it belongs to another model or optimiser.
        """
        self.settle()
        if step is not None:
            return self._restore(template, step)
        steps = self.steps
        if not steps:
            raise DataError(f"{self.directory}: there is no checkpoint")
        for position, candidate in enumerate(steps):
            try:
                return self._restore(template, candidate)
            except DamagedCheckpointError as error:
                if position + 1 == len(steps):
                    raise
                self._say(f"warning: {error}; going back to step {steps[position + 1]}")
        raise AssertionError

    def _restore(self, template: Any, step: int) -> tuple[Any, dict[str, Any]]:
        leaves, structure = _flatten(template)
        found, progress = self._load(step, lambda shapes: self._check_shapes(step, leaves, shapes))
        return tree_unflatten(structure, [found[name] for name in leaves]), progress

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays of a checkpoint by name, on the host, and its JSON dictionary.

        Raises:
            DataError: it is damaged.
        """
        return self._load(
            step, lambda all: {n: np.empty(one.shape, one.dtype) for n, one in all.items()}
        )

    def _check_shapes(
        self, step: int, leaves: Mapping[str, Any], described: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the leaves to be loaded; refuse a checkpoint that has others."""
        wrong = sorted(set(leaves) ^ set(described)) or [
            name for name, leaf in leaves.items() if tuple(described[name].shape) != leaf.shape
        ]
        if wrong:
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} belongs to another model or "
                f"optimiser: {len(wrong)} arrays differ, first {wrong[0]}; use another run folder"
            )
        return leaves

    def _load(
        self, step: int, choose: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arrays of a checkpoint by name, and its JSON dictionary.

        Args:
            step: of the checkpoint.
            choose: returns what to load each array as, given shapes and types by name.
        """
        folder = self.directory / str(step)
        try:
            if problem := run_on_main(lambda: _find_damage(folder)):
                raise ValueError(problem)
            # Orbax warns of missing files where none are.
            with drop_messages("orbax"):
                metadata: Any = ocp.pytree_metadata(str(folder))
                if metadata.metadata is None:
                    raise ValueError("its arrays are not described")
                leaves: Any = choose(metadata.metadata)
                found: Any = ocp.load_pytree(str(folder), leaves)
            # Orbax reads a metadata file that is not JSON as an empty one, and stores no checksum
            # of the arrays.
            extra = dict(metadata.custom_metadata or {})
            progress = dict(extra.get("progress") or {})
            if extra.get("sha256") != _digest(found, progress):
                raise ValueError("it is damaged, its checksum does not match")
        except DataError:
            raise
        except Exception as error:
            raise DamagedCheckpointError(
                f"{self.directory}: the checkpoint of step {step} cannot be read: "
                f"{_first_line(error)}"
            ) from error
        return found, progress

    def close(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            WriteError: it could not be written; an error that `settle` raised is not repeated.
        """
        self.settle()


def _find_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, without the list of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path for name, path in names.items() if name != FILES}


def _find_damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is not as it was written; None where none is known to be."""
    if not (folder / FILES).exists():  # killed before it was written: only the arrays tell
        return None
    try:
        listed = read_json_object(folder / FILES)
        files = listed["files"]
        if listed["sha256"] != hash_json(files):
            return f"{FILES} is damaged"
    except (DataError, KeyError):
        return f"{FILES} is damaged"
    found = _find_files(folder)
    for name, digest in files.items():
        if name not in found:
            return f"{name} is missing"
        try:
            if hash_file(found[name]) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _digest(leaves: Mapping[str, Any], progress: dict[str, Any]) -> str:
    start = json.dumps(progress, sort_keys=True).encode()
    return hash_arrays(leaves, start=start, fetch=fetch)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
