"""The grid of a comparison: every entry with every seed on every fold, each a run of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aatjax.analysis.method_costs import MethodCost, method_cost
from aatjax.config import Config, Data
from aatjax.errors import UsageError
from aatjax.experiments.compare.statistics import Summary, summarise
from aatjax.experiments.partition import open_data, runs_of
from aatjax.experiments.run import Show, load_backbone, train
from aatjax.petl import Method
from aatjax.petl.moa import Mixture
from aatjax.train.logging import read_rows

FREE = ("cache", "pad", "statistics")
"""Fields of the data that rows may differ in: they change what is made of a clip, not which."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the comparison.

    Attributes:
        name: shown in tables, and the name of its folder.
        config: what is run, but for seed and fold.
    """

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Cell:
    """One finished run.

    Attributes:
        entry, seed, fold: where it stands; fold is None where there is one division.
        metric: name of the figure.
        value: the metric on the test clips; None where it is not defined.
        step_s: seconds of a training step, compilation included in the first.
        curve: (epoch, training loss, validation metric or None) of every epoch.
        about: what its result tells of the data.
    """

    entry: str
    seed: int
    fold: str | None
    metric: str
    value: float | None
    step_s: float
    curve: tuple[tuple[int, float, float | None], ...]
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a report of a comparison shows.

    Attributes:
        title: data set and protocol.
        metric: name of the figure.
        entries: in the order given; the first is the one that others are compared with.
        cells: every run.
        costs: of each entry.
        summaries: of each entry.
        notes: what must be told: subset, protocol, choice on test clips, how intervals are made.
    """

    title: str
    metric: str
    entries: tuple[str, ...]
    cells: tuple[Cell, ...]
    costs: dict[str, MethodCost]
    summaries: dict[str, Summary]
    notes: tuple[str, ...]


def entries_of(
    configs: Sequence[Config], methods: Sequence[str], budget: int | None
) -> list[Entry]:
    """The rows: each config, or one config with each method, written `name` or `name@lr`.

    Args:
        configs: one or more; with `methods` exactly one.
        methods: rows of `aatjax methods`; a rate after @ replaces the config's.
        budget: parameters of the added modules, that mixtures and bottlenecks are sized to.

    Raises:
        UsageError: several configs with methods, two rows of one name, data that differ, or a rate
            that is no number.
    """
    if methods and len(configs) != 1:
        raise UsageError("--methods goes with one config, which gives data and training")
    rows = []
    for text in methods:
        name, _, rate = text.partition("@")
        config = configs[0].with_method(name)
        if rate:
            try:
                optim = dataclasses.replace(config.optim, lr=float(rate))
            except ValueError:
                raise UsageError(f"--methods {text}: {rate!r} is no learning rate") from None
            config = dataclasses.replace(config, optim=optim)
        rows.append(Entry(name, config))
    rows = rows or [Entry(config.name, config) for config in configs]
    if budget is not None:
        rows = [
            dataclasses.replace(
                row, config=dataclasses.replace(row.config, petl=sized(row.config.petl, budget))
            )
            for row in rows
        ]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UsageError(f"two rows have the same name ({', '.join(names)}): name configs apart")
    for row in rows[1:]:
        for field in (f.name for f in dataclasses.fields(Data) if f.name not in FREE):
            first, other = getattr(rows[0].config.data, field), getattr(row.config.data, field)
            if first != other:
                raise UsageError(
                    f"{rows[0].name} and {row.name} differ in data.{field} ({first!r}, {other!r}): "
                    "methods are compared on the same clips"
                )
    return rows


def sized(method: Method, budget: int) -> Method:
    """A mixture at a budget; other methods as they are, since theirs is their definition."""
    return dataclasses.replace(method, budget=budget) if isinstance(method, Mixture) else method


def run_grid(
    entries: Sequence[Entry],
    folder: Path,
    *,
    seeds: Sequence[int],
    folds: bool,
    show: Show = "stderr",
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Runs every cell that is not finished, and puts all together.

    Args:
        entries: the rows.
        folder: each cell is a run folder in `folder/runs`, and is not run again.
        seeds: of initial weights, order, crops and augmentation; the data stay divided the same.
        folds: whether every fold or run of the protocol is held out in turn.
        show: stream of each run's progress.
        tell: is told each cell as it begins.
    """
    first = entries[0].config
    costs = {entry.name: _cost(entry) for entry in entries}  # before hours are spent on runs
    divisions = {name: data.fold for name, data in runs_of(first.data).items()} if folds else {}
    cells = []
    total = len(entries) * len(seeds) * max(1, len(divisions))
    for seed in seeds:
        for fold in divisions.values() or (first.data.fold,):
            for entry in entries:
                place = f"{entry.name}/seed{seed}" + ("" if fold is None else f"-fold{fold}")
                tell(f"{place} ({len(cells) + 1} of {total})")
                cells.append(_run(entry, seed, fold, folder / "runs" / place, show))
    return _put_together(entries, cells, costs)


def _run(entry: Entry, seed: int, fold: str | None, place: Path, show: Show) -> Cell:
    config = dataclasses.replace(
        entry.config,
        data=dataclasses.replace(entry.config.data, fold=fold),
        training=dataclasses.replace(entry.config.training, seed=seed),
    )
    result = train(config, run_dir=place, show=show)
    rows = read_rows(place / "metrics.jsonl")
    curve = []
    for row in rows:
        scores = [v for k, v in row.items() if k.startswith("valid/") and isinstance(v, float)]
        curve.append((int(row["epoch"]), float(row["train/loss"]), scores[0] if scores else None))
    steps = max(1, int(rows[-1]["step"])) if rows else 1
    metric, value, *_ = result.headline or ("metric", None)
    told = json.loads((place / "result.json").read_text(encoding="utf-8"))
    return Cell(
        entry.name, seed, fold, metric, value, result.seconds / steps, tuple(curve), told["data"]
    )


def _cost(entry: Entry) -> MethodCost:
    model = load_backbone(entry.config.model, num_classes=_classes(entry.config), seed=0)
    return method_cost(model.config, entry.name, entry.config.petl)


def _put_together(
    entries: Sequence[Entry], cells: Sequence[Cell], costs: dict[str, MethodCost]
) -> Comparison:
    names = tuple(entry.name for entry in entries)
    values = {name: {(c.seed, c.fold): c.value for c in cells if c.entry == name} for name in names}
    about = cells[0].about
    config = entries[0].config
    path = config.data.path
    title = about.get("benchmark") or (config.data.format if path is None else Path(path).name)
    notes = [f"{len({c.seed for c in cells})} seeds, {len({c.fold for c in cells})} divisions"]
    if "benchmark" in about:
        notes.append(f"protocol {about['protocol']}: {about['paper']}")
        if not about["whole"]:
            notes.append(f"a SUBSET: {about['there']}")
    chosen = {c.about["chosen_on_test"] for c in cells if "chosen_on_test" in c.about}
    notes += [f"weights were chosen by the clips that are reported, as in {p}" for p in chosen]
    notes.append(
        "intervals: 95 %, Student t over folds (over seeds where there is one division), seeds "
        "averaged within a fold; differences are paired by seed and fold"
    )
    return Comparison(
        str(title),
        cells[0].metric,
        names,
        tuple(cells),
        costs,
        summarise(names, values),
        tuple(notes),
    )


def _classes(config: Config) -> int:
    if config.data.format == "synthetic":
        from aatjax.data.synthetic.synthesize import TARGET_SOUNDS

        return len(TARGET_SOUNDS)
    return len(open_data(config.data).classes)
