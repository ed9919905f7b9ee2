"""Weights that are in memory already: a transformers model, a state dictionary, NumPy arrays."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aatjax.convert.lazy_tensor import StoredTensor
from aatjax.convert.tensor_files import TensorFile
from aatjax.errors import UsageError

NAME = "weights in memory"
"""The source of a model that was loaded from memory, in its `origin` and in messages."""


class HasStateDict(Protocol):
    """A model as those of PyTorch and transformers."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return its tensors by name."""
        ...


def open_memory(source: object) -> TensorFile:
    """Return the tensors of a model or of a mapping, as if they were read from a file.

    Args:
        source: an object with `state_dict()` (and, as in transformers, `config`), or a mapping of
            tensor names to arrays of PyTorch, JAX or NumPy.

    Raises:
        UsageError: it is neither.
    """
    config = None
    if callable(states := getattr(source, "state_dict", None)):
        described = getattr(source, "config", None)
        if described is not None:  # as in config.json, where all keys are text
            config = json.loads(json.dumps(described.to_dict(), default=str))
        source = states()
    if not isinstance(source, Mapping) or not source:
        raise UsageError(
            f"aatjax.load takes a path, a repository id, a transformers model, a state dictionary "
            f"or a dictionary of arrays, not {type(source).__name__}"
        )
    tensors = {str(name): _describe(str(name), value) for name, value in source.items()}
    size = sum(8 * tensor.size for tensor in tensors.values())
    return TensorFile(Path(NAME), tensors, {}, config, size, "memory")


def _describe(name: str, value: Any) -> StoredTensor:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise UsageError(f"{NAME}: {name} is a {type(value).__name__}, not an array")

    def load() -> np.ndarray:
        if hasattr(value, "detach"):  # PyTorch; NumPy has no bfloat16
            return value.detach().to("cpu").float().numpy()
        return np.asarray(value)

    return StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), load)


def is_in_memory(source: object) -> bool:
    """Return whether a source of `aatjax.load` is weights, and not the name of some."""
    return not isinstance(source, str | os.PathLike)
