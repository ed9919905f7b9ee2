"""Unpack downloaded archives, and trust nothing that they say."""

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
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from tarfile import HeaderError, ReadError
from typing import IO, Literal, cast

from aatjax.errors import AatjaxError, DataError, WriteError, printable
from aatjax.io.atomic import open_output, remove_leftovers, report_write_errors

MARKER = ".unpacked.json"
COMPRESSIBLE = 16 * 2**20  # up to here any ratio is believed: silence compresses well
BLOCK = 2**20
HEADERS = 2**16  # bytes of headers before one file of a tar
PADDING = 4096  # bytes of headers and padding that a file of a tar may take on the average
TRAILER = 16 * 2**20  # bytes after the end of a tar
LONGEST_NAME, LONGEST_PART = 4096, 255

OTHERWISE = "take it from a source you trust, or unpack it yourself and use the folder"
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
PACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
KINDS = {
    stat.S_IFLNK: "is a symbolic link",
    stat.S_IFCHR: "is a device node",
    stat.S_IFBLK: "is a device node",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
}
TYPES = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device node",
    tarfile.BLKTYPE: "is a device node",
    tarfile.FIFOTYPE: "is a FIFO",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}

Contents = Generator[tuple[str, int, Iterable[bytes]], None, None]


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may hold.

    Attributes:
        members: number of files and folders.
        bytes: bytes of all files, unpacked.
        ratio: bytes unpacked for each byte of the archive; not looked at up to 16 MiB.
    """

    members: int = 500_000
    bytes: int = 200 * 2**30
    ratio: float = 100.0


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip or a tar (plain, gz, bz2, xz) does; its name says nothing."""
    return bool(_kind(Path(path)))


