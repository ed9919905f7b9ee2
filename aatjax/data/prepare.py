"""From the archive of a benchmark, as its owner distributes it, to a prepared set.

The archive is unpacked beside the place of the result, checked against the official counts,
decoded once by all cores, looked through for sound that lies in two parts, and written as a TFDS
dataset. Every stage keeps what the one before has finished, so the same command goes on after an
interruption, and the result appears under its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
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
from aatjax.io.atomic import write_folder
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.lock import lock_folder

MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `prepare` made.

    Attributes:
        folder: the prepared set.
        benchmark: which one.
        census: the clips in it against the official counts.
        quarantined: (clip, reason) of files that are there and cannot be used.
        duplicates: pairs of clips of the same or nearly the same sound in different parts.
        checksum: whether the archive is the known one; None where that cannot be told.
        before: whether it was there already.
    """

    folder: Path
    benchmark: Benchmark
    census: Census
    quarantined: tuple[tuple[str, str], ...]
    duplicates: tuple[Duplicate, ...]
    checksum: bool | None
    before: bool = False


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
) -> Outcome:
    """Prepares a benchmark.

    Args:
        name: its name, from `aatjax.data.benchmarks.BENCHMARKS`.
        origin: the official archive, or the folder it was unpacked to.
        to: folder of prepared sets; the result is `to/name/1.0.0`.
        subset: take what is there although clips are missing; reports then say so.
        download: fetch the archive, where its licence allows that without more ado.
        max_bad: share of the clips that may be unreadable.
        workers: decoding threads; by default one a core.
        progress: called with the stage, what is done and what there is.

    Raises:
        UsageError: no such benchmark, neither or both of `origin` and `download`, or the set may
            not be downloaded.
        DataError: the archive is damaged or hostile, it is another set, or clips are missing.
        WriteError: the result cannot be written; what was done is kept for the next try.
    """
    benchmark = find_benchmark(name)
    home = Path(to).expanduser() / name
    if (origin is None) is not download:
        raise UsageError(
            f"say where {benchmark.title} is: its archive or folder (--from), or --download"
        )
    if origin is None and benchmark.url is None:
        raise UsageError(
            f"{benchmark.title} may not be downloaded by a program (licence: "
            f"{benchmark.licence}): get it from {benchmark.home} and give it with --from"
        )
    if origin is not None and not Path(origin).expanduser().exists():
        raise DataError(f"{origin}: no such file or folder")
    final = home / VERSION
    with lock_folder(home, "--to"):
        if final.exists():
            return _found(benchmark, final)
        work = home / ".work"
        for left in home.glob(f".{VERSION}.*.tmp"):  # of a run that was killed while writing
            shutil.rmtree(left, ignore_errors=True)
        tell = progress or (lambda stage, done, total: None)
        place = _downloaded(benchmark, work, tell) if origin is None else Path(origin).expanduser()
        source, checksum = _opened(benchmark, place, work, tell)
        _complete(benchmark, source, subset)
        kept = decode_all(
            source,
            work / "decoded",
            max_bad=max_bad,
            workers=workers or os.cpu_count() or 2,
            progress=tell,
        )
        known = set(source.skipped)
        quarantined = tuple(pair for pair in kept.skipped if pair not in known)
        hashes, exact = fingerprint_clips(kept, progress=tell)
        ids, parts = [c.id for c in kept.clips], [find_part(c) for c in kept.clips]
        duplicates = tuple(find_duplicates(ids, parts, hashes, exact))
        census = benchmark.census(kept)
        facts = {
            "benchmark": name,
            "licence": benchmark.licence,
            "origin": place.name,
            "checksum_is_official": checksum,
            "whole": census.whole,
            "census": dataclasses.asdict(census),
            "quarantined": [list(pair) for pair in quarantined],
            "duplicates": [dataclasses.asdict(pair) for pair in duplicates],
            "aatjax": version("aatjax"),
        }
        _check_room(kept, home)
        slim = kept.with_clips(kept.clips, skipped=[], notes=kept.notes)
        write_folder(
            final,
            lambda folder: write_prepared(slim, folder, name=name, facts=facts, progress=tell),
        )
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(final, benchmark, census, quarantined, duplicates, checksum)


def _check_room(source: Source, home: Path) -> None:
    """Refuses to begin what the disk cannot hold; sound hardly becomes smaller when packed."""
    needed = sum(2 * len(source.waveform(i)) for i in range(len(source)))
    free = shutil.disk_usage(home).free
    if free < needed:
        raise WriteError(
            f"{home}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; free "
            "space there or choose another folder with --to"
        )


def census_of(facts: dict[str, Any]) -> Census:
    """The counts that a prepared set tells of itself."""
    fields = facts["census"]
    parts = {part: (found, official) for part, (found, official) in fields["parts"].items()}
    return Census(fields["clips"], fields["official"], parts, tuple(fields["absent"]))


def _found(benchmark: Benchmark, final: Path) -> Outcome:
    facts = read_facts(final)
    duplicates = tuple(
        Duplicate(**{**pair, "parts": tuple(pair["parts"])}) for pair in facts["duplicates"]
    )
    quarantined = tuple((clip, why) for clip, why in facts["quarantined"])
    return Outcome(
        final,
        benchmark,
        census_of(facts),
        quarantined,
        duplicates,
        facts["checksum_is_official"],
        before=True,
    )


def _downloaded(benchmark: Benchmark, work: Path, tell: Progress) -> Path:
    """The archive, fetched whole and checked; a part of it is never taken for all."""
    import pooch
    import requests

    assert benchmark.url is not None
    name = benchmark.url.rpartition("/")[2]
    tell("download", 0, 0)
    try:
        return Path(pooch.retrieve(benchmark.url, benchmark.checksum, name, work / "download"))
    except (ValueError, OSError, requests.RequestException) as error:
        raise DataError(
            f"{benchmark.url}: could not be downloaded: {' '.join(str(error).split())[:200]}; try "
            "again, or fetch it by hand and give it with --from"
        ) from error


def _opened(
    benchmark: Benchmark, place: Path, work: Path, tell: Progress
) -> tuple[Source, bool | None]:
    """The clips of a folder or an archive, and whether the archive is the known one."""
    if place.is_dir():
        return benchmark.read(place), None
    if not is_archive(place):
        raise DataError(f"{place}: is neither a folder nor a zip or tar archive")
    checksum = None
    if benchmark.checksum is not None:
        kind, _, wanted = benchmark.checksum.partition(":")
        checksum = hash_file(place, kind) == wanted
    about = place.stat()
    key = hash_bytes(f"{place.name} {about.st_size} {about.st_mtime_ns}")
    into = work / f"unpacked-{key[:12]}"  # never mixed with what another archive left
    unpacked = unpack_archive(place, into, progress=functools.partial(tell, "unpack"))
    return benchmark.read(unpacked), checksum


def _complete(benchmark: Benchmark, source: Source, subset: bool) -> None:
    """Refuses a set that lacks clips, unless that was asked for."""
    census = benchmark.census(source)
    if census.whole or subset:
        return
    lost = [clip for clip, why in source.skipped if "missing" in why]
    shown = f", such as {', '.join(lost[:MOST_SHOWN])}" if lost else ""
    raise DataError(
        f"{source.name} is not whole: {census.text()}{shown}; unpack or download all of it, or "
        "give --subset to prepare what is there, which every report will then tell"
    )
