"""Cross-validation: several runs for one figure, over folds, protocol runs or few-shot draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.config import Config, Data
from aatjax.errors import DataError, UsageError
from aatjax.experiments.clip_scores import pool_clips, read_clip_scores, summarise_runs
from aatjax.experiments.partition import find_protocol, list_partition, list_runs
from aatjax.experiments.run import ExperimentResult, name_run_folder, train
from aatjax.io.json_file import write_json
from aatjax.train.distributed import run_on_main
from aatjax.train.logging import METRICS, Show, choose_stream, read_metrics
from aatjax.train.metrics.intervals import mean_interval


@dataclasses.dataclass(frozen=True)
class CrossValidationResult:
    """Results of all runs, and their mean with a 95 % interval (`summarise_runs`).

    Attributes:
        runs: by name.
        metric: the metric that is averaged.
        mean, low, high: over the runs and their test clips; of an epoch chosen over all runs
            Student's t over the runs.
        counts: the number of different test clips and their groups, as `320 clips, 64 groups`.
        epoch: the one epoch chosen over all runs, where a protocol does so.
        last: the mean of the last epoch, where an epoch was chosen.
        chosen_on_test: the paper whose protocol chooses by the test clips.
    """

    runs: dict[str, ExperimentResult]
    metric: str
    mean: float
    low: float | None
    high: float | None
    counts: str = ""
    epoch: int | None = None
    last: float | None = None
    chosen_on_test: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the values of JSON that `cross_validation.json` holds."""
        scores = {
            name.removeprefix("fold"): None if one.headline is None else one.headline[1]
            for name, one in self.runs.items()
        }
        return {
            "method": next(iter(self.runs.values())).method,
            "metric": self.metric,
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "test": self.counts,
            "epoch": self.epoch,
            "mean_of_last_epoch": self.last,
            "chosen_on_test": self.chosen_on_test,
            "folds": scores,
        }


def cross_validate(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    show: Show = "stderr",
    draws: int | None = None,
    folds: bool = True,
    allow_change: Sequence[str] = (),
    stuck_after: float = 600.0,
    begin: Callable[[], None] = lambda: None,
) -> CrossValidationResult:
    """Train once per fold of the data set or run of its protocol, and per draw.

    Args:
        config: the experiment; its data set must have folds.
        run_dir: folder of the runs' folders.
        show: stream of the progress display; None or False for silence.
        draws: draws of the few-shot training clips (`data.shots`), numbered from `data.draw`.
        folds: hold out each fold in turn; otherwise repeat the draws only.
        allow_change, stuck_after, begin: as in `train`, of each run.

    Raises:
        UsageError: the data set has no folds or no test clips, or `data.shots` is missing.
        DataError: the metric is not defined on a fold.
    """
    screen = choose_stream(show)
    folder = Path(run_dir) if run_dir is not None else name_run_folder(config)
    results: dict[str, ExperimentResult] = {}
    runs = _plan_runs(config.data, draws, folds)
    protocol = find_protocol(next(iter(runs.values())))
    if protocol and protocol[1].selection == "mean_curve" and config.training.patience is not None:
        raise UsageError(
            f"training.patience={config.training.patience} ends the folds at different epochs, and "
            f"its protocol ({config.data.protocol}) chooses one epoch for all: leave it out"
        )
    for number, (name, part) in enumerate(runs.items(), 1):
        if screen is not None:
            shown = name.replace("fold", "fold ").replace("draw", "draw ")
            print(f"{shown} ({number} of {len(runs)})", file=screen, flush=True)
        results[name] = train(
            dataclasses.replace(config, data=part),
            run_dir=folder / name,
            show=screen,
            allow_change=allow_change,
            stuck_after=stuck_after,
            begin=begin,
        )
    found = _average(runs, folder, results)
    # result.json belongs to a run without folds
    run_on_main(lambda: write_json(folder / "cross_validation.json", found.to_json()))
    return found


def _plan_runs(data: Data, draws: int | None, folds: bool) -> dict[str, Data]:
    """The data of every run, by the name of its folder."""
    if draws is not None and (draws < 1 or data.shots is None):
        raise UsageError("--draws (1 or more) repeats few-shot training: add --data.shots K")
    if not folds and list_partition(data).test is None:
        raise UsageError("no test clips, so no figure to repeat: add --data.test-fraction")
    parts = {f"fold{name}": part for name, part in list_runs(data).items()} if folds else {}
    return {
        "-".join(filter(None, [fold, f"draw{draw}" if draws else ""])): dataclasses.replace(
            part, draw=draw
        )
        for draw in range(data.draw, data.draw + (draws or 1))
        for fold, part in (parts or {"": data}).items()
    }


def _read_curves(folders: Sequence[Path], name: str) -> list[list[float]]:
    """The values of a figure by epoch, of runs of equal length."""
    curves = [
        [row[name] for row in read_metrics(folder / METRICS) if row["epoch"] and name in row]
        for folder in folders
    ]
    epochs = max(map(len, curves))
    for folder, curve in zip(folders, curves, strict=True):
        if len(curve) < epochs:
            raise DataError(
                f"{folder / METRICS}: has {name} of {len(curve)} of {epochs} epochs: delete "
                f"{folder} to have that run trained again"
            )
    return curves


def _average(
    runs: dict[str, Data], folder: Path, results: dict[str, ExperimentResult]
) -> CrossValidationResult:
    data = next(iter(runs.values()))
    headlines = {name: r.headline for name, r in results.items() if r.headline is not None}
    metric = next(headline[0] for headline in headlines.values())
    undefined = [name for name, headline in headlines.items() if headline[1] is None]
    if undefined:
        raise DataError(
            f"{data.path}: {metric} is not defined on {', '.join(undefined)}: clips of some class "
            "are missing; add some, or join folds"
        )
    keys = {name: (part.draw, part.fold) for name, part in runs.items()}
    values = {keys[name]: one[1] for name, one in headlines.items() if one[1] is not None}
    scores = {keys[name]: read_clip_scores(folder / name) for name in headlines}
    mean, low, high = summarise_runs(values, scores)
    pooled = pool_clips(scores)
    counts = "" if pooled is None else pooled.counts
    found = find_protocol(data)
    if found is None:
        return CrossValidationResult(results, metric, mean, low, high, counts)
    protocol = found[1]
    paper = protocol.paper if protocol.chooses_on_test else None
    if protocol.selection != "mean_curve":
        return CrossValidationResult(results, metric, mean, low, high, counts, chosen_on_test=paper)
    curves = np.array(_read_curves([folder / name for name in results], f"valid/{metric}"))
    if not curves.size:  # a head in closed form has no epochs
        return CrossValidationResult(results, metric, mean, low, high, counts, chosen_on_test=paper)
    best = int(np.argmax(curves.mean(axis=0)))
    chosen, low, high = mean_interval(curves[:, best].tolist())
    return CrossValidationResult(results, metric, chosen, low, high, counts, best + 1, mean, paper)
