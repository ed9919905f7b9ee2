"""Batches of a source by Grain, deterministic by (seed, epoch, index)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from aatjax.audio.frontend import FrontEnd
from aatjax.data.buckets import Bucket
from aatjax.data.sampling import Balance, compute_draw_shares
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError
from aatjax.io.root_logger import keep_root_logger

with keep_root_logger():
    import grain

Crop = Literal["start", "random"]


@dataclasses.dataclass(frozen=True)
class _MemoryReader(Reader):
    reader: Reader
    waveforms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def read(self, clip: Clip) -> np.ndarray:
        if clip.id not in self.waveforms:
            self.waveforms[clip.id] = self.reader.read(clip)
        return self.waveforms[clip.id]

    def key(self, clip: Clip) -> str | None:
        return self.reader.key(clip)


def keep_in_memory(source: Source) -> Source:
    """Return the same source with each waveform read (or synthesized) once and then kept."""
    return source.with_clips(source.clips, reader=_MemoryReader(source.reader))


Fitted = tuple[np.ndarray, int]
"""A clip at the fixed length, or what replaces it, and its valid samples."""


class Stored(Protocol):
    """What batches hold in place of the sounds of a source."""

    def read(self, index: int, fit: Callable[[], Fitted]) -> Fitted:
        """Return what replaces a clip, which `fit` reads at the fixed length."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredTokens:
    """Features read in place of the sounds of a source, one row per clip.

    Attributes:
        tokens: `[clips, n, d]`, in memory or memory-mapped.
        length: valid samples of each clip.
    """

    tokens: np.ndarray
    length: np.ndarray

    def read(self, index: int, fit: Callable[[], Fitted]) -> Fitted:
        """Return a row and the clip's valid samples."""
        return np.asarray(self.tokens[index]), int(self.length[index])


@dataclasses.dataclass(frozen=True)
class ClipLoader:
    """Adds the clips, at a fixed length, to the rows of a batch.

    A row's `draw` places its random crop, so the same row has the same crop wherever it is read.
    """

    source: Source
    frontend: FrontEnd
    crop: Crop
    stored: Stored | None = None

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pairs = zip(rows["index"], rows["draw"], strict=True)
        clips = [self._read(int(i), int(draw)) for i, draw in pairs]
        return {
            "audio": np.stack([audio for audio, _ in clips]),
            "length": np.array([length for _, length in clips], np.int32),
            "target": self.source.targets(rows["index"]),
            **rows,
        }

    def _read(self, index: int, draw: int) -> Fitted:
        if self.stored is not None:
            return self.stored.read(index, lambda: self._fit(index, draw))
        return self._fit(index, draw)

    def _fit(self, index: int, draw: int) -> Fitted:
        log_mel = self.source.log_mel(index)
        if log_mel is not None:
            start = self._draw_start(len(log_mel) - self.frontend.frames, draw)
            return self.frontend.fit_log_mel(log_mel, start=start)
        waveform = self.source.waveform(index)
        start = self._draw_start(len(waveform) - self.frontend.samples, draw)
        return self.frontend.fit(waveform, start=start)

    def _draw_start(self, spare: int, draw: int) -> int:
        if self.crop == "start" or spare <= 0:
            return 0
        return int(np.random.default_rng(draw).integers(spare + 1))


@dataclasses.dataclass(frozen=True)
class _RowMaker:
    """Makes the row of a clip with its weight; every clip counts once without weights."""

    weights: np.ndarray | None

    def make(self, index: int, draw: int) -> dict[str, Any]:
        weight = 1.0 if self.weights is None else self.weights[index]
        return {"index": np.int32(index), "draw": np.int64(draw), "weight": np.float32(weight)}

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.make(index, int(rng.integers(2**63 - 1)))

    def place(self, index: int) -> dict[str, Any]:
        return self.make(index, 0)


