"""Several runs that make one figure: the folds of a protocol, the draws of few-shot training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.config import Config
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.formats import detect_benchmark
from aatjax.errors import DataError, UsageError
from aatjax.experiments.partition import divide, runs_of
from aatjax.experiments.run import Result, Show, run_folder, train
from aatjax.io.json_file import write_json
from aatjax.train.distributed import run_on_main
from aatjax.train.logging import read_metrics
from aatjax.train.metrics.intervals import mean_interval


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Results of every run, and their mean with a 95% interval (Student t).

    Attributes:
        runs: by name.
        metric: what is averaged.
        mean, low, high: over the runs; few-shot draws are averaged over their folds first.
        epoch: the one epoch that was chosen over all runs, where a protocol does so.
        last: the mean of the last epoch, beside such a choice.
        chosen_on_test: the paper whose protocol chooses by the clips that are reported.
    """

    runs: dict[str, Result]
    metric: str
    mean: float
    low: float | None
    high: float | None
    epoch: int | None = None
    last: float | None = None
    chosen_on_test: str | None = None


def cross_validate(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    show: Show = "stderr",
    draws: int | None = None,
    folds: bool = True,
    allow_change: Sequence[str] = (),
    stuck_after: float = 600.0,
) -> Repeated:
    """Trains once for every fold of the data set or run of its protocol, and every draw.

    Args:
        config: the experiment; its data set must have folds.
        run_dir: folder of the runs' folders.
        show: stream of the progress display, None for silence.
        draws: draws of the few-shot training clips (`data.shots`), numbered from `data.draw`.
        folds: whether each fold is held out in turn; otherwise only the draws are repeated.
        allow_change, stuck_after: as in `train`.

    Raises:
        UsageError: the data set has no folds, or draws are asked for without `data.shots`.
        DataError: the metric is not defined on a fold.
    """
    screen = sys.stderr if isinstance(show, str) else show
    folder = Path(run_dir) if run_dir is not None else run_folder(config)
    if draws is not None and (draws < 1 or config.data.shots is None):
        raise UsageError("--draws repeats few-shot training: give --data.shots K too, and 1 draw")
    if not folds and divide(config.data).test is None:
        raise UsageError("no test clips, so no figure to repeat: give --data.test-fraction")
    data = {f"fold{name}": d for name, d in runs_of(config.data).items()} if folds else {}
    data = data or {"": config.data}
    runs = {
        "-".join(filter(None, [fold, f"draw{draw}" if draws else ""])): dataclasses.replace(
            part, draw=draw
        )
        for draw in range(config.data.draw, config.data.draw + (draws or 1))
        for fold, part in data.items()
    }
    results: dict[str, Result] = {}
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
        )
    found = _joined(config, folder, results, draws is not None)
    row: dict[str, Any] = {
        "method": config.petl.name,
        "metric": found.metric,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "epoch": found.epoch,
        "mean_of_last_epoch": found.last,
        "chosen_on_test": found.chosen_on_test,
        "folds": {
            name.removeprefix("fold"): None if r.headline is None else r.headline[1]
            for name, r in results.items()
        },
    }
    # result.json is that of a run without folds
    run_on_main(lambda: write_json(folder / "cross_validation.json", row))
    return found


def _joined(config: Config, folder: Path, results: dict[str, Result], few_shot: bool) -> Repeated:
    headlines = {name: r.headline for name, r in results.items() if r.headline is not None}
    scores = {name: headline[1] for name, headline in headlines.items()}
    metric = next(headline[0] for headline in headlines.values())
    undefined = [name for name, score in scores.items() if score is None]
    if undefined:
        raise DataError(
            f"{config.data.path}: {metric} is not defined on {', '.join(undefined)}: it lacks "
            "clips of some class; put some there, or join folds"
        )
    values = {name: score for name, score in scores.items() if score is not None}
    if few_shot:
        by_draw: dict[str, list[float]] = {}
        for name, score in values.items():
            by_draw.setdefault(name.rpartition("draw")[2], []).append(score)
        values = {draw: float(np.mean(part)) for draw, part in by_draw.items()}
    mean, low, high = mean_interval(list(values.values()))
    benchmark = detect_benchmark(config.data.path, config.data.format)
    if benchmark is None:
        return Repeated(results, metric, mean, low, high)
    protocol = BENCHMARKS[benchmark].protocol(config.data.protocol or "honest")
    paper = protocol.paper if protocol.chooses_on_test else None
    if protocol.selection != "mean_curve":
        return Repeated(results, metric, mean, low, high, chosen_on_test=paper)
    curves = {
        name: [row[f"valid/{metric}"] for row in read_metrics(folder / name / "metrics.jsonl")]
        for name in results
    }
    curve = np.mean(list(curves.values()), axis=0)
    at = int(np.argmax(curve))
    chosen, low, high = mean_interval([float(scores[at]) for scores in curves.values()])
    return Repeated(results, metric, chosen, low, high, at + 1, mean, paper)
