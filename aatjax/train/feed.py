"""Batches on their way to the devices, and the part of a run's state that is not arrays."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass
class LoopProgress:
    """The part of a checkpoint that is not arrays, as JSON.

    Attributes:
        sums: the sums of the epoch in progress.
        seconds: time in training steps, of the whole run.
        spent: the same of the epoch: in all, waiting for input, and sending it to the device.
        skipped: steps of the whole run whose loss or gradient was not finite.
        best_score: validation score of the best weights so far.
        best_epoch: epoch of the best weights so far.
        stale: epochs that gained nothing since the last one that did, see `Training.patience`.
        iterator: state of the iterator over the batches.
        rows: rows of metrics.jsonl that were written.
        settled: whether the start suffices (`Training.ridge_suffices`), so that no step is made.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    best_score: float | None = None
    best_epoch: int = 0
    stale: int = 0
    iterator: dict[str, Any] | None = None
    rows: int = 0
    settled: bool = False

    def add(self, name: str, seconds: float) -> None:
        """Count time of the epoch."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds


class Feed:
    """Batches on the devices, one ahead: read and sent while the devices compute.

    `state` is the iterator's state after the batch that was taken last, which is not that of the
    iterator itself; `shape` is that of the batch.
    """

    def __init__(
        self, batches: Any, put: Callable[[dict[str, np.ndarray]], Any], progress: LoopProgress
    ) -> None:
        self._batches, self._put, self._progress = batches, put, progress
        self._ahead: tuple[Any, dict[str, np.ndarray], Any] | None = None
        self.state: dict[str, Any] = batches.get_state()
        self.shape: tuple[int, ...] = ()

    def fetch(self) -> None:
        """Read the next batch and start sending it, unless that was done."""
        if self._ahead is not None:
            return
        began = time.monotonic()
        host = next(self._batches)
        read = time.monotonic()
        rows = {name: host.pop(name) for name in ("index", "draw")}
        batch = self._put(host)
        self._progress.add("input", read - began)
        self._progress.add("transfer", time.monotonic() - read)
        self._ahead = (batch, rows, self._batches.get_state())

    def take(self) -> tuple[Any, dict[str, np.ndarray]]:
        """Return the next batch on the devices, and which clips its rows are."""
        self.fetch()
        assert self._ahead is not None
        batch, rows, self.state = self._ahead
        self.shape = batch["audio"].shape
        self._ahead = None
        return batch, rows
