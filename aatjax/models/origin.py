"""Where a model's backbone came from, and the fingerprint that tells it from any other."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Origin:
    """The source of a backbone.

    Attributes:
        source: what was given to `aatjax.load`: a path, a repository id, `embedded`, `random:...`.
        fingerprint: SHA-256 of the backbone's tensors as they were in the source.
        seed: seed of random weights (of the head, or of everything in `random:...`).
    """

    source: str
    fingerprint: str
    seed: int = 0


def fingerprint(params: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values of all tensors outside the head."""
    digest = hashlib.sha256()
    for name in sorted(params):
        if name.startswith("head/"):
            continue
        value = np.ascontiguousarray(params[name], dtype=np.float32)
        digest.update(f"{name}{value.shape}".encode())
        digest.update(value.data)
    return digest.hexdigest()
