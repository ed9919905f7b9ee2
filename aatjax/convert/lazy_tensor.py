"""Tensors in a file: shape and type are known, the numbers are read on demand."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from aatjax.errors import DataError

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file.

    Attributes:
        shape: its shape.
        dtype: NumPy (or ml_dtypes) name of its type.
        load: reads the numbers.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)


def make_dtype(name: str) -> np.dtype:
    """Return the NumPy type of a `StoredTensor.dtype`."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_array(
    path: Path,
    begin: int,
    length: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> Shaped[np.ndarray, "..."]:
    """Read a run of bytes as an array; places and shape were checked before.

    Args:
        path: the file.
        begin: first byte.
        length: number of bytes.
        dtype: type of the numbers.
        shape: shape of the array.
        strides: steps along the axes in items, if they are not laid out row by row.

    Raises:
        DataError: the file is shorter than when it was opened.
    """
    kind = make_dtype(dtype)
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(length)
    if len(data) < length:
        raise DataError(f"{path}: the file became shorter while it was read")
    flat = np.frombuffer(data, kind)
    if strides is None or 0 in shape:
        return flat.reshape(shape)
    steps = [step * kind.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
