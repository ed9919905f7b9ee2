"""Sound files of any length, several in one pass, in memory that does not grow with them.

Files are decoded and resampled block by block and cut into windows; windows of different files
share batches of one size, so that one program is compiled and few rows are computed in vain. While
the device computes a batch the next one is read.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import jax
import numpy as np
from jaxtyping import Float, Int16

from aatjax.audio.decode import decode_blocks
from aatjax.audio.waveform import AudioError
from aatjax.errors import UsageError
from aatjax.inference.classifier import BATCH, RATE, Classifier, Cut, cut, step_of
from aatjax.inference.segmentation import Rules, Segmenter, Track
from aatjax.io.atomic import open_output, report_write_errors

_ROWS = 1024  # of a row group in Parquet


@dataclasses.dataclass(frozen=True)
class Heard:
    """Consecutive windows of one file.

    Attributes:
        file: its number, from 0.
        spans: first and last sample of each window, at 16 kHz.
        probabilities: calibrated, `[w, c]`.
        plain: those at temperature 1, `[w, c]`.
        vectors: the mean patch token of each window before the head `[w, d]`, if asked for.
    """

    file: int
    spans: tuple[tuple[int, int], ...]
    probabilities: Float[np.ndarray, "w c"]
    plain: Float[np.ndarray, "w c"]
    vectors: Float[np.ndarray, "w d"] | None = None


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of one file.

    Attributes:
        file: its number, from 0.
        samples: how many were heard, at 16 kHz.
        error: why that was nothing, or not the whole file; None for a whole one.
    """

    file: int
    samples: int
    error: AudioError | None = None


def hear(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    *,
    hop: float | None = None,
    batch: int = BATCH,
    vectors: bool = False,
) -> Iterator[Heard | Ended]:
    """The windows of files, in the order of files and time, each file followed by its `Ended`.

    A file that breaks off inside is heard up to there. What is held at a time is two batches of
    windows and a block of a file.

    Args:
        classifier: the model.
        files: sound files.
        hop: seconds between window starts; by default windows do not overlap.
        batch: windows computed at a time.
        vectors: the model's vectors too.

    Raises:
        UsageError: a hop or batch that cannot be.
    """
    if batch < 1:
        raise UsageError(f"batch size {batch} must be at least 1")
    step = step_of(classifier.frontend, hop)
    return _hear(classifier, files, step, batch, vectors)


def segments(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    rules: Rules | None = None,
    *,
    hop: float | None = None,
    batch: int = BATCH,
) -> Iterator[Track | AudioError]:
    """What is heard when, a `Track` for each file in order, or why it cannot be read.

    Args:
        classifier: the model.
        files: sound files of any length.
        rules: how windows become segments.
        hop: seconds between window starts; by default windows do not overlap.
        batch: windows computed at a time, of one file or several.

    Raises:
        UsageError: rules, a hop or a batch that cannot be.
    """
    joined = Joined(classifier, files, rules or Rules(), hop)
    events = hear(classifier, files, hop=hop, batch=batch)
    return (track for track in map(joined.take, events) if track is not None)


class Joined:
    """The windows of `hear` joined to a `Track` for each file.

    Raises:
        UsageError: rules that do not fit the model or the hop.
    """

    def __init__(
        self,
        classifier: Classifier,
        files: Sequence[str | os.PathLike[str]],
        rules: Rules,
        hop: float | None,
    ) -> None:
        step = step_of(classifier.frontend, hop)
        self._files = files
        self._make = lambda: Segmenter(
            classifier.classes,
            rules,
            size=classifier.frontend.samples,
            step=step,
            multi_label=classifier.multi_label,
            decisions=classifier.decisions,
        )
        self._segmenter = self._make()

    def take(self, event: Heard | Ended) -> Track | AudioError | None:
        """A track, or the reason for none, at the end of a file; None before it."""
        if isinstance(event, Heard):
            self._segmenter.push(event.probabilities, event.plain)
            return None
        found = self._segmenter.finish(event.samples)
        self._segmenter = self._make()
        if event.error is not None and not event.samples:
            return event.error
        path, why = os.fspath(self._files[event.file]), event.error
        return Track(path, event.samples / RATE, found, None if why is None else str(why))


def _hear(
    classifier: Classifier,
    files: Sequence[str | os.PathLike[str]],
    step: int,
    batch: int,
    vectors: bool,
) -> Iterator[Heard | Ended]:
    channels = classifier.frontend.channels
    queue: list[tuple[int, Cut] | Ended] = []
    flight: tuple[list[tuple[int, Cut] | Ended], tuple[jax.Array, ...]] = ([], ())
    windows = 0
    for number, path in enumerate(files):
        said: list[AudioError] = []
        samples = 0
        blocks = _until_cut(decode_blocks(path, channels=channels), said)
        for window in cut(blocks, classifier.frontend, step):
            queue.append((number, window))
            samples = window.span[1]
            windows += 1
            if windows == batch:
                begun = _begin(classifier, queue, batch, vectors)
                yield from _told(*flight)
                flight, queue, windows = begun, [], 0
        queue.append(Ended(number, samples, said[0] if said else None))
    yield from _told(*flight)
    yield from _told(*_begin(classifier, queue, batch, vectors))


