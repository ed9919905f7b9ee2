"""Trains a config on labelled sounds and reports its test metrics."""

import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from aatjax.cli.arguments import ConfigArguments, Count
from aatjax.cli.dry_run import make_begin
from aatjax.cli.output import format_headline, format_result, format_table
from aatjax.errors import Range

GROUP = "train"


def main(
    config: ConfigArguments,
    *,
    fields: list[str],
    out: Path | None = None,
    cross_validate: bool = False,
    protocol: str | None = None,
    draws: Count | None = None,
    allow_change: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
    coordinator: str | None = None,
    processes: Count | None = None,
    process: Annotated[int, Range(0)] | None = None,
    stuck_after: Annotated[float, Range(above=0)] = 600.0,
) -> None:
    """Train a config; the same command resumes after an interruption.

    Args:
        out: run folder (default: runs/CONFIG-METHOD)
        cross_validate: train once per fold of the data or run of its protocol; report the mean
        protocol: division of a benchmark as in a paper: honest (default), aat or petl
        draws: few-shot training (--data.shots) this many times, each with other clips
        allow_change: resume although this field of the config (optim.lr), a part of it (optim) or
            the data set (clips) has changed
        dry_run: check the config, the sounds, the weights and the folder, and stop
        json: print one JSON object
        quiet: no progress
        coordinator: HOST:PORT of process 0, where several train together; found under SLURM, Open
            MPI, GKE and on TPU hosts
        processes: number of processes
        process: number of this process, from 0
        stuck_after: seconds to wait for a process that is late or makes no progress, after which
            all are ended
    """
    settings = config.load("train", fields)
    if protocol is not None:
        settings = settings.with_protocol(protocol)
    from json import dumps

    from aatjax.experiments import cross_validation
    from aatjax.experiments import run as experiment
    from aatjax.train import cluster, distributed

    given = cluster.Processes(coordinator, processes, process)
    distributed.start_processes(given, stuck_after=stuck_after)
    distributed.check_devices()
    more: dict[str, Any] = {
        "run_dir": out,
        "show": None if quiet else sys.stderr,
        "allow_change": allow_change,
        "stuck_after": stuck_after,
        "begin": make_begin(dry_run, "nothing was trained"),
    }
    if cross_validate or draws is not None:
        repeated = cross_validation.cross_validate(
            settings, draws=draws, folds=cross_validate, **more
        )
        if distributed.is_main():
            text = _format_repeats(settings.petl.name, repeated)
            print(dumps(repeated.to_json()) if json else text)
        return
    result = experiment.train(settings, **more)
    if distributed.is_main() and json:
        print(dumps(result.to_json()))
    elif distributed.is_main():
        print(format_result(result))
        for line in _format_note(result.about.get("chosen_on_test")):
            print(line)
        print(f"adapter: {result.artefact} ({result.artefact.stat().st_size / 1e6:.2f} MB)")


def _format_repeats(method: str, repeated: Any) -> str:
    """A table of one row per run, and their mean."""
    rows = [
        [
            name.replace("fold", "fold ").replace("draw", "draw "),
            f"{run.trainable:,}",
            format_headline(run.headline),
            run.counts,
            f"{run.seconds:.0f}",
        ]
        for name, run in repeated.runs.items()
    ]
    seconds = sum(run.seconds for run in repeated.runs.values())
    mean = format_headline((repeated.metric, repeated.mean, repeated.low, repeated.high))
    name = "mean" if repeated.epoch is None else f"mean, epoch {repeated.epoch}"
    rows.append([name, "", mean, repeated.counts, f"{seconds:.0f}"])
    if repeated.last is not None:
        rows.append(["mean, last epoch", "", f"{repeated.last:.3f}", "", ""])
    text = format_table([method, "trainable", repeated.metric, "tested on", "seconds"], rows)
    return "\n".join([text, *_format_note(repeated.chosen_on_test)])


def _format_note(paper: str | None) -> list[str]:
    """The note on weights that were chosen by the test clips."""
    if paper is None:
        return []
    return [f"NOTE: weights were chosen by the test clips, as in {paper}: the figure is too high"]
