"""The runs of a comparison: every entry with every seed on every fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aatjax.analysis.method_costs import MethodCost
from aatjax.config import Config, Data
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.errors import UsageError
from aatjax.experiments.clip_scores import ClipScores, pool_clips, read_clip_scores
from aatjax.experiments.compare.statistics import (
    MethodSummary,
    describe_test,
    summarise_methods,
)
from aatjax.experiments.partition import list_partition, list_runs, open_listed
from aatjax.experiments.run import check_selections, load_backbone, train
from aatjax.io.atomic import check_output
from aatjax.petl import Method
from aatjax.petl.moa import Mixture
from aatjax.train.logging import METRICS, Show, read_metrics

FREE = ("cache", "pad", "statistics")
"""Fields of the data that may differ between rows: they do not change which clips are used."""


@dataclasses.dataclass(frozen=True)
class CompareEntry:
    """A row of a comparison.

    Attributes:
        name: in tables, and of its folder.
        config: of its runs, except seed and fold.
    """

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class CompareCell:
    """One finished run.

    Attributes:
        entry, seed, fold: its place in the grid; fold is None where there is one division.
        metric: name of the metric.
        value: the metric on the test clips; None where it is not defined.
        low, high: its interval in this run.
        step_s: mean seconds per training step, compilation included.
        curve: (epoch, training loss, validation metric) of every epoch; None where there is none.
        about: notes on the data in its result.
        scores: its test clips; None of a run of a version that did not keep them.
    """

    entry: str
    seed: int
    fold: str | None
    metric: str
    value: float | None
    step_s: float
    curve: tuple[tuple[int, float | None, float | None], ...]
    about: dict[str, Any]
    low: float | None = None
    high: float | None = None
    scores: ClipScores | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that a report of a comparison shows.

    Attributes:
        title: name of the data set.
        metric: name of the metric.
        entries: in the order given; the first is the one that others are compared with.
        cells: every run.
        costs: of each entry.
        summaries: of each entry.
        notes: what must be reported: subset, protocol, selection on test clips, kind of intervals.
        counts: the number of different test clips and their groups, as `320 clips, 64 groups`.
    """

    title: str
    metric: str
    entries: tuple[str, ...]
    cells: tuple[CompareCell, ...]
    costs: dict[str, MethodCost]
    summaries: dict[str, MethodSummary]
    notes: tuple[str, ...]
    counts: str = ""


def make_entries(
    configs: Sequence[Config], methods: Sequence[str], budget: int | None
) -> list[CompareEntry]:
    """Make the rows: each config, or one config with each method, written `name` or `name@lr`.

    Args:
        configs: one or more; with `methods` exactly one.
        methods: rows of `aatjax methods`; a learning rate after @ replaces the config's.
        budget: parameters of the added modules, that mixtures are sized to.

    Raises:
        UsageError: several configs with methods, two rows of one name, different data, or a
            learning rate that is not a number.
    """
    if methods and len(configs) != 1:
        raise UsageError("--methods goes with one config, which gives data and training")
    rows = [_make_entry(configs[0], text) for text in methods]
    rows = rows or [CompareEntry(config.name, config) for config in configs]
    if budget is not None:
        rows = [
            dataclasses.replace(
                row, config=dataclasses.replace(row.config, petl=_resize(row.config.petl, budget))
            )
            for row in rows
        ]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UsageError(f"two rows have the same name ({', '.join(names)}): rename a config")
    for row in rows[1:]:
        for field in (f.name for f in dataclasses.fields(Data) if f.name not in FREE):
            first, other = getattr(rows[0].config.data, field), getattr(row.config.data, field)
            if first != other:
                raise UsageError(
                    f"{rows[0].name} and {row.name} differ in data.{field} ({first!r}, {other!r}): "
                    "methods are compared on the same clips"
                )
    return rows


def _make_entry(config: Config, text: str) -> CompareEntry:
    name, _, rate = text.partition("@")
    config = config.with_method(name)
    if rate:
        try:
            optim = dataclasses.replace(config.optim, lr=float(rate))
        except ValueError:
            raise UsageError(f"--methods {text}: {rate!r} is not a learning rate") from None
        config = dataclasses.replace(config, optim=optim)
    return CompareEntry(name, config)


def _resize(method: Method, budget: int) -> Method:
    """A mixture at a budget; other methods unchanged, since their width is their definition."""
    return method.replace(budget=budget) if isinstance(method, Mixture) else method


