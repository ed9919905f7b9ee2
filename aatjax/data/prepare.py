"""Preparation of a benchmark: from its official archive to a set that is ready to train on.

The archive is unpacked beside the result, checked against the official counts, decoded once by all
cores, searched for sound that lies in two parts, and written as a TFDS dataset. Every stage keeps
what earlier ones have finished, so the same command continues after an interruption; the result
appears under its name when it is complete.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aatjax.data.benchmarks import Benchmark, Census, find_benchmark, find_part
from aatjax.data.decode_cache import decode_all
from aatjax.data.duplicates import Duplicate, find_duplicates, fingerprint_clips
from aatjax.data.source import Progress, Source
from aatjax.data.tfds import VERSION, read_facts, write_prepared
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.io.archives import is_archive, unpack_archive
from aatjax.io.atomic import remove_leftovers, write_folder
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.lock import lock_folder
from aatjax.io.optional import need

MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Result of `prepare`.

    Attributes:
        folder: the prepared set.
        benchmark: which one.
        census: the clips in it against the official counts.
        quarantined: (clip, reason) of files that cannot be used.
        duplicates: pairs of clips in different parts with the same or nearly the same sound.
        checksum: whether the archive is the known one; None if no checksum is known.
        before: whether the set was there before.
    """

    folder: Path
    benchmark: Benchmark
    census: Census
    quarantined: tuple[tuple[str, str], ...]
    duplicates: tuple[Duplicate, ...]
    checksum: bool | None
    before: bool

    def to_json(self) -> dict[str, Any]:
        """Return what is printed, as values of JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "folder": str(self.folder), "benchmark": self.benchmark.name}


def prepare(
    name: str,
    origin: str | Path | None = None,
    *,
    to: str | Path = "data",
    subset: bool = False,
    download: bool = False,
    max_bad: float = 0.05,
    workers: int | None = None,
    progress: Progress | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Preparation:
    """Prepare a benchmark.

    Args:
        name: its name, from `aatjax.data.benchmarks.BENCHMARKS`.
        origin: the official archive, or the folder it was unpacked to.
        to: folder of prepared sets; the result is `to/name/1.0.0`.
        subset: accept missing clips; reports then say so.
        download: fetch the archive, where its licence allows that.
        max_bad: share of the clips that may be unreadable.
        workers: decoding threads; by default one per core.
        progress: called with the stages `download`, `unpack`, `decode`, `compare` and `write`.
        begin: called when everything was checked, before the archive is downloaded or unpacked, or
            the clips of a folder are decoded.

    Raises:
        UsageError: no such benchmark, neither or both of `origin` and `download`, or the set may
            not be downloaded.
        DataError: the archive is damaged or hostile, it is another set, or clips are missing.
        WriteError: the result cannot be written; finished stages are kept for the next try.
        UnavailableError: a library of the extra `prepare` is not installed.
    """
    benchmark = find_benchmark(name)
    home = Path(to).expanduser() / name
    _check_origin(benchmark, origin, download)
    final, work = home / VERSION, home / ".work"
    with lock_folder(home, "to="):
        before = final.exists()
        if not before:
            remove_leftovers(home)
            report = progress or (lambda stage, done, total: None)
            if origin is None or is_archive(Path(origin).expanduser()):
                begin()
            place = Path(origin).expanduser() if origin else _download(benchmark, work, report)
            source, checksum = _open(benchmark, place, work, report)
            _check_complete(benchmark, source, subset)
            begin()
            kept = decode_all(
                source,
                work / "decoded",
                max_bad=max_bad,
                workers=workers,
                progress=report,
            )
            known = set(source.skipped)
            facts = {
                "benchmark": name,
                "licence": benchmark.licence,
                "origin": place.name,
                "checksum_is_official": checksum,
                "quarantined": [list(pair) for pair in kept.skipped if pair not in known],
            }
            _write(benchmark, kept, final, facts, report)
            shutil.rmtree(work, ignore_errors=True)
    return _load(benchmark, final, before)


def _check_origin(benchmark: Benchmark, origin: str | Path | None, download: bool) -> None:
    if (origin is None) is not download:
        raise UsageError(f"give {benchmark.title}'s archive or folder with --from, or --download")
    if origin is None and benchmark.url is None:
        raise UsageError(
            f"{benchmark.title} may not be downloaded by a program (licence: "
            f"{benchmark.licence}): get it from {benchmark.home} and give it with --from"
        )
    if origin is not None and not Path(origin).expanduser().exists():
        raise DataError(f"{origin}: no such file or folder")


def _download(benchmark: Benchmark, work: Path, report: Progress) -> Path:
    """The archive, complete and checked; a part of it is never taken for all."""
    need("pooch", "requests", extra="prepare")
    import pooch
    import requests

    assert benchmark.url is not None
    name = benchmark.url.rpartition("/")[2]
    report("download", 0, 0)
    try:
        return Path(pooch.retrieve(benchmark.url, benchmark.checksum, name, work / "download"))
    except (ValueError, OSError, requests.RequestException) as error:
        raise DataError(
            f"{benchmark.url}: could not be downloaded: {' '.join(str(error).split())[:200]}; try "
            "again, or download it yourself and give it with --from"
        ) from error


def _open(
    benchmark: Benchmark, place: Path, work: Path, report: Progress
) -> tuple[Source, bool | None]:
    """The clips of a folder or an archive, and whether the archive is the known one."""
    if place.is_dir():
        return benchmark.read(place), None
    if not is_archive(place):
        raise DataError(f"{place}: is neither a folder nor a zip or tar archive")
    kind, _, known = (benchmark.checksum or "").partition(":")
    checksum = hash_file(place, kind) == known if known else None
    about = place.stat()
    key = hash_bytes(f"{place.name} {about.st_size} {about.st_mtime_ns}")
    into = work / f"unpacked-{key[:12]}"  # never mixed with the files of another archive
    unpacked = unpack_archive(place, into, progress=functools.partial(report, "unpack"))
    return benchmark.read(unpacked), checksum


def _check_complete(benchmark: Benchmark, source: Source, subset: bool) -> None:
    census = benchmark.census(source)
    if census.whole or subset:
        return
    lost = [clip for clip, why in source.skipped if "missing" in why]
    shown = f", such as {', '.join(lost[:MOST_SHOWN])}" if lost else ""
    raise DataError(
        f"{source.name} is not whole: {census.text()}{shown}; unpack or download all of it, or "
        "give --subset to prepare the clips present, which every report will then state"
    )


def _write(
    benchmark: Benchmark, source: Source, final: Path, facts: dict[str, Any], report: Progress
) -> None:
    """Search for duplicates, check the space on disk and write the set."""
    hashes, exact = fingerprint_clips(source, progress=report)
    ids, parts = [c.id for c in source.clips], [find_part(c) for c in source.clips]
    census = benchmark.census(source)
    facts = {
        **facts,
        "whole": census.whole,
        "census": dataclasses.asdict(census),
        "duplicates": [
            dataclasses.asdict(pair) for pair in find_duplicates(ids, parts, hashes, exact)
        ],
        "aatjax": version("aatjax"),
    }
    needed = sum(2 * len(source.waveform(i)) for i in range(len(source)))  # hardly compressible
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise WriteError(
            f"{final.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "free space there or choose another folder with --to"
        )
    slim = source.with_clips(source.clips, skipped=[])
    write_folder(
        final,
        lambda folder: write_prepared(
            slim, folder, name=benchmark.name, facts=facts, progress=report
        ),
    )


def _load(benchmark: Benchmark, final: Path, before: bool) -> Preparation:
    facts = read_facts(final)
    counts = facts["census"]
    pairs = [{**pair, "parts": tuple(pair["parts"])} for pair in facts["duplicates"]]
    return Preparation(
        final,
        benchmark,
        Census(
            counts["clips"],
            counts["official"],
            {part: (found, official) for part, (found, official) in counts["parts"].items()},
            tuple(counts["absent"]),
        ),
        tuple((clip, why) for clip, why in facts["quarantined"]),
        tuple(Duplicate(**pair) for pair in pairs),
        facts["checksum_is_official"],
        before,
    )
