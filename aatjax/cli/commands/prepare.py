"""Prepares a benchmark of the papers from its official archive or folder."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from aatjax.cli.arguments import Count
from aatjax.cli.dry_run import make_begin
from aatjax.errors import Range

GROUP = "data"


def main(
    name: str,
    *,
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="ARCHIVE|FOLDER")] = None,
    out: Path = Path("data"),
    download: bool = False,
    subset: bool = False,
    max_bad: Annotated[float, Range(0)] = 0.05,
    workers: Count | None = None,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax prepare`.

    Args:
        name: the benchmark; `aatjax recipes` lists them
        from_: the official archive, or the folder it was unpacked to
        out: folder of prepared sets
        download: fetch the archive, where the licence allows it
        subset: take the clips that are present although others are missing
        max_bad: share of clips that may be unreadable
        workers: decoding threads (default: one per core)
        dry_run: check the origin and the folder, count the clips of an unpacked set, and stop
        json: print one JSON object
        quiet: no progress
    """
    from json import dumps

    from aatjax.data.benchmarks import find_benchmark
    from aatjax.data.prepare import prepare
    from aatjax.io.progress import StageBar

    benchmark = find_benchmark(name)
    print(f"{benchmark.title}: {benchmark.paper}; licence: {benchmark.licence}", file=sys.stderr)
    with StageBar(quiet=quiet) as bar:
        outcome = prepare(
            name,
            from_,
            to=out,
            subset=subset,
            download=download,
            max_bad=max_bad,
            workers=workers,
            progress=bar.update,
            begin=make_begin(dry_run, f"would prepare {benchmark.title} in {out}"),
        )
    print(dumps(outcome.to_json()) if json else _format_outcome(outcome))


def _format_outcome(outcome: Any) -> str:
    census, benchmark = outcome.census, outcome.benchmark
    verb = "was prepared before" if outcome.before else "prepared"
    whole = "complete" if census.whole else "SUBSET"
    lines = [f"{benchmark.title} {verb}: {whole}, {census.text()}"]
    if outcome.checksum is not None:
        lines.append(
            "archive: official, by its checksum"
            if outcome.checksum
            else "archive: NOT the one whose checksum is known: check where it comes from"
        )
    left_out = [f"left out: {clip} ({why})" for clip, why in outcome.quarantined]
    pairs = [
        f"{'the same sound' if pair.exact else 'nearly the same sound'} in parts "
        f"{' and '.join(pair.parts)}: {pair.first}, {pair.second}"
        for pair in outcome.duplicates
    ]
    for found, more in ((left_out, "left out: {} more"), (pairs, "{} more such pairs")):
        lines += found[:5]
        if found[5:]:
            lines.append(f"{more.format(len(found) - 5)}, see prepared.json")
    lines += [
        f"set: {outcome.folder}",
        f"aatjax train {benchmark.name}_soft_moa --data.path {outcome.folder.parent}",
    ]
    return "\n".join(lines)
