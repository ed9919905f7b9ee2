"""SHA-256 of text, JSON, files and arrays, as lower-case hexadecimal digits.

Run folders, adapter files, exports and prepared sets keep these digests: none may change.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def hash_bytes(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def hash_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines joined by line feeds, which need not be in memory together."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(f"\n{line}".encode() if number else line.encode())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(value, sort_keys=True))


def hash_file(path: Path, kind: str = "sha256") -> str:
    """Return the digest of a file's content by an algorithm of `hashlib`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def hash_arrays(
    arrays: Mapping[str, Any],
    *,
    start: bytes = b"",
    dtype: type[np.generic] | None = None,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> str:
    """Return the SHA-256 of named arrays: names, shapes, types and values.

    Args:
        arrays: arrays by name; their order does not matter.
        start: bytes that come first.
        dtype: convert values to this type, and leave the type itself out of the digest.
        fetch: turns a value into a NumPy array, one at a time.
    """
    digest = hashlib.sha256(start)
    for name in sorted(arrays):
        value = np.ascontiguousarray(fetch(arrays[name]), dtype)
        kind = value.dtype if dtype is None else ""
        digest.update(f"{name}{value.shape}{kind}".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
