"""Opens weights by their name or in memory, without reading the numbers."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from aatjax.convert.detect import find_wrapper
from aatjax.convert.lazy_tensor import StoredTensor
from aatjax.convert.memory import open_memory
from aatjax.convert.tensor_files import TensorFile, open_tensors
from aatjax.errors import DataError


def open_weights(source: object) -> TensorFile:
    """Open a file, a folder, or weights in memory.

    PETL_AST's models hold their parts twice (`model.encoder` is `encoder`): the copies must be
    equal, and are one.

    Raises:
        DataError: see `open_tensors`; or such copies differ.
    """
    named = isinstance(source, str | os.PathLike)
    file = open_tensors(Path(source)) if named else open_memory(source)
    wrapper = find_wrapper(file.tensors)
    if f"{wrapper}classification_head.weight" not in file.tensors:
        return file
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        short = wrapper + name.removeprefix(wrapper).removeprefix("model.")
        other = tensors.setdefault(short, tensor)
        if other is not tensor and not (
            other.shape == tensor.shape
            and np.array_equal(other.load(), tensor.load(), equal_nan=True)
        ):
            raise DataError(
                f"{file.path}: {short} and {wrapper}model.{short.removeprefix(wrapper)} differ, "
                "which PETL_AST saves as one: the file was changed"
            )
    return dataclasses.replace(file, tensors=tensors)