def unpack_archive(
    archive: Path,
    into: Path,
    *,
    limits: ArchiveLimits = ArchiveLimits(),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the files of a zip or tar below a folder, and nothing anywhere else.

    All names and sizes are looked at before anything is written, so that an archive is refused
    whole. Hidden files, `__MACOSX` and empty folders are left out, archives inside are kept as
    they are. Each file is written under another name and renamed; a later call goes on where an
    earlier one was stopped and writes only files that are not there with their size. A marker in
    the folder tells that all is done. Only one call at a time may write to a folder.

    Args:
        archive: the file to unpack.
        into: the folder, made if needed.
        limits: what is too much.
        progress: called with (files done, files in all) after each file that was written.

    Returns:
        The folder.

    Raises:
        DataError: the archive is refused or damaged, or the folder holds something in its way.
        WriteError: the folder cannot be written or has too little space.
    """
    archive, into = Path(archive), Path(into)
    try:
        found = archive.stat()
        if stat.S_ISREG(found.st_mode):
            archive.open("rb").close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{printable(archive)}: cannot be read: {why}; check the path") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{printable(archive)}: is not a file; give a zip or tar archive")
    label = {"archive": archive.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    if _is_done(into, label):
        return into

    kind = _kind(archive)
    if not kind:
        raise DataError(
            f"{printable(archive)}: is neither a zip nor a tar archive (plain, gz, bz2, xz), or it is "
            "damaged; download it again"
        )
    scan, contents = (_scan_zip, _zip_contents) if kind == "zip" else (_scan_tar, _tar_contents)
    plan = _Plan(archive, found.st_size, limits)
    scan(plan)
    files = plan.files()
    missing = _missing(into, files)
    _check_space(into, sum(missing.values()))
    with report_write_errors(into):
        into.mkdir(parents=True, exist_ok=True)
    remove_leftovers(into)

    with contextlib.closing(contents(archive)) as found_again:
        while missing:
            member = next(found_again, None)
            if member is None:
                raise DataError(f"{printable(archive)}: changed while it was unpacked; start again")
            name, size, chunks = member
            if missing.get(name) != size:
                continue
            _store(into, name, _measured(archive, name, size, chunks))
            del missing[name]
            if progress is not None:
                progress(len(files) - len(missing), len(files))
    _store(into, MARKER, [json.dumps({**label, "files": len(files)}).encode() + b"\n"])
    return into


def _kind(archive: Path) -> Literal["zip", "tar", ""]:
    """What a file is by its first bytes; '' for anything else."""
    try:
        if not archive.is_file():
            return ""
        with archive.open("rb") as file:
            if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
                return "zip"
        with _decompressed(archive) as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return "tar"
    except Exception:
        return ""


@contextlib.contextmanager
def _reading(archive: Path, name: str = "") -> Iterator[None]:
    """Whatever goes wrong while an archive is read becomes a DataError: its bytes are not ours."""
    try:
        yield
    except (AatjaxError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(archive, str(error) or "it ends too soon", name) from error


def _damaged(archive: Path, why: str, name: str = "") -> DataError:
    where = f"its member {_quoted(name)}" if name else "it"
    return DataError(
        f"{printable(archive)}: {where} is damaged: {printable(why)}; download it again"
    )


def _quoted(name: str) -> str:
    shown = printable(name)
    return f"'{shown}'" if len(shown) <= 200 else f"'{shown[:200]}...'"


@dataclass
class _Plan:
    """What an archive says it holds: refused as soon as it is too much, or not to be trusted.

    Attributes:
        entries: path to size, or to None for a folder.
    """

    archive: Path
    packed: int
    limits: ArchiveLimits
    members: int = 0
    bytes: int = 0
    entries: dict[str, int | None] = field(default_factory=dict)

    def add(self, name: str, size: int | None, odd: str = "", read: int = 0) -> None:
        """Take up a member.

        Args:
            name: as the archive has it.
            size: declared bytes; None for a folder.
            odd: why it is refused, if it is.
            read: bytes of the archive that come unpacked before and with this member.
        """
        self.members += 1
        self.bytes += size or 0
        path, wrong = _path(name)
        odd = odd or wrong
        before = self.entries.get(path, -1)
        if not odd and path in self.entries and (size is not None or before is not None):
            both = size is None or before is None
            odd = "is both a file and a folder" if both else "is there twice"
        if odd:
            raise self._refused(name, odd, OTHERWISE)
        if path:
            self.entries[path] = size
        self._check_limits(name, max(self.bytes, read - PADDING * self.members))

    def _check_limits(self, name: str, unpacked: int) -> None:
        if self.members > self.limits.members:
            raise self._refused(
                name,
                f"is one more than the {self.limits.members} members allowed",
                "raise ArchiveLimits.members if you trust it",
            )
        if unpacked > self.limits.bytes:
            raise self._refused(
                name,
                f"makes it {unpacked} bytes unpacked and {self.limits.bytes} are allowed",
                "raise ArchiveLimits.bytes if you trust it",
            )
        if unpacked > COMPRESSIBLE and unpacked > self.limits.ratio * self.packed:
            raise self._refused(
                name,
                f"makes it {unpacked} bytes unpacked, more than {self.limits.ratio:g} times the "
                f"{self.packed} bytes of the archive",
                "raise ArchiveLimits.ratio if you trust it",
            )

    def files(self) -> dict[str, int]:
        """The files to write, with their sizes.

        Raises:
            DataError: a file lies where a folder has to be.
        """
        before = ""
        for key in sorted(path.replace("/", "\0") for path in self.entries):
            # whatever lies below a path comes right after it, for no name has a NUL
            above = before.replace("\0", "/")
            if before and key.startswith(before + "\0") and self.entries[above] is not None:
                raise self._refused(above, "is both a file and a folder", OTHERWISE)
            before = key
        return {
            path: size
            for path, size in self.entries.items()
            if size is not None
            and not any(part[0] == "." or part == "__MACOSX" for part in path.split("/"))
        }

    def _refused(self, name: str, why: str, remedy: str) -> DataError:
        return DataError(
            f"{printable(self.archive)}: its member {_quoted(name)} {why}; nothing was unpacked: "
            f"{remedy}"
        )


def _path(name: str) -> tuple[str, str]:
    """Where a member goes ('' for the folder itself), and why its name is refused, if it is."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    why = ""
    if not name or "\0" in name:
        why = "has a name that is empty or holds a NUL"
    elif name.startswith("/"):
        why = "has an absolute name"
    elif "\\" in name:
        why = "has a backslash in its name"
    elif ".." in parts:
        why = "leads out of the folder"
    elif any(re.match("[A-Za-z]:", part) for part in parts):
        why = "has the letter of a drive in its name"
    elif len(os.fsencode(name)) > LONGEST_NAME or any(
        len(os.fsencode(part)) > LONGEST_PART for part in parts
    ):
        why = "has a name that is too long"
    return "/".join(parts), why


def _scan_zip(plan: _Plan) -> None:
    with _reading(plan.archive), zipfile.ZipFile(plan.archive) as packed:
        for info in packed.infolist():
            mode = info.external_attr >> 16
            odd = KINDS.get(stat.S_IFMT(mode), "")
            if info.flag_bits & 0x41:
                odd = "is encrypted"
            elif info.compress_type not in METHODS:
                odd = f"is packed by a method not known here ({info.compress_type})"
            name = _zip_name(info)
            folder = name.endswith("/") or stat.S_ISDIR(mode)
            if not folder and not _path(name)[0]:
                odd = odd or "is a file without a name"
            plan.add(name, None if folder else info.file_size, odd)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Names not marked as UTF-8 are so all the same if they can be: some programs never say it."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _zip_contents(archive: Path) -> Contents:
    with _reading(archive):
        packed = zipfile.ZipFile(archive)
    with packed:
        for info in packed.infolist():
            name, size = _zip_name(info), info.file_size
            info.file_size += 1  # else what a member holds beyond its size would not be seen
            yield _path(name)[0], size, _zip_chunks(archive, packed, info)


def _zip_chunks(archive: Path, packed: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    name = _zip_name(info)
    with _reading(archive, name):
        file = packed.open(info)
    with file:
        while True:
            with _reading(archive, name):
                # the other methods unpack at once all that they are given
                chunk = file.read(BLOCK if bounded else 4096)
            if not chunk:
                return
            yield chunk


@contextlib.contextmanager
def _decompressed(archive: Path) -> Iterator[BufferedIOBase]:
    with archive.open("rb") as raw:
        head = raw.read(8)
        raw.seek(0)
        packer = next((p for magic, p in PACKERS.items() if head.startswith(magic)), None)
        if packer is None:
            yield raw
        else:
            with packer(raw, "rb") as file:
                yield cast("BufferedIOBase", file)


class _Header(tarfile.TarInfo):
    """A header of a tar; where it is missing or broken the archive is damaged, not at its end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise ReadError(str(error)) from error


class _Tar(tarfile.TarFile):
    """A tar that is read once from front to back."""

    members: list[tarfile.TarInfo]

    def forget(self) -> None:
        """Let go of the members so far, and of what they all share: owners, times, remarks."""
        self.members = []
        self.pax_headers = {}


@dataclass
class _Stream:
    """The bytes of a tar, forwards only, and of its headers no more than is reasonable."""

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
            raise ReadError("a member of less than no bytes")
        return self.file.seek(position)


def _tar_members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, BufferedIOBase]]:
    """Each header of a tar, with the stream that stands right after it."""
    with contextlib.ExitStack() as stack:
        with _reading(archive):
            file = stack.enter_context(_decompressed(archive))
            stream = _Stream(file)
            tar = _Tar(
                fileobj=cast("IO[bytes]", stream),
                tarinfo=_Header,
                encoding="utf-8",
                errors="surrogateescape",
            )
        while True:
            with _reading(archive):
                member = tar.next()
            if member is None:
                break
            tar.forget()
            yield member, file
            stream.allowed = HEADERS
        after = 0
        with _reading(archive):  # checksums are compared at the very end
            while chunk := file.read(BLOCK):
                after += len(chunk)
                if after > TRAILER:
                    raise ReadError(f"more than {TRAILER} bytes follow after its end")


def _scan_tar(plan: _Plan) -> None:
    for member, file in _tar_members(plan.archive):
        name = member.name
        odd = TYPES.get(member.type, "")
        if not odd and member.issparse():
            odd = TYPES[tarfile.GNUTYPE_SPARSE]
        elif not odd and not member.isreg() and not member.isdir():
            odd = f"is of an unknown kind ({member.type!r})"
        elif member.isreg() and (name.endswith("/") or not _path(name)[0]):
            odd = odd or "is a file without a name"
        if member.size < 0:
            raise _damaged(plan.archive, "a size below zero", name)
        size = member.size if member.isreg() else 0
        plan.add(name, None if member.isdir() else size, odd, file.tell() + size)


def _tar_contents(archive: Path) -> Contents:
    for member, file in _tar_members(archive):
        if member.isreg():
            yield _path(member.name)[0], member.size, _tar_chunks(archive, member, file)


def _tar_chunks(archive: Path, member: tarfile.TarInfo, file: BufferedIOBase) -> Iterator[bytes]:
    left = member.size
    while left:
        with _reading(archive, member.name):
            chunk = file.read(min(left, BLOCK))
        if not chunk:
            return
        left -= len(chunk)
        yield chunk


def _measured(archive: Path, name: str, size: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same chunks, as long as they are neither more nor less than was declared."""
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        if seen > size:
            break
        yield chunk
    if seen != size:
        less = "more" if seen > size else "less"
        raise _damaged(archive, f"it holds {less} than the {size} bytes declared", name)


def _is_done(into: Path, label: dict[str, str | int]) -> bool:
    """Whether the marker in a folder is that of this archive; a DataError if of another."""
    marker = into / MARKER
    try:
        said = json.loads(marker.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and label.items() <= said.items():
        return True
    other = printable(str(said.get("archive"))) if isinstance(said, dict) else "another archive"
    raise DataError(
        f"{printable(into)}: holds the files of {other} and not of {printable(str(label['archive']))} as it "
        f"is now ({MARKER} there tells); choose another folder or remove this one"
    )


def _missing(into: Path, files: dict[str, int]) -> dict[str, int]:
    """The files that are not there with their size.

    Raises:
        DataError: a link, or something else that is no file, lies where a file or folder goes.
        WriteError: the folder cannot be looked into.
    """
    missing: dict[str, int] = {}
    checked: set[str] = set()
    for name, size in files.items():
        folder = name.rpartition("/")[0]
        if folder not in checked:
            _check_folders(into, folder, make=False)
            checked.add(folder)
        found = _lstat(into / name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise _in_the_way(into / name, found)
        if found is None or found.st_size != size:
            missing[name] = size
    return missing


def _check_folders(into: Path, folder: str, *, make: bool) -> None:
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
            raise _in_the_way(path, found)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        with report_write_errors(path):
            raise error


def _in_the_way(path: Path, found: os.stat_result) -> DataError:
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
            f"{printable(into)}: {needed} bytes are needed and {free} are free; free space there or "
            "choose another folder"
        )


def _store(into: Path, name: str, chunks: Iterable[bytes]) -> None:
    """Write a file whole or not at all; what an earlier run left behind is easily told."""
    path = into / name
    with report_write_errors(path):
        _check_folders(into, name.rpartition("/")[0], make=True)
        with open_output(path, durable=name == MARKER) as file:
            for chunk in chunks:
                file.write(chunk)