@dataclasses.dataclass(frozen=True)
class _ClipDrawer:
    """Draws a clip with replacement.

    Attributes:
        ends: the sums of the clips' probabilities up to each.
        row: makes its row.
    """

    ends: np.ndarray
    row: _RowMaker

    def draw(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
        index = np.searchsorted(self.ends, rng.random() * self.ends[-1], side="right")
        return self.row.draw(int(min(index, len(self.ends) - 1)), rng)


def pad_batch(batch: dict[str, np.ndarray], *, size: int) -> dict[str, np.ndarray]:
    """Fill the last batch to `size` by repeating its rows in turn with weight 0.

    Batch statistics, which count every row, then stay close to those of the clips.
    """
    missing = size - len(batch["index"])
    if not missing:
        return batch
    rows = np.arange(size) % (size - missing)
    padded = {name: values[rows] for name, values in batch.items()}
    padded["weight"][size - missing :] = 0
    return padded


def _batch(rows: grain.MapDataset, size: int, load: ClipLoader, local: np.ndarray | None) -> Any:
    """Padded batches of `size` rows; of each, the rows of this process with their clips."""
    batches = rows.batch(size, drop_remainder=False).map(lambda batch: pad_batch(batch, size=size))
    if local is not None and len(local) < size:
        batches = batches.map(lambda batch: {name: v[local] for name, v in batch.items()})
    return batches.map(load)


def _iterate(batches: Any, threads: int) -> grain.IterDataset:
    prefetch = 4 if threads else 0
    return batches.to_iter_dataset(grain.ReadOptions(threads, prefetch))


def count_batches(source: Source, batch_size: int, buckets: Sequence[Bucket] = ()) -> int:
    """Count the batches of one pass; the last of each bucket may be partly padding."""
    sizes = [len(bucket.rows) for bucket in buckets] or [len(source)]
    return sum(-(-size // batch_size) for size in sizes)


def make_train_batches(
    source: Source,
    frontend: FrontEnd,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    crop: Crop = "start",
    threads: int = 2,
    rows: np.ndarray | None = None,
    stored: Stored | None = None,
    buckets: Sequence[Bucket] = (),
    weights: np.ndarray | None = None,
    balance: Balance = "none",
) -> grain.IterDataset:
    """Make the shuffled batches of all epochs; every epoch has every clip once, in a new order.

    With balanced sampling an epoch has as many clips, drawn with replacement. The last batch of an
    epoch is filled with rows of weight 0, so every batch has the compiled shape. Iterators have
    `get_state` and `set_state`.

    Args:
        source: clips and their labels.
        frontend: gives the fixed length.
        batch_size: rows per batch.
        epochs: passes over the source.
        seed: seed of order and crops.
        crop: where a clip that is too long is cut: at its `start`, or anywhere (`random`).
        threads: reading threads.
        rows: the rows of each batch that are read here, where several processes share a batch;
            the order is the same for any number of processes. None reads all.
        stored: what batches hold in place of the sounds.
        buckets: clips that are read at lengths of their own, each batch of one length, in a new
            order of clips and of batches every epoch; without buckets all have the front end's
            length.
        weights: of each clip in the loss `[n]`, above 0; 1 by default. In balanced sampling they
            belong to the probabilities, and the loss has none.
        balance: `none`, or `sampler` (see `aatjax.data.sampling`), which takes no buckets.

    Raises:
        UsageError: the source is empty, or the batch size is below 1; balanced with buckets.
    """
    _check(source, batch_size)
    if balance == "sampler" and buckets:
        raise UsageError("balanced sampling draws clips of all lengths: omit the buckets")
    load = ClipLoader(source, frontend, crop, stored)
    row = _RowMaker(weights)
    if buckets:
        parts = []
        for bucket in buckets:
            order = grain.MapDataset.source([int(i) for i in bucket.rows])
            order = order.seed(seed).shuffle().random_map(row.draw)
            short = dataclasses.replace(load, frontend=bucket.frontend)
            parts.append(_batch(order, batch_size, short, rows))
        batches = grain.MapDataset.concatenate(parts).seed(seed).shuffle()
    else:
        order = grain.MapDataset.range(len(source)).seed(seed)
        if balance == "sampler":
            drawer = _ClipDrawer(np.cumsum(compute_draw_shares(source, weights)), _RowMaker(None))
            order = order.random_map(drawer.draw)
        else:
            order = order.shuffle().random_map(row.draw)
        batches = _batch(order, batch_size, load, rows)
    return _iterate(batches.repeat(epochs), threads)


def make_eval_batches(
    source: Source,
    frontend: FrontEnd,
    *,
    batch_size: int,
    threads: int = 2,
    rows: np.ndarray | None = None,
    stored: Stored | None = None,
) -> grain.IterDataset:
    """Make batches in the source's order, cut at the start; the last is padded with weight 0.

    Args:
        source, frontend, batch_size, threads, rows: as in `make_train_batches`.
    """
    _check(source, batch_size)
    load = ClipLoader(source, frontend, "start", stored)
    order = grain.MapDataset.range(len(source)).map(_RowMaker(None).place)
    return _iterate(_batch(order, batch_size, load, rows), threads)


def _check(source: Source, batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if not len(source):
        raise UsageError(f"{source.name} has no clips")
