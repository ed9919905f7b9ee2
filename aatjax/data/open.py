"""One way to open any supported layout of labelled sounds."""

from pathlib import Path
from typing import Literal

from aatjax.data.clips import Source
from aatjax.data.manifest import Manifest
from aatjax.data.sources import ESC, AudioFolder, NamePattern
from aatjax.errors import DataError, UsageError

Format = Literal["auto", "synthetic", "folder", "manifest", "esc", "names"]
FSDD = r"(?P<label>\d)_(?P<group>[^_]+)_\d+\.wav"


def open_source(path: str | Path, format: Format = "auto", *, pattern: str | None = None) -> Source:
    """Opens labelled sounds.

    Args:
        path: a folder, or a CSV or JSON-lines file.
        format: the layout; `auto` goes by what lies there: a file is a manifest, `meta/esc50.csv`
            means ESC's layout, file names as in the Free Spoken Digit Dataset mean `names`, all
            else is a folder of class folders.
        pattern: regular expression for `names`.

    Raises:
        UsageError: a format or pattern that cannot be.
        DataError: nothing usable lies there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if format == "auto":
        format = "names" if pattern else _guess(path)
    match format:
        case "folder":
            return AudioFolder(path)
        case "manifest":
            return Manifest(path)
        case "esc":
            return ESC(path)
        case "names":
            return NamePattern(_recordings(path), pattern or FSDD)
        case "synthetic":
            raise UsageError("synthetic sounds have no path: leave data.path out")
    raise UsageError(
        f"unknown data format {format!r}: one of auto, synthetic, folder, manifest, esc, names"
    )


def _guess(path: Path) -> Format:
    if path.is_file():
        return "manifest"
    if (path / "meta" / "esc50.csv").exists():
        return "esc"
    if next(_recordings(path).glob("[0-9]_*_[0-9]*.wav"), None) is not None:
        return "names"
    return "folder"


def _recordings(path: Path) -> Path:
    return path / "recordings" if (path / "recordings").is_dir() else path
