"""An export's folder: what its `export.json` says, sealed with hashes that are checked again."""

import json
from pathlib import Path
from typing import Any

from aatjax.errors import DataError, printable
from aatjax.io.digest import hash_file, hash_json
from aatjax.io.json_file import write_json

FORMAT = 1
MANIFEST = "export.json"
CARD = "README.md"
MOST_BYTES = 64_000_000
"""Of `export.json`: a larger one is not ours."""


def seal(folder: Path, entries: dict[str, Any]) -> None:
    """Writes `export.json`: the entries, and the SHA-256 of every file but the card."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hash_file(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and file != folder / CARD
    }
    whole = {**entries, "format": FORMAT, "kind": "export", "files": files}
    write_json(folder / MANIFEST, {**whole, "sha256": hash_json(whole)})


def read_bundle(folder: str | Path) -> dict[str, Any]:
    """The entries of an export whose files are all as they were written.

    The hashes find damage and changes; they are no signature, and do not tell who wrote it.

    Raises:
        DataError: no export, another version of the format, or anything was changed since.
    """
    folder = Path(folder)
    name = printable(folder)
    place = folder / MANIFEST
    try:
        if place.stat().st_size > MOST_BYTES:
            raise DataError(f"{name}: {MANIFEST} is too large to be an export's")
        entries = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{name}: not an export of aatjax, its {MANIFEST} is missing or damaged: export anew"
        ) from None
    if not isinstance(entries, dict) or entries.get("kind") != "export":
        raise DataError(f"{name}: {MANIFEST} is not that of an aatjax export")
    found = entries.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        raise DataError(
            f"{name}: export format {str(found)[:20]} is {'newer' if newer else 'older'} than this "
            f"aatjax reads ({FORMAT}): "
            f"{'install a newer aatjax' if newer else 'export the adapter again'}"
        )
    if entries.pop("sha256", None) != hash_json(entries):
        raise DataError(f"{name}: {MANIFEST} was changed after the export: export anew")
    for file, told in entries["files"].items():
        _check(folder, file, told)
    return entries


def _check(folder: Path, file: str, told: dict[str, Any]) -> None:
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise DataError(f"{printable(folder)}: {MANIFEST} names a file outside: {printable(file)}")
    if not path.is_file():
        raise DataError(f"{printable(path)}: is missing from the export: copy or export it anew")
    if path.stat().st_size != told["bytes"] or hash_file(path) != told["sha256"]:
        raise DataError(f"{printable(path)}: was changed after the export (hash): export anew")