def run_grid(
    entries: Sequence[CompareEntry],
    folder: Path,
    *,
    seeds: Sequence[int],
    folds: bool,
    show: Show = "stderr",
    report: Callable[[str], object] = lambda line: None,
    allow_change: Sequence[str] = (),
    begin: Callable[[], None] = lambda: None,
) -> Comparison:
    """Train and evaluate every run that is not finished, and assemble the comparison.

    Args:
        entries: the rows.
        folder: each run has a folder in `folder/runs`; a finished one is not repeated.
        seeds: of initial weights, order, crops and augmentation; the division of the data is the
            same for all.
        folds: whether every fold or run of the protocol is held out in turn.
        show: stream of the progress of each run.
        report: called with one line as each run begins.
        allow_change: as of `train`.
        begin: called when everything was checked, before the first run.
    """
    first = entries[0].config
    costs = estimate_costs(entries)  # before hours are spent on runs
    divisions = {name: data.fold for name, data in list_runs(first.data).items()} if folds else {}
    for entry in entries:
        check_selections(entry.config, list_partition(entry.config.data))
    check_output(folder / "comparison.json")
    begin()
    cells = []
    total = len(entries) * len(seeds) * max(1, len(divisions))
    for seed in seeds:
        for fold in divisions.values() or (first.data.fold,):
            for entry in entries:
                place = f"{entry.name}/seed{seed}" + ("" if fold is None else f"-fold{fold}")
                report(f"{place} ({len(cells) + 1} of {total})")
                cell = _run_cell(entry, seed, fold, folder / "runs" / place, show, allow_change)
                cells.append(cell)
    return assemble_comparison(entries, cells, costs)


def _run_cell(
    entry: CompareEntry,
    seed: int,
    fold: str | None,
    folder: Path,
    show: Show,
    allow_change: Sequence[str],
) -> CompareCell:
    config = dataclasses.replace(
        entry.config,
        data=dataclasses.replace(entry.config.data, fold=fold),
        training=dataclasses.replace(entry.config.training, seed=seed),
    )
    result = train(config, run_dir=folder, show=show, allow_change=allow_change)
    rows = read_metrics(folder / METRICS)
    curve = []
    for row in rows:
        scores = [v for k, v in row.items() if k.startswith("valid/") and isinstance(v, float)]
        curve.append((int(row["epoch"]), row.get("train/loss"), scores[0] if scores else None))
    steps = max(1, int(rows[-1]["step"])) if rows else 1
    metric, value, low, high = result.headline or ("metric", None, None, None)
    about = dict(result.about)
    seconds = result.seconds / steps
    return CompareCell(
        entry.name,
        seed,
        fold,
        metric,
        value,
        seconds,
        tuple(curve),
        about,
        low,
        high,
        read_clip_scores(folder),
    )


def estimate_costs(entries: Sequence[CompareEntry]) -> dict[str, MethodCost]:
    """Estimate parameters, FLOPs and memory of each entry's method on its backbone."""
    costs = {}
    for entry in entries:
        config = entry.config
        if config.data.format == "synthetic":
            classes = len(TARGET_SOUNDS)
        else:
            classes = len(open_listed(config.data).classes)
        model = load_backbone(config.model, num_classes=classes, seed=0)
        costs[entry.name] = MethodCost(model.config, entry.name, config.petl)
    return costs


def assemble_comparison(
    entries: Sequence[CompareEntry], cells: Sequence[CompareCell], costs: dict[str, MethodCost]
) -> Comparison:
    """Put finished runs together, with their statistics and notes."""
    names = tuple(entry.name for entry in entries)
    values = {name: {(c.seed, c.fold): c.value for c in cells if c.entry == name} for name in names}
    scores = {
        name: {(c.seed, c.fold): c.scores for c in cells if c.entry == name} for name in names
    }
    pooled = pool_clips(scores[names[0]])
    about = cells[0].about
    data = entries[0].config.data
    title = about.get("benchmark") or data.title
    seeds, divisions = len({c.seed for c in cells}), len({c.fold for c in cells})
    plurals = "s" * (seeds > 1), "s" * (divisions > 1)
    notes = [f"{seeds} seed{plurals[0]}, {divisions} division{plurals[1]}"]
    if "benchmark" in about:
        notes.append(f"protocol {about['protocol']}: {about['paper']}")
        if not about["whole"]:
            notes.append(f"a SUBSET: {about['there']}")
    chosen = {c.about["chosen_on_test"] for c in cells if "chosen_on_test" in c.about}
    notes += [f"weights were selected on the reported clips, as in {paper}" for paper in chosen]
    notes += sorted({str(c.about["not_counted"]) for c in cells if "not_counted" in c.about})
    notes.append(describe_test(len(cells) // len(names), pooled))
    if seeds * divisions == 1:
        notes.append("one run each: the differences are of these models, not yet of the methods")
    return Comparison(
        title=str(title),
        metric=cells[0].metric,
        entries=names,
        cells=tuple(cells),
        costs=costs,
        summaries=_keep_own_intervals(cells, summarise_methods(names, values, scores)),
        notes=tuple(notes),
        counts="" if pooled is None else pooled.counts,
    )


def _keep_own_intervals(
    cells: Sequence[CompareCell], summaries: dict[str, MethodSummary]
) -> dict[str, MethodSummary]:
    """A row of a single run has the interval of that run, as `aatjax eval` shows it."""
    if len(cells) > len(summaries):
        return summaries
    own = {cell.entry: {"low": cell.low, "high": cell.high} for cell in cells}
    return {name: dataclasses.replace(one, **own[name]) for name, one in summaries.items()}
