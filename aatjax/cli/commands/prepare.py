"""`aatjax prepare`: from a benchmark's official archive to a set that is ready to train on."""

import sys
from pathlib import Path
from typing import Any

from aatjax.cli.arguments import parser_of
from aatjax.cli.progress import StageBar


def main(arguments: list[str]) -> None:
    """Runs `aatjax prepare`."""
    from aatjax.data.benchmarks import BENCHMARKS

    parser = parser_of("prepare")
    parser.add_argument("name", help=f"the benchmark: {', '.join(BENCHMARKS)}")
    parser.add_argument(
        "--from",
        dest="origin",
        type=Path,
        metavar="ARCHIVE_OR_FOLDER",
        help="the official archive, or the folder it was unpacked to",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("data"), help="folder of prepared sets (default data)"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the archive, where the licence allows it"
    )
    parser.add_argument(
        "--subset", action="store_true", help="take what is there although clips are missing"
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.05,
        help="share of clips that may be unreadable (default 0.05)",
    )
    parser.add_argument("--workers", type=int, help="decoding threads (default: one a core)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)

    from aatjax.data.benchmarks import find_benchmark
    from aatjax.data.prepare import prepare

    benchmark = find_benchmark(options.name)
    print(f"{benchmark.title}: {benchmark.paper}; licence: {benchmark.licence}", file=sys.stderr)
    with StageBar(quiet=options.quiet) as bar:
        outcome = prepare(
            options.name,
            options.origin,
            to=options.to,
            subset=options.subset,
            download=options.download,
            max_bad=options.max_bad,
            workers=options.workers,
            progress=bar.tell,
        )
    print(_text(outcome))


def _text(outcome: Any) -> str:
    census, benchmark = outcome.census, outcome.benchmark
    there = "was there before" if outcome.before else "prepared"
    whole = "whole" if census.whole else "SUBSET"
    lines = [f"{benchmark.title} {there}: {whole}, {census.text()}"]
    if outcome.checksum is not None:
        lines.append(
            "archive: the known one, by its checksum"
            if outcome.checksum
            else "archive: NOT the one whose checksum is known; look where it is from"
        )
    for clip, why in outcome.quarantined[:5]:
        lines.append(f"left out: {clip} ({why})")
    if len(outcome.quarantined) > 5:
        lines.append(f"left out: {len(outcome.quarantined) - 5} more, see prepared.json")
    for pair in outcome.duplicates[:5]:
        same = "the same sound" if pair.exact else "nearly the same sound"
        lines.append(f"{same} in parts {' and '.join(pair.parts)}: {pair.first}, {pair.second}")
    if len(outcome.duplicates) > 5:
        lines.append(f"{len(outcome.duplicates) - 5} more such pairs, see prepared.json")
    lines += [
        f"set: {outcome.folder}",
        f"aatjax train {benchmark.name}_soft_moa --data.path {outcome.folder.parent}",
    ]
    return "\n".join(lines)
