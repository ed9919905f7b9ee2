"""Kills a small run repeatedly on your own disk, resumes it and compares bit for bit."""

import sys
from pathlib import Path

from aatjax.cli.arguments import Count
from aatjax.errors import Seed

GROUP = "plan"


def main(
    config: str = "default",
    *,
    fields: list[str],
    out: Path,
    interruptions: Count = 20,
    seed: Seed = 0,
) -> None:
    """Run `aatjax chaos`.

    Args:
        config: a small config; every field of it is a flag
        out: a new folder on the disk to test
        interruptions: how often the run is killed
        seed: seed of the moments at which it is killed
    """
    from aatjax.io.atomic import write_text
    from aatjax.train.fault_injection import Trial

    trial = Trial(
        [config, *fields],
        out,
        seed=seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = trial.run(interruptions)
    write_text(out / "certificate.txt", found.to_text() + "\n")
    print(found.to_text())
    if found.problems:
        raise SystemExit(1)
