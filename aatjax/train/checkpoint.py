"""Checkpoints of a run (Orbax V1): what changes in training, never the frozen weights."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from aatjax.errors import DataError, WriteError


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    pairs, structure = tree_flatten_with_path(tree)
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}, structure


class Checkpoints:
    """The checkpoints under one folder, newest kept.

    A checkpoint is a pytree (flattened to one array a name) and a small JSON dictionary. It is
    written under a temporary name and renamed when whole, so a killed save leaves no half one;
    a checksum over both tells a damaged one.

    Args:
        directory: made on the first save.
        keep: how many to keep.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        try:
            self._checkpointer: Any = ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise WriteError(f"{self.directory}: cannot keep checkpoints here: {error}") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, tree: Any, progress: dict[str, Any]) -> None:
        """Writes a checkpoint and waits until it is on disk.

        Raises:
            WriteError: it could not be written; earlier checkpoints are as they were.
        """
        leaves, _ = _flatten(tree)
        try:
            self._checkpointer.save_pytree(
                step,
                leaves,
                custom_metadata={"progress": progress, "sha256": _digest(leaves, progress)},
                force=True,
                overwrite=True,
            )
        except (OSError, ValueError) as error:
            raise WriteError(
                f"{self.directory}: the checkpoint of step {step} could not be written: "
                f"{_first_line(error)}; free some space or choose another run folder"
            ) from error

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint (or that of a step) in the shape of `template`.

        Raises:
            DataError: there is none, it is damaged, or it belongs to another model or optimiser.
        """
        step = self.latest if step is None else step
        if step is None:
            raise DataError(f"{self.directory}: there is no checkpoint")
        leaves, structure = _flatten(template)
        try:
            metadata = self._checkpointer.pytree_metadata(step)
            shapes = {name: tuple(leaf.shape) for name, leaf in metadata.metadata.items()}
            wrong = sorted(set(leaves) ^ set(shapes)) or [
                name for name, leaf in leaves.items() if shapes[name] != leaf.shape
            ]
            found = {} if wrong else self._checkpointer.load_pytree(step, leaves)
            # Orbax reads a metadata file that is no JSON any more as an empty one, and its arrays
            # have no checksum of their own.
            told = dict(metadata.custom_metadata or {})
            progress = dict(told.get("progress") or {})
            if not wrong and told.get("sha256") != _digest(found, progress):
                raise ValueError("it is damaged, its checksum does not fit")
        except Exception as error:
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} cannot be read: "
                f"{_first_line(error)}; delete its folder to go on from the one before"
            ) from error
        if wrong:
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} belongs to another model or "
                f"optimiser: {len(wrong)} arrays differ, first {wrong[0]}; use another run folder"
            )
        return tree_unflatten(structure, [found[name] for name in leaves]), progress

    def close(self) -> None:
        """Ends background work."""
        self._checkpointer.close()


def _digest(leaves: Mapping[str, Any], progress: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    for name in sorted(leaves):
        value = np.ascontiguousarray(leaves[name])
        digest.update(f"{name}{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
