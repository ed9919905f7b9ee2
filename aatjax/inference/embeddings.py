"""Files of window embeddings: .npz or Parquet with columns `file`, `start`, `end`, `vector`."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import numpy as np

from aatjax.audio.windows import RATE
from aatjax.errors import UsageError
from aatjax.inference.stream import StreamResult
from aatjax.io.atomic import open_output, report_write_errors
from aatjax.io.optional import need

Add = Callable[[str, StreamResult], None]
"""Adds the windows of a file by its name."""

_GROUP_ROWS = 1024  # per row group of a Parquet file


def check_embeddings_path(path: Path) -> None:
    """Raise UsageError unless a name ends in .npz or .parquet."""
    if path.suffix not in (".npz", ".parquet"):
        raise UsageError(f"{path}: embeddings are written as .npz or .parquet: change the ending")


@contextlib.contextmanager
def open_embeddings(path: Path, size: int) -> Iterator[Add]:
    """Open a file of vectors of `size` numbers, which appears if the block succeeds.

    Names of files that are not UTF-8 are escaped; times are in seconds; vectors are float32.

    Raises:
        UsageError: another ending than .npz or .parquet.
        WriteError: the file cannot be written.
    """
    check_embeddings_path(path)
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    with open_output(path) as file, write(path, file, size) as add:
        yield add


@contextlib.contextmanager
def _write_npz(path: Path, file: BinaryIO, size: int) -> Iterator[Add]:
    names: list[str] = []
    times: list[tuple[float, float]] = []
    with contextlib.ExitStack() as stack:
        with report_write_errors(path):
            # The header of an array holds its length, so the vectors wait in another file.
            vectors = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))

        def add(name: str, result: StreamResult) -> None:
            names.extend([_decode_name(name)] * len(result.spans))
            times.extend((start / RATE, end / RATE) for start, end in result.spans)
            with report_write_errors(path):
                vectors.write(_find_vectors(result).tobytes())

        yield add
        pairs = np.array(times, np.float64).reshape(-1, 2)
        columns = {"file": np.array(names, np.str_), "start": pairs[:, 0], "end": pairs[:, 1]}
        with report_write_errors(path), ZipFile(file, "w", allowZip64=True) as archive:
            for name, array in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
            with archive.open("vector.npy", "w", force_zip64=True) as entry:
                head = {"descr": "<f4", "fortran_order": False, "shape": (len(times), size)}
                np.lib.format.write_array_header_1_0(entry, head)
                vectors.seek(0)
                shutil.copyfileobj(vectors, entry)


@contextlib.contextmanager
def _write_parquet(path: Path, file: BinaryIO, size: int) -> Iterator[Add]:
    need("pyarrow", extra="huggingface")
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), size)
    fields = {"file": pa.string(), "start": pa.float64(), "end": pa.float64(), "vector": vector}
    schema = pa.schema(list(fields.items()))
    waiting: list[pa.RecordBatch] = []

    def flush() -> None:
        with report_write_errors(path):
            writer.write_table(pa.Table.from_batches(waiting, schema))
        waiting.clear()

    def add(name: str, result: StreamResult) -> None:
        spans = np.array(result.spans, np.float64).reshape(-1, 2) / RATE
        values = pa.array(_find_vectors(result).ravel())
        columns = [
            pa.array([_decode_name(name)] * len(spans), pa.string()),
            pa.array(spans[:, 0]),
            pa.array(spans[:, 1]),
            pa.FixedSizeListArray.from_arrays(values, size),
        ]
        waiting.append(pa.RecordBatch.from_arrays(columns, schema=schema))
        if sum(batch.num_rows for batch in waiting) >= _GROUP_ROWS:
            flush()

    with report_write_errors(path):
        writer = pq.ParquetWriter(file, schema)
    try:
        yield add
        flush()
    finally:
        with report_write_errors(path):
            writer.close()


def _decode_name(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _find_vectors(result: StreamResult) -> np.ndarray:
    if result.vectors is None:
        raise UsageError("these windows have no vectors: pass vectors=True to stream_windows")
    return result.vectors.astype("<f4")
