"""Kills a small run repeatedly on your own disk, resumes it and compares bit for bit."""

import sys
from pathlib import Path

from aatjax.cli.arguments import ConfigChoice, Count
from aatjax.cli.dry_run import make_begin
from aatjax.errors import Seed

GROUP = "plan"


def main(
    config: str = "default",
    *,
    fields: list[str],
    out: Path,
    interruptions: Count = 20,
    seed: Seed = 0,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax chaos`.

    Args:
        config: a small config; every field of it is a flag
        out: a new folder on the disk to test
        interruptions: how often the run is killed
        seed: seed of the moments at which it is killed
        dry_run: check the config and the folder, and stop
        json: print one JSON object
        quiet: no line per interruption
    """
    from json import dumps

    from aatjax.io.atomic import write_text
    from aatjax.train.fault_injection import Trial

    trial = Trial(
        [config, *fields],
        out,
        seed=seed,
        say=lambda line: quiet or print(line, file=sys.stderr, flush=True),
    )
    ConfigChoice(config).load("chaos", fields)
    found = trial.run(interruptions, begin=make_begin(dry_run, "nothing was run"))
    write_text(out / "certificate.txt", found.to_text() + "\n")
    print(dumps(vars(found)) if json else found.to_text())
    if found.problems:
        raise SystemExit(1)
