"""Source and fingerprint of a model's backbone."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from aatjax.io.digest import hash_arrays


@dataclasses.dataclass(frozen=True)
class Origin:
    """The source of a backbone.

    Attributes:
        source: what was given to `aatjax.load`: a path, a repository id, `embedded`, `random:...`.
        fingerprint: SHA-256 of the backbone's tensors as they were in the source.
        seed: seed of random weights (of the head; of everything in `random:...` and after a reset).
        revision: commit or branch of a repository id, where one was asked for.
        rgb: how the colour channels of an ImageNet patch kernel became one.
        reset: the weights were replaced by random ones of the same shape.
    """

    source: str
    fingerprint: str
    seed: int = 0
    revision: str | None = None
    rgb: Literal["sum", "mean"] = "sum"
    reset: bool = False


@dataclasses.dataclass(frozen=True)
class LoadedArrays:
    """Digests of a model's arrays as they were loaded, so that a later change is found.

    Attributes:
        digests: (path, SHA-256) of every array.
    """

    digests: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "LoadedArrays":
        """Return the digests of arrays by path."""
        return cls(tuple((path, _digest(value)) for path, value in arrays.items()))

    def find_changed(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """Return the paths of arrays that are not as they were loaded, or were not loaded."""
        known = dict(self.digests)
        return [path for path, value in arrays.items() if known.get(path) != _digest(value)]

    def replace(self, arrays: Mapping[str, np.ndarray]) -> "LoadedArrays":
        """Return the digests with those of some arrays replaced."""
        changed = LoadedArrays.of(arrays).digests
        return LoadedArrays(tuple({**dict(self.digests), **dict(changed)}.items()))


def _digest(value: np.ndarray) -> str:
    return hash_arrays({"": value})


def fingerprint_backbone(params: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, shapes and float32 values of all tensors outside the head.

    Trained pooling (`aatjax.models.pool`) is part of the head.
    """
    body = {n: value for n, value in params.items() if not n.startswith(("head/", "pool/"))}
    return hash_arrays(body, dtype=np.float32)
