"""Training batches from an iterable of the user: a generator, a DataLoader, a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from aatjax.data.arrays import Arrays
from aatjax.errors import DataError, UsageError, check_names

if TYPE_CHECKING:
    from aatjax.audio.frontend import FrontEnd


class Batches:
    """Batches that somebody else makes, for `fit(model, train=...)`.

        data.Batches(loader, classes=("dog", "rain"))
        data.Batches(make_generator, length=100, classes=names, rate=44100)

    The order is that of the iterable: a run that is resumed reads past the batches that it had.

    Args:
        batches: an iterable that can be read once per epoch (a list, a DataLoader), or a function
            that returns a new iterator for each epoch. An item is a pair (x, y) as in
            `data.Arrays`, of `training.batch_size` sounds at most.
        classes: class names.
        length: batches per epoch; by default `len(batches)`.
        multi_label: whether `y` is `[b, c]` of zeros and ones.
        rate: sampling rate of waveforms in Hz.
        name: name shown to people; a run folder knows the batches by it, since their content is
            not compared.

    Raises:
        UsageError: no length is known, or an iterator that can be read only once.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]] | Callable[[], Iterable[tuple[Any, Any]]],
        classes: Sequence[str],
        *,
        length: int | None = None,
        multi_label: bool = False,
        rate: int = 16000,
        name: str = "batches",
    ) -> None:
        check_names(f"{name}: classes", classes)
        if length is None and isinstance(batches, Sized):
            length = len(batches)
        if length is None or length < 1:
            raise UsageError(f"{name}: give length=, the number of batches per epoch (1 or more)")
        if isinstance(batches, Iterator):
            raise UsageError(
                f"{name}: an iterator can be read only once: give the function that makes it"
            )
        self._batches, self._rate = batches, rate
        self.classes: tuple[str, ...] = tuple(classes)
        self.multi_label: bool = multi_label
        self.name: str = name
        self.length = length

    def __repr__(self) -> str:
        return f"<Batches {self.name!r}: {self.length} per epoch, {len(self.classes)} classes>"

    def describe(self) -> dict[str, Any]:
        """Return what tells batches apart in a run folder, as JSON; their content is not read."""
        return {
            "name": self.name,
            "classes": self.classes,
            "multi_label": self.multi_label,
            "length": self.length,
            "rate": self._rate,
        }

    def read_epoch(self, frontend: FrontEnd, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch, as `aatjax.train.step.Batch` with rows of weight 0.

        Raises:
            DataError: a batch that is too large, of other classes, or missing.
        """
        given: Any = self._batches() if callable(self._batches) else self._batches
        count = 0
        for number, pair in zip(range(self.length), given, strict=False):
            yield self._read(number, pair, frontend, batch_size)
            count += 1
        if count < self.length:
            raise DataError(
                f"{self.name}: ended after {count} of {self.length} batches: give an iterable that "
                "can be read from its start each epoch, and its true length"
            )

    def _read(
        self, number: int, pair: Any, frontend: FrontEnd, batch_size: int
    ) -> dict[str, np.ndarray]:
        from aatjax.data.pipeline import ClipLoader, pad_batch  # needs Grain

        name = f"{self.name}, batch {number}"
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            size = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
            raise DataError(f"{name}: is a {type(pair).__name__}{size}, not a pair (x, y)")
        x, y = pair
        source = Arrays(x, y, self.classes, rate=self._rate, name=name)
        if len(source) > batch_size:
            raise DataError(
                f"{name}: holds {len(source)} sounds: set training.batch_size to as many (it is "
                f"{batch_size})"
            )
        if source.multi_label != self.multi_label:
            raise DataError(f"{name}: set multi_label={source.multi_label} for labels like these")
        rows = np.arange(len(source), dtype=np.int32)
        load = ClipLoader(source, frontend, "start")
        ones = np.ones(len(source), np.float32)
        return pad_batch(
            load({"index": rows, "draw": np.zeros(len(source), np.int64), "weight": ones}),
            size=batch_size,
        )


class BatchIterator:
    """The batches of all epochs, with the state of an iterator of Grain.

    Args:
        batches: what is read.
        frontend: gives the fixed length.
        batch_size: rows per batch.
        rows: the rows that are kept here, where several processes share a batch.
    """

    def __init__(
        self, batches: Batches, frontend: FrontEnd, batch_size: int, rows: np.ndarray
    ) -> None:
        self._make = lambda: batches.read_epoch(frontend, batch_size)
        self._rows, self._length = rows, batches.length
        self._epoch, self._done = self._make(), 0

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._done and self._done % self._length == 0:
            next(self._epoch, None)  # the check of its length
            self._epoch = self._make()
        batch = next(self._epoch)
        self._done += 1
        return {name: values[self._rows] for name, values in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches that were read."""
        return {"batches": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        """Read past the batches that were read before."""
        while self._done < state["batches"]:
            next(self)
