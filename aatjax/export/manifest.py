"""The manifest of an export: its entries and the hashes of its files, in `export.json`."""

import dataclasses
from pathlib import Path
from typing import Any

from aatjax.errors import DataError, UsageError, printable
from aatjax.io.digest import hash_file, hash_json
from aatjax.io.json_fields import read_json_fields, shorten
from aatjax.io.json_file import read_json_object, write_json

FORMAT = 1
MANIFEST = "export.json"
CARD = "README.md"
MOST_BYTES = 64_000_000  # of `export.json`
AGAIN = "export the adapter again"


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of a file of an export."""

    bytes: int
    sha256: str


def seal_bundle(folder: Path, entries: dict[str, Any]) -> None:
    """Write `export.json`: the entries, and the SHA-256 of every file but the card."""
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
    """Return the entries of an export whose files are unchanged.

    The hashes find damage and changes; they are no signature.

    Raises:
        DataError: not an export, another version of the format, or changed since.
    """
    folder = Path(folder)
    name = printable(folder)
    try:
        entries = read_json_object(folder / MANIFEST, limit=MOST_BYTES)
    except DataError as error:
        raise DataError(
            f"{name}: not an export of aatjax, its {MANIFEST} is missing or damaged: {AGAIN}"
        ) from error
    if entries.get("kind") != "export":
        raise DataError(f"{name}: {MANIFEST} is not that of an aatjax export")
    found = entries.get("format")
    if type(found) is not int or found != FORMAT:
        newer = type(found) is int and found > FORMAT
        age, advice = ("newer", "install a newer aatjax") if newer else ("older", AGAIN)
        raise DataError(
            f"{name}: export format {shorten(found)} is {age} than this aatjax reads ({FORMAT}): "
            f"{advice}"
        )
    if entries.pop("sha256", None) != hash_json(entries):
        raise DataError(f"{name}: {MANIFEST} was changed after the export: {AGAIN}")
    files = entries.get("files")
    if not isinstance(files, dict):
        raise DataError(f"{name}: {MANIFEST} has no list of files: {AGAIN}")
    for file, fields in files.items():
        try:
            expected = read_json_fields(f"files.{printable(file)[:80]}", fields, StoredFile)
        except UsageError as error:
            raise DataError(f"{name}: {MANIFEST}: {error}: {AGAIN}") from error
        _check_file(folder, file, expected)
    return entries


def _check_file(folder: Path, file: str, expected: StoredFile) -> None:
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file:
        raise DataError(f"{printable(folder)}: {MANIFEST} names a file outside: {printable(file)}")
    if not path.is_file():
        raise DataError(f"{printable(path)}: is missing from the export: {AGAIN}")
    if path.stat().st_size != expected.bytes or hash_file(path) != expected.sha256:
        raise DataError(f"{printable(path)}: was changed after the export (hash): {AGAIN}")
