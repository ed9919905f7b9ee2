"""Unpacking of downloaded zip and tar archives, which are not trusted.

The rules are stricter than the `data` filter of tarfile: links are refused, not checked, and so are
names that would have to be changed.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from tarfile import HeaderError, ReadError
from typing import IO, Any, cast

from aatjax.errors import AatjaxError, DataError, WriteError, printable
from aatjax.io.atomic import open_output, remove_leftovers, report_write_errors, write_text

MARKER = ".unpacked.json"
COMPRESSIBLE = 16 * 2**20  # up to here any ratio is accepted: silence compresses well
BLOCK = 2**20
HEADERS = 2**16  # bytes of headers before one file of a tar
PADDING = 4096  # bytes of headers and padding per file of a tar, on average
TRAILER = 16 * 2**20  # bytes after the end of a tar
LONGEST_NAME, LONGEST_PART = 4096, 255

UNTRUSTED = "take it from a source you trust, or unpack it yourself and use the folder"
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
PACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
KINDS = {
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFCHR: "is a device node",
    stat.S_IFBLK: "is a device node",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
}
TYPES = {
    tarfile.SYMTYPE: KINDS[stat.S_IFLNK],
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: KINDS[stat.S_IFCHR],
    tarfile.BLKTYPE: KINDS[stat.S_IFBLK],
    tarfile.FIFOTYPE: KINDS[stat.S_IFIFO],
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}
Members = Generator["_Member", None, None]


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may hold.

    Attributes:
        members: number of files and folders.
        bytes: bytes of all files, unpacked.
        ratio: bytes unpacked per byte of the archive; not checked up to 16 MiB.
    """

    members: int = 500_000
    bytes: int = 200 * 2**30
    ratio: float = 100.0


