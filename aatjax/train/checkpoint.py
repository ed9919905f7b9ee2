"""Checkpoints of a run (Orbax V1): the arrays that change in training, never the frozen ones."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from aatjax.errors import DataError, WriteError
from aatjax.io.digest import hash_arrays
from aatjax.io.root_logger import keep_root_logger
from aatjax.train.distributed import is_distributed
from aatjax.train.sharding import fetch

with keep_root_logger():
    import orbax.checkpoint.experimental.v1 as ocp


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
    one; a checksum over both detects damage. Only older whole checkpoints beyond `keep` and
    temporary files of killed saves are deleted.

    Where several processes run, all of them make the same calls on a shared folder.

    Args:
        directory: created on the first save.
        keep: how many to keep.
        say: called with a line about what was skipped or removed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        say: Callable[[str], None] = _warn,
    ) -> None:
        self.directory: Path = Path(directory).absolute()
        self._say = say
        self._writing: tuple[int, Any] | None = None
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        try:
            before = self._temporary()
            self._checkpointer: Any = ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise WriteError(f"{self.directory}: cannot keep checkpoints here: {error}") from error
        if gone := sorted(before - self._temporary()):
            say(f"{self.directory}: removed {', '.join(gone)}, left by a save that was killed")

    def _temporary(self) -> set[str]:
        if not self.directory.is_dir():
            return set()
        return {path.name for path in self.directory.iterdir() if "tmp" in path.name}

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, newest first."""
        return sorted((int(one.step) for one in self._checkpointer.checkpoints), reverse=True)

    def save(self, step: int, tree: Any, progress: dict[str, Any]) -> None:
        """Start writing a checkpoint in the background; `settle` waits for it.

        The arrays are copied before this returns, so they may be donated.

        Raises:
            WriteError: this one, or the one before, could not be written; earlier ones remain.
        """
        self.settle()
        # Copies: the state is donated to the next step while this is being written.
        leaves, _ = _flatten(jax.tree.map(jnp.copy, tree))
        try:
            response = self._checkpointer.save_pytree_async(
                step,
                leaves,
                custom_metadata={"progress": progress, "sha256": _digest(leaves, progress)},
                force=True,
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
        except Exception as error:
            raise self._explain(step, error) from error

    def _explain(self, step: int, error: Exception) -> Exception:
        # The array writer has its own error type for a full disk, which is not an OSError.
        full = isinstance(error, OSError) or "No space left" in str(error)
        if is_distributed() and not full:
            return error  # a lost peer fails here too: the watchdog names it
        return WriteError(
            f"{self.directory}: the checkpoint of step {step} could not be written: "
            f"{_first_line(error)}; free some space or choose another run folder"
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
        try:
            metadata = self._checkpointer.pytree_metadata(step)
            shapes = {name: tuple(leaf.shape) for name, leaf in metadata.metadata.items()}
            wrong = sorted(set(leaves) ^ set(shapes)) or [
                name for name, leaf in leaves.items() if shapes[name] != leaf.shape
            ]
            found = {} if wrong else self._checkpointer.load_pytree(step, leaves)
            # Orbax reads a metadata file that is not JSON as an empty one, and stores no checksum
            # of the arrays.
            extra = dict(metadata.custom_metadata or {})
            progress = dict(extra.get("progress") or {})
            if not wrong and extra.get("sha256") != _digest(found, progress):
                raise ValueError("it is damaged, its checksum does not match")
        except Exception as error:
            raise DamagedCheckpointError(
                f"{self.directory}: the checkpoint of step {step} cannot be read: "
                f"{_first_line(error)}"
            ) from error
        if wrong:
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} belongs to another model or "
                f"optimiser: {len(wrong)} arrays differ, first {wrong[0]}; use another run folder"
            )
        return tree_unflatten(structure, [found[name] for name in leaves]), progress

    def close(self) -> None:
        """Wait for a checkpoint that is being written and end background work.

        Raises:
            WriteError: it could not be written; an error that `settle` raised is not repeated.
        """
        writing = self._writing
        try:
            self._checkpointer.close()
        except Exception as error:
            if writing is not None:
                raise self._explain(writing[0], error) from error


def _digest(leaves: Mapping[str, Any], progress: dict[str, Any]) -> str:
    start = json.dumps(progress, sort_keys=True).encode()
    return hash_arrays(leaves, start=start, fetch=fetch)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
