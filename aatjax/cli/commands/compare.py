"""Compares methods on one data set and protocol: tables, pictures, significance."""

import shlex
import sys
from pathlib import Path

from tyro.conf import UseAppendAction

from aatjax.cli.arguments import ConfigChoice, Count
from aatjax.cli.dry_run import make_begin
from aatjax.cli.output import format_table
from aatjax.errors import Seed, UsageError, printable

GROUP = "train"


def main(
    configs: tuple[str, ...] = (),
    *,
    fields: list[str],
    command: list[str],
    methods: tuple[str, ...] = (),
    seeds: tuple[Seed, ...] = (0,),
    cross_validate: bool = False,
    protocol: str | None = None,
    budget: Count | None = None,
    out: Path = Path("runs/compare"),
    allow_change: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    flags: bool = False,
) -> None:
    """Run `aatjax compare`.

    Args:
        configs: names of configs, or .py or .json files; every field of theirs is a flag
        methods: rows of `aatjax methods`, each with a learning rate after @ if wanted
        seeds: seeds of each row
        cross_validate: every fold of the data, or every run of its protocol
        protocol: division of a benchmark as in a paper: honest (default), aat or petl
        budget: number of parameters that mixtures are sized to
        out: folder of the comparison
        allow_change: as of `aatjax train`, for every run
        dry_run: check the configs, the sounds and the weights, list the runs, and stop
        json: print what results.json holds
        quiet: no line per run
        verbose: show the progress of each run
        flags: list every field of the config as a flag and exit
    """
    chosen = []
    for name in configs or ["default"]:
        config = ConfigChoice(name, flags=flags).load("compare", fields)
        chosen.append(config if protocol is None else config.with_protocol(protocol))
    from aatjax.experiments.compare.runs import make_entries, run_grid
    from aatjax.experiments.compare.tables import describe_best, format_comparison
    from aatjax.reports.html.compare import write_comparison

    entries = make_entries(chosen, methods, budget)
    if len(entries) < 2:
        raise UsageError("a comparison needs two rows: give more configs, or --methods A B")
    found = run_grid(
        entries,
        out,
        seeds=seeds,
        folds=cross_validate,
        show=sys.stderr if verbose else None,
        report=lambda line: quiet or print(printable(line), file=sys.stderr, flush=True),
        allow_change=allow_change,
        begin=make_begin(dry_run, "nothing was trained"),
    )
    files = write_comparison(found, out, shlex.join(command))
    if json:
        print((out / "results.json").read_text(encoding="utf-8"), end="")
        return
    print(format_table(*format_comparison(found)))
    print(printable(describe_best(found)))
    for note in found.notes:
        print(f"- {printable(note)}")
    print(f"report: {files[-1]}")
