"""JSON files: written completely or not at all, read with limits."""

import collections
import json
import os
from pathlib import Path
from typing import Any

from aatjax.errors import DataError, printable
from aatjax.io.atomic import write_text

LIMIT = 64 * 2**20


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file.

    Raises:
        WriteError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Return JSON text as a value.

    Raises:
        ValueError: it is none, or a name stands twice in an object.
        RecursionError: objects or lists lie in each other many times.
    """
    return json.loads(text, object_pairs_hook=_collect)


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name[:80]!r} appears twice")
    return found


def read_json(path: Path, *, limit: int = LIMIT, advice: str = "write the file again") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        limit: most bytes.
        advice: what to do about a missing or damaged file, for the message.

    Raises:
        DataError: missing, too large, or not JSON.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size or limit  # 0 where it is no regular file
            data = file.read(min(size, limit) + 1)
        if len(data) > limit:
            raise ValueError(f"more than {limit} bytes")
        return json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        why = error.strerror or error
    except (ValueError, RecursionError) as error:
        why = f"not JSON: {printable(str(error)[:200])}"
    raise DataError(f"{printable(path)}: cannot be read: {why}; {advice}")


def read_json_object(
    path: Path, *, limit: int = LIMIT, advice: str = "write the file again"
) -> dict[str, Any]:
    """Read a JSON file that holds an object, see `read_json`."""
    value = read_json(path, limit=limit, advice=advice)
    if not isinstance(value, dict):
        raise DataError(f"{printable(path)}: cannot be read: not a JSON object; {advice}")
    return value
