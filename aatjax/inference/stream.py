"""Sound files of any length in shared batches, in constant memory.

Files are decoded and resampled block by block and cut into windows. Windows of different files
share batches of one size: one program is compiled and few rows are padding. The next batch is read
while the device computes.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int16

from aatjax.audio.decode import decode_blocks
from aatjax.audio.scoring import explain_unscored
from aatjax.audio.waveform import AudioError
from aatjax.audio.windows import RATE, Window, compute_step, cut_windows
from aatjax.errors import UsageError
from aatjax.inference.classifier import BATCH, Classifier
from aatjax.inference.prediction import WindowLogits
from aatjax.inference.segmentation import SegmentationRules, Segmenter, Track


@dataclasses.dataclass(frozen=True)
class StreamResult:
    """Consecutive windows of one file.

    Attributes:
        file: its number, from 0.
        windows: their logits and spans, at 16 kHz.
        vectors: the mean patch token of each window before the head `[w, d]`, if requested.
    """

    file: int
    windows: WindowLogits
    vectors: Float[np.ndarray, "w d"] | None = None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and last sample of each window."""
        return self.windows.spans

    @property
    def logits(self) -> Float[np.ndarray, "w c"]:
        """Logits `[w, c]`."""
        return self.windows.logits


@dataclasses.dataclass(frozen=True)
class StreamEnd:
    """The end of one file.

    Attributes:
        file: its number, from 0.
        samples: number of samples read, at 16 kHz.
        error: why the file could not be read, or not to its end; None for a complete one.
        notes: what is odd with it.
    """

    file: int
    samples: int
    error: AudioError | None = None
    notes: tuple[str, ...] = ()


def stream_windows(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    *,
    hop: float | None = None,
    batch: int = BATCH,
    vectors: bool = False,
) -> Iterator[StreamResult | StreamEnd]:
    """Yield the windows of files in the order of files and time, each file with its `StreamEnd`.

    A truncated file is read up to the damage. Two batches of windows and one block of a file are
    in memory at a time.

    Args:
        classifier: the model.
        files: sound files.
        hop: seconds between window starts; by default those of the classifier's scoring.
        batch: windows per batch, of one file or several.
        vectors: return the model's vectors too.

    Raises:
        UsageError: an invalid hop or batch.
    """
    if batch < 1:
        raise UsageError(f"batch size {batch} must be at least 1")
    step = compute_step(classifier.frontend.samples, classifier.find_hop(hop))
    return _stream(classifier, files, step, batch, vectors)


def segment_files(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    rules: SegmentationRules | None = None,
    *,
    hop: float | None = None,
    batch: int = BATCH,
) -> Iterator[Track | AudioError]:
    """Yield a `Track` of segments for each file in order, or the reason why it cannot be read.

    The arguments are those of `stream_windows`, and the `rules` by which windows become segments.

    Raises:
        UsageError: an invalid rule, hop or batch.
    """
    events = stream_windows(classifier, files, hop=hop, batch=batch)
    return segment_stream(classifier, files, events, rules or SegmentationRules(), hop=hop)


def segment_stream(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    events: Iterable[StreamResult | StreamEnd],
    rules: SegmentationRules,
    *,
    hop: float | None = None,
) -> Iterator[Track | AudioError]:
    """Return what `segment_files` does, from the events of `stream_windows`."""
    make = functools.partial(
        Segmenter,
        classifier.classes,
        rules,
        size=classifier.frontend.samples,
        step=compute_step(classifier.frontend.samples, classifier.find_hop(hop)),
        multi_label=classifier.multi_label,
        calibration=classifier.calibration,
    )
    make()  # checks the rules before anything is computed

    def segment() -> Iterator[Track | AudioError]:
        segmenter = make()
        for event in events:
            if isinstance(event, StreamResult):
                audible = ~event.windows.silent[:, None]  # a silent window has no class
                pair = classifier.calibrate(event.windows.logits)
                segmenter.push(*(np.where(audible, part, 0.0) for part in pair))
                continue
            segments, error = segmenter.finish(event.samples), event.error
            if error is not None and not event.samples:
                yield error
            else:
                path, cut = os.fspath(files[event.file]), None if error is None else str(error)
                if explain_unscored(event.samples, has_sound=True) is not None:
                    segments = ()
                yield Track(path, event.samples / RATE, segments, cut, event.notes)
            segmenter = make()

    return segment()


Queue = list[tuple[int, Window] | StreamEnd]
"""Windows with the number of their file, and the ends of files."""


def _stream(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    step: int,
    batch: int,
    vectors: bool,
) -> Iterator[StreamResult | StreamEnd]:
    channels = classifier.frontend.channels
    queue: Queue = []
    running: tuple[Queue, tuple[jax.Array, ...]] = ([], ())

    def start(queue: Queue) -> tuple[Queue, tuple[jax.Array, ...]]:
        windows = [item[1] for item in queue if not isinstance(item, StreamEnd)]
        return queue, classifier.run(windows, batch, vectors=vectors) if windows else ()

    count = 0
    for number, path in enumerate(files):
        errors: list[AudioError] = []
        notes: list[str] = []
        read = [0]  # samples
        blocks = decode_blocks(path, channels=channels, notes=notes)
        blocks = _read_until_error(blocks, errors, read)
        for window in cut_windows(blocks, classifier.frontend, step):
            queue.append((number, window))
            count += 1
            if count == batch:
                started = start(queue)
                yield from _collect(*running)
                running, queue, count = started, [], 0
        error = errors[0] if errors else None
        if error is not None and read[0]:
            notes.append(str(error).rpartition(": ")[2])
        queue.append(StreamEnd(number, read[0], error, tuple(notes)))
    yield from _collect(*running)
    yield from _collect(*start(queue))


def _read_until_error(
    blocks: Iterator[Int16[np.ndarray, " n"]], errors: list[AudioError], read: list[int]
) -> Iterator[Int16[np.ndarray, " n"]]:
    try:
        for block in blocks:
            read[0] += block.size
            yield block
    except AudioError as error:
        errors.append(error)


def _collect(queue: Queue, results: tuple[jax.Array, ...]) -> Iterator[StreamResult | StreamEnd]:
    """Wait for the results of a batch and group them by file."""
    arrays = [np.asarray(result) for result in results]
    row = 0
    for number, items in itertools.groupby(queue, key=_find_file):
        group = list(items)
        windows = [item[1] for item in group if not isinstance(item, StreamEnd)]
        if windows:
            logits, *vectors = (array[row : row + len(windows)] for array in arrays)
            yield StreamResult(number, WindowLogits.from_windows(logits, windows), *vectors)
            row += len(windows)
        yield from (item for item in group if isinstance(item, StreamEnd))


def _find_file(item: tuple[int, Window] | StreamEnd) -> int:
    return item.file if isinstance(item, StreamEnd) else item[0]