@dataclass(frozen=True)
class _Member:
    """A file or folder of an archive.

    Attributes:
        name: as the archive has it.
        size: declared bytes; None for a folder.
        refusal: why it is refused, or "".
        unpacked: bytes that the archive has unpacked up to the end of this member.
        read: yields its content; only before the next member is asked for.
    """

    name: str
    size: int | None
    refusal: str
    unpacked: int
    read: Callable[[], Iterator[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the first bytes of a file are those of a zip or a tar (plain, gz, bz2, xz)."""
    return _find_reader(Path(path)) is not None


def unpack_archive(
    archive: Path,
    into: Path,
    *,
    limits: ArchiveLimits = ArchiveLimits(),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the files of a zip or tar below a folder, and nothing anywhere else.

    All names and sizes are checked before anything is written. Hidden files, `__MACOSX` and empty
    folders are skipped, archives inside are kept as they are. A later call writes only files that
    are not there with their size; a marker in the folder records that all is done. Only one call
    at a time may write to a folder.

    Args:
        archive: the file to unpack.
        into: the folder, created if needed.
        limits: what the archive may hold.
        progress: called with (files done, files in all) after each file that was written.

    Returns:
        The folder.

    Raises:
        DataError: the archive is refused or damaged, or the folder holds something in its way.
        WriteError: the folder cannot be written or has too little space.
    """
    archive, into = Path(archive), Path(into)
    found = _check_file(archive)
    label = {"archive": archive.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    if _is_done(into, label):
        return into
    reader = _find_reader(archive)
    if reader is None:
        raise DataError(
            f"{printable(archive)}: is neither a zip nor a tar archive (plain, gz, bz2, xz), or "
            "it is damaged; download it again"
        )
    files = _list_files(archive, reader(archive), found.st_size, limits)
    missing = _find_missing(into, files)
    _check_space(into, sum(missing.values()))
    with report_write_errors(into):
        into.mkdir(parents=True, exist_ok=True)
    remove_leftovers(into)
    with contextlib.closing(reader(archive)) as members:
        while missing:
            member = next(members, None)
            if member is None:
                raise DataError(f"{printable(archive)}: changed while it was unpacked; start again")
            name = _parse_name(member.name)[0]
            if member.size is None or missing.get(name) != member.size:
                continue
            _store(archive, member, member.size, into, name)
            del missing[name]
            if progress is not None:
                progress(len(files) - len(missing), len(files))
    write_text(into / MARKER, json.dumps({**label, "files": len(files)}) + "\n")
    return into


def _check_file(archive: Path) -> os.stat_result:
    try:
        found = archive.stat()
        if stat.S_ISREG(found.st_mode):
            archive.open("rb").close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(archive)}: cannot be read: {why}; check the path") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{printable(archive)}: is not a file; give a zip or tar archive")
    return found


def _find_reader(archive: Path) -> Callable[[Path], Members] | None:
    """The reader of an archive by its first bytes; None for any other file."""
    try:
        if not archive.is_file():
            return None
        with archive.open("rb") as file:
            if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
                return _read_zip
        with _decompress(archive) as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return _read_tar
    except Exception:
        return None


@contextlib.contextmanager
def _report_damage(archive: Path, name: str = "") -> Iterator[None]:
    """Turn any error of reading an archive into a DataError."""
    try:
        yield
    except (AatjaxError, MemoryError):
        raise
    except Exception as error:
        where = f"its member {_quote(name)}" if name else "it"
        why = printable(str(error) or "it ends too soon")
        message = f"{printable(archive)}: {where} is damaged: {why}; download it again"
        raise DataError(message) from error


def _quote(name: str) -> str:
    shown = printable(name)
    return f"'{shown}'" if len(shown) <= 200 else f"'{shown[:200]}...'"


def _list_files(
    archive: Path, members: Iterator[_Member], packed: int, limits: ArchiveLimits
) -> dict[str, int]:
    """The files to write with their sizes, once no member of the archive is refused."""

    def refuse(name: str, why: str, advice: str = UNTRUSTED) -> DataError:
        return DataError(
            f"{printable(archive)}: its member {_quote(name)} {why}; nothing was unpacked: {advice}"
        )

    entries: dict[str, int | None] = {}
    total = 0
    for count, member in enumerate(members, 1):
        name, size = member.name, member.size
        total += size or 0
        path, why = _parse_name(name)
        if why := member.refusal or why or _find_collision(entries, path, name, size):
            raise refuse(name, why)
        if path:
            entries[path] = size
        unpacked = max(total, member.unpacked - PADDING * count)
        far = unpacked > COMPRESSIBLE and unpacked > limits.ratio * packed
        exceeded = (
            ("members", count > limits.members, f"is one more than the {limits.members} members"),
            ("bytes", unpacked > limits.bytes, f"makes it {unpacked} bytes, of {limits.bytes}"),
            (
                "ratio",
                far,
                f"makes it {unpacked} bytes, {limits.ratio:g} times its {packed} bytes,",
            ),
        )
        for field, over, what in exceeded:
            if over:
                advice = f"unpack it yourself, or raise ArchiveLimits.{field}"
                raise refuse(name, f"{what} allowed", advice)
    before = ""
    for key in sorted(path.replace("/", "\0") for path in entries):
        # what lies below a path comes right after it, for no name has a NUL
        above = before.replace("\0", "/")
        if before and key.startswith(before + "\0") and entries[above] is not None:
            raise refuse(above, "is both a file and a folder")
        before = key
    hidden = re.compile(r"(^|/)(\.|__MACOSX(/|$))")
    return {p: size for p, size in entries.items() if size is not None and not hidden.search(p)}


def _parse_name(name: str) -> tuple[str, str]:
    """Where a member goes ("" for the folder itself), and why its name is refused, or ""."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    lengths = [len(os.fsencode(part)) for part in parts]
    refusals = (
        (not name or "\0" in name, "has a name that is empty or holds a NUL"),
        (name.startswith("/"), "has an absolute name"),
        ("\\" in name, "has a backslash in its name"),
        (".." in parts, "leads out of the folder"),
        (any(re.match("[A-Za-z]:", part) for part in parts), "has a drive letter in its name"),
        (
            len(os.fsencode(name)) > LONGEST_NAME or max(lengths, default=0) > LONGEST_PART,
            "has a name that is too long",
        ),
    )
    return "/".join(parts), next((why for wrong, why in refusals if wrong), "")


def _find_collision(entries: dict[str, int | None], path: str, name: str, size: int | None) -> str:
    if size is not None and (not path or name.endswith("/")):
        return "is a file without a name"
    if path not in entries or (size is None and entries[path] is None):
        return ""
    both = size is None or entries[path] is None
    return "is both a file and a folder" if both else "is there twice"


def _read_zip(archive: Path) -> Members:
    with _report_damage(archive):
        packed = zipfile.ZipFile(archive)
    with packed:
        for info in packed.infolist():
            name, mode, size = _decode_name(info), info.external_attr >> 16, info.file_size
            refusal = KINDS.get(stat.S_IFMT(mode), "")
            if info.flag_bits & 0x41:
                refusal = "is encrypted"
            elif info.compress_type not in METHODS:
                refusal = f"is packed by a method not known here ({info.compress_type})"
            folder = name.endswith("/") or stat.S_ISDIR(mode)
            info.file_size += 1  # else content beyond the declared size would not be read
            read = partial(_read_zip_content, archive, packed, info)
            yield _Member(name, None if folder else size, refusal, 0, read)


def _decode_name(info: zipfile.ZipInfo) -> str:
    """The name of a member, as UTF-8 where it can be: some programs omit the mark for it."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _read_zip_content(
    archive: Path, packed: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Iterator[bytes]:
    bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    block = BLOCK if bounded else 4096  # the other methods unpack all that they are given at once
    name = _decode_name(info)
    with _report_damage(archive, name):
        file = packed.open(info)
    with file:
        yield from _read_content(archive, name, info.file_size, file, block)


def _read_content(
    archive: Path, name: str, size: int, file: IO[bytes] | BufferedIOBase, block: int = BLOCK
) -> Iterator[bytes]:
    """Up to `size` bytes of a member, in blocks."""
    while size:
        with _report_damage(archive, name):
            chunk = file.read(min(size, block))
        if not chunk:
            return
        size -= len(chunk)
        yield chunk


@contextlib.contextmanager
def _decompress(archive: Path) -> Iterator[BufferedIOBase]:
    with archive.open("rb") as raw:
        head = raw.read(8)
        raw.seek(0)
        packer = next((p for magic, p in PACKERS.items() if head.startswith(magic)), None)
        if packer is None:
            yield raw
        else:
            with packer(raw, "rb") as file:
                yield cast("BufferedIOBase", file)


class _TarHeader(tarfile.TarInfo):
    """A header of a tar; a missing or broken one is damage, not the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise ReadError(str(error)) from error


@dataclass
class _TarStream:
    """The bytes of a tar, forwards only, with a limit on those of its headers."""

    file: BufferedIOBase
    allowed: int = HEADERS

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.allowed:
            raise ReadError(f"a header of more than {HEADERS} bytes")
        self.allowed -= size
        return self.file.read(size)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> int:
        if position < self.file.tell():
            raise ReadError("a member of negative size")
        return self.file.seek(position)


def _read_tar(archive: Path) -> Members:
    with contextlib.ExitStack() as stack:
        with _report_damage(archive):
            file = stack.enter_context(_decompress(archive))
            stream = _TarStream(file)
            tar: Any = tarfile.TarFile(
                fileobj=cast("Any", stream),
                tarinfo=_TarHeader,
                encoding="utf-8",
                errors="surrogateescape",
            )
        while True:
            with _report_damage(archive):
                info = tar.next()
            if info is None:
                break
            tar.members, tar.pax_headers = [], {}  # else they grow with the archive
            if info.size < 0:
                with _report_damage(archive, info.name):
                    raise ReadError("a size below zero")
            refusal = TYPES.get(tarfile.GNUTYPE_SPARSE if info.issparse() else info.type, "")
            if not refusal and not info.isreg() and not info.isdir():
                refusal = f"is of an unknown kind ({info.type!r})"
            size = info.size if info.isreg() else 0
            read = partial(_read_content, archive, info.name, size, file)
            declared = None if info.isdir() else size
            yield _Member(info.name, declared, refusal, file.tell() + size, read)
            stream.allowed = HEADERS
        after = 0
        with _report_damage(archive):  # checksums are compared at the very end
            while chunk := file.read(BLOCK):
                after += len(chunk)
                if after > TRAILER:
                    raise ReadError(f"more than {TRAILER} bytes follow after its end")


def _is_done(into: Path, label: dict[str, Any]) -> bool:
    """Whether the marker in a folder is that of this archive; a DataError if of another."""
    try:
        kept = json.loads((into / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        kept = None
    if isinstance(kept, dict) and label.items() <= kept.items():
        return True
    other = printable(str(kept.get("archive"))) if isinstance(kept, dict) else "another archive"
    raise DataError(
        f"{printable(into)}: holds the files of {other} and not of {printable(label['archive'])} "
        f"as it is now (see {MARKER}); choose another folder or remove this one"
    )


def _find_missing(into: Path, files: dict[str, int]) -> dict[str, int]:
    """The files that are not there with their size; a DataError where something is in the way."""
    missing: dict[str, int] = {}
    checked: set[str] = set()
    for name, size in files.items():
        folder = name.rpartition("/")[0]
        if folder not in checked:
            _check_folders(into, folder, make=False)
            checked.add(folder)
        found = _lstat(into / name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise _report_obstacle(into / name, found)
        if found is None or found.st_size != size:
            missing[name] = size
    return missing


def _check_folders(into: Path, folder: str, *, make: bool) -> None:
    """Check, or create, the folders of a file one by one: none may be a link."""
    path = into
    for part in folder.split("/") if folder else ():
        path = path / part
        if make:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
        found = _lstat(path)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            raise _report_obstacle(path, found)


def _lstat(path: Path) -> os.stat_result | None:
    with report_write_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return path.lstat()
    return None


def _report_obstacle(path: Path, found: os.stat_result) -> DataError:
    what = KINDS.get(stat.S_IFMT(found.st_mode), "is not what the archive has there")
    return DataError(
        f"{printable(path)}: {what} and in the way; remove it or choose another folder"
    )


def _check_space(into: Path, needed: int) -> None:
    for folder in (into, *into.absolute().parents):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            break
    else:
        return
    if needed > free:
        raise WriteError(
            f"{printable(into)}: {needed} bytes are needed and {free} are free; free space there "
            "or choose another folder"
        )


def _store(archive: Path, member: _Member, size: int, into: Path, name: str) -> None:
    """Write a file whose content must have exactly the declared size."""
    path = into / name
    with report_write_errors(path):
        _check_folders(into, name.rpartition("/")[0], make=True)
        with open_output(path, durable=False) as file:
            written = 0
            for chunk in member.read():
                written += len(chunk)
                if written <= size:
                    file.write(chunk)
            if written != size:
                less = "more" if written > size else "less"
                with _report_damage(archive, member.name):
                    raise ReadError(f"it holds {less} than the {size} bytes declared")
