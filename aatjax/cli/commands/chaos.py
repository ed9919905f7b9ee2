"""`aatjax chaos`: tries what a run survives on a disk."""

import sys
from pathlib import Path

from aatjax.cli.arguments import parser_of
from aatjax.errors import UsageError


def main(arguments: list[str]) -> None:
    """Runs `aatjax chaos`."""
    parser = parser_of("chaos")
    parser.add_argument("config", nargs="?", default="default", help="a small config")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder on the disk")
    parser.add_argument("--interruptions", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments")
    options, fields = parser.parse_known_args(arguments)
    if options.interruptions < 1:
        raise UsageError(f"--interruptions {options.interruptions} must be at least 1")
    from aatjax.io.atomic import write_text
    from aatjax.train.fault_injection import Trial

    trial = Trial(
        [options.config, *fields],
        options.workdir,
        seed=options.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = trial.run(options.interruptions)
    certificate = options.workdir / "certificate.txt"
    write_text(certificate, found.text() + "\n")
    print(found.text())
    if found.problems:
        raise SystemExit(1)
