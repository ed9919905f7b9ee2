"""From a source to batches: Grain, deterministic by (seed, epoch, index)."""

import dataclasses
from typing import Any, Literal

import grain
import numpy as np

from aatjax.audio.frontend import FrontEnd
from aatjax.data.clips import Clip, Reader, Source
from aatjax.errors import UsageError

Crop = Literal["start", "random"]


@dataclasses.dataclass(frozen=True)
class _Memory(Reader):
    """Keeps every waveform after its first reading."""

    reader: Reader
    waveforms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def read(self, clip: Clip) -> np.ndarray:
        if clip.id not in self.waveforms:
            self.waveforms[clip.id] = self.reader.read(clip)
        return self.waveforms[clip.id]

    def key(self, clip: Clip) -> str | None:
        return self.reader.key(clip)


def in_memory(source: Source) -> Source:
    """The same source, each waveform read (or synthesised) once and then kept."""
    return source.with_clips(source.clips, reader=_Memory(source.reader))


@dataclasses.dataclass(frozen=True)
class _Load:
    """Clip number -> one example of fixed shape; `rng` places a random crop."""

    source: Source
    targets: np.ndarray
    frontend: FrontEnd
    crop: Crop

    def __call__(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        index = int(index)
        waveform = self.source.waveform(index)
        spare = len(waveform) - self.frontend.samples
        start = 0
        if self.crop == "random" and spare > 0 and rng is not None:
            start = int(rng.integers(spare + 1))
        audio, length = self.frontend.fit(waveform, start=start)
        return {
            "audio": audio,
            "length": np.int32(length),
            "target": self.targets[index],
            "weight": np.float32(1),
            "index": np.int32(index),
        }


def _pad(batch: dict[str, np.ndarray], *, size: int) -> dict[str, np.ndarray]:
    """Fills the last batch up to `size` by repeating its rows in turn with weight 0.

    In turn, so that batch statistics, which count every row, stay those of the clips.
    """
    missing = size - len(batch["index"])
    if not missing:
        return batch
    rows = np.arange(size) % (size - missing)
    padded = {name: values[rows] for name, values in batch.items()}
    padded["weight"][size - missing :] = 0
    return padded


def _threads(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 if threads else 0)


def batches_per_epoch(source: Source, batch_size: int) -> int:
    """Batches that one pass over the source makes; the last one may be partly padding."""
    return -(-len(source) // batch_size)


def train_batches(
    source: Source,
    frontend: FrontEnd,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    crop: Crop = "start",
    threads: int = 2,
) -> grain.IterDataset:
    """Shuffled batches of all epochs; every epoch is a new order and sees every clip once.

    The last batch of an epoch is filled up with rows of weight 0, so every batch has the shape
    that was compiled. Iterators can tell their state (`get_state`) and return to it
    (`set_state`).

    Args:
        source: clips and their labels.
        frontend: gives the fixed length.
        batch_size: rows a batch.
        epochs: passes over the source.
        seed: seed of order and crops.
        crop: where a clip that is too long is cut: at its `start`, or anywhere (`random`).
        threads: reading threads.

    Raises:
        UsageError: the source is empty, or the batch size is below 1.
    """
    _check(source, batch_size)
    load = _Load(source, source.targets(), frontend, crop)
    return (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .random_map(load)
        .batch(batch_size, drop_remainder=False)
        .map(lambda batch: _pad(batch, size=batch_size))
        .repeat(epochs)
        .to_iter_dataset(_threads(threads))
    )


def eval_batches(
    source: Source, frontend: FrontEnd, *, batch_size: int, threads: int = 2
) -> grain.IterDataset:
    """Batches in the source's order, cut at the start; the last one padded with weight 0."""
    _check(source, batch_size)
    load = _Load(source, source.targets(), frontend, "start")
    return (
        grain.MapDataset.range(len(source))
        .map(load)
        .batch(batch_size, drop_remainder=False)
        .map(lambda batch: _pad(batch, size=batch_size))
        .to_iter_dataset(_threads(threads))
    )


def _check(source: Source, batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if not len(source):
        raise UsageError(f"{source.name} has no clips: nothing to read")