def _until_cut(
    blocks: Iterator[Int16[np.ndarray, " n"]], said: list[AudioError]
) -> Iterator[Int16[np.ndarray, " n"]]:
    """Blocks up to an error, which is noted."""
    try:
        yield from blocks
    except AudioError as error:
        said.append(error)


def _begin(
    classifier: Classifier, queue: list[tuple[int, Cut] | Ended], batch: int, vectors: bool
) -> tuple[list[tuple[int, Cut] | Ended], tuple[jax.Array, ...]]:
    """Starts a batch; its results are waited for in `_told`."""
    windows = [item[1] for item in queue if not isinstance(item, Ended)]
    return queue, classifier.run(windows, batch, vectors=vectors) if windows else ()


def _told(
    queue: list[tuple[int, Cut] | Ended], results: tuple[jax.Array, ...]
) -> Iterator[Heard | Ended]:
    arrays = [np.asarray(result) for result in results]
    row = 0
    group: list[tuple[int, Cut]] = []
    for item in [*queue, None]:
        if group and (not isinstance(item, tuple) or item[0] != group[0][0]):
            part = [array[row : row + len(group)] for array in arrays]
            yield Heard(group[0][0], tuple(window.span for _, window in group), *part)
            row, group = row + len(group), []
        if isinstance(item, Ended):
            yield item
        elif item is not None:
            group.append(item)


# --- written down --------------------------------------------------------------------------------


class OutputFile:
    """A file that appears under its name when the block ends well, and not at all otherwise.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._output = open_output(path)
        self.file: BinaryIO

    def __enter__(self) -> Self:
        self.file = self._output.__enter__()
        return self

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with report_write_errors(self.path):
            self.file.write(data)

    def finish(self) -> None:
        """Write what is left at the end."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                with report_write_errors(self.path):
                    self.finish()
            except BaseException:
                self._output.__exit__(*sys.exc_info())
                raise
        self._output.__exit__(kind, error, trace)


class ParquetVectors(OutputFile):
    """Vectors as a Parquet table: `file`, `start`, `end` in seconds, `vector` of float32."""

    def __init__(self, path: Path, size: int) -> None:
        import pyarrow as pa

        super().__init__(path)
        kinds: list[tuple[str, Any]] = [
            ("file", pa.string()),
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("vector", pa.list_(pa.float32(), size)),
        ]
        self._schema = pa.schema(kinds)
        self._writer: Any = None
        self._rows: list[tuple[str, float, float, np.ndarray]] = []

    def add(self, name: str, heard: Heard) -> None:
        """Takes the windows of a file."""
        self._rows += rows_of(name, heard)
        if len(self._rows) >= _ROWS:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with report_write_errors(self.path):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.file, self._schema)
            columns = list(zip(*self._rows, strict=True)) or [(), (), (), ()]
            vectors = np.concatenate([*columns[3], np.zeros(0, np.float32)])
            kind = self._schema.field("vector").type
            arrays = [
                *(pa.array(c, self._schema.types[i]) for i, c in enumerate(columns[:3])),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors, pa.float32()), kind.list_size),
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []


class NpzVectors(OutputFile):
    """Vectors as `file`, `start`, `end` (seconds) and `vector` in an .npz that needs no pickle."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self._size = size
        self._names: list[str] = []
        self._times: list[tuple[float, float]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        with report_write_errors(self.path):
            # The head of an array tells its length, so the rows wait in a file of their own.
            self._waiting = tempfile.TemporaryFile(dir=self.path.parent)
        return self

    def add(self, name: str, heard: Heard) -> None:
        """Takes the windows of a file."""
        for text, start, end, vector in rows_of(name, heard):
            self._names.append(text)
            self._times.append((start, end))
            with report_write_errors(self.path):
                self._waiting.write(vector.astype("<f4").tobytes())

    def finish(self) -> None:
        from zipfile import ZipFile

        times = np.array(self._times, np.float64).reshape(-1, 2)
        arrays = {"file": np.array(self._names, np.str_), "start": times[:, 0], "end": times[:, 1]}
        with ZipFile(self.file, "w", allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
            with archive.open("vector.npy", "w", force_zip64=True) as entry:
                head = {"descr": "<f4", "fortran_order": False, "shape": (len(times), self._size)}
                np.lib.format.write_array_header_1_0(entry, head)
                self._waiting.seek(0)
                shutil.copyfileobj(self._waiting, entry)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._waiting.close()


def vectors_to(path: Path, size: int) -> ParquetVectors | NpzVectors:
    """A writer of vectors of `size` numbers by the ending of a name, to be used in `with`.

    Raises:
        UsageError: another ending than .npz or .parquet.
    """
    check_ending(path)
    return NpzVectors(path, size) if path.suffix == ".npz" else ParquetVectors(path, size)


def check_ending(path: Path) -> None:
    """Raises UsageError unless a name ends in .npz or .parquet."""
    if path.suffix not in (".npz", ".parquet"):
        raise UsageError(f"{path}: vectors are written as .npz or .parquet: name it so")


def rows_of(name: str, heard: Heard) -> Iterable[tuple[str, float, float, np.ndarray]]:
    """File, start, end and vector of each window; bytes that are no UTF-8 are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if heard.vectors is None:
        raise UsageError("these windows have no vectors: ask for them with vectors=True")
    return [
        (text, start / RATE, end / RATE, vector)
        for (start, end), vector in zip(heard.spans, heard.vectors, strict=True)
    ]
