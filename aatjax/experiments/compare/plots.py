"""The pictures of a comparison, readable in grey: shapes and dashes, not colours, tell rows apart.

Drawn with matplotlib, without a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aatjax.experiments.compare.runs import Comparison

MARKS = "osD^v<>PX*hd"
DASHES = ("-", "--", "-.", ":")
KINDS = ("svg", "png")


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes the pictures as SVG and PNG, and returns the files.

    `pareto_parameters` and `pareto_flops`: the metric against trainable parameters and against
    training FLOPs a clip, with intervals and the front of what nothing else beats; `curves`: loss,
    and the validation metric where there is one, by epoch.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aatjax", "font.size": 9}):
        for name, figure in (
            ("pareto_parameters", _pareto(comparison, "parameters")),
            ("pareto_flops", _pareto(comparison, "flops")),
            ("curves", _curves(comparison)),
        ):
            for kind in KINDS:
                path = folder / f"{name}.{kind}"
                meta = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=meta)
                files.append(path)
            pyplot.close(figure)
    return files


def front(costs: list[float], values: list[float]) -> list[int]:
    """Which points no other beats: none is as cheap or cheaper and better."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    best, kept = -np.inf, []
    for i in order:
        if values[i] > best:
            kept.append(i)
            best = values[i]
    return kept


def _style(index: int) -> dict[str, Any]:
    grey = str(round(0.05 + 0.5 * (index % 4) / 3, 2))
    return {"color": grey, "marker": MARKS[index % len(MARKS)]}


def _pareto(comparison: Comparison, what: str) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.4, 3.8))
    names = comparison.entries
    costs = [
        comparison.costs[n].trainable
        if what == "parameters"
        else comparison.costs[n].training.total / 1e9
        for n in names
    ]
    values = [100 * comparison.summaries[n].mean for n in names]
    for i, name in enumerate(names):
        found = comparison.summaries[name]
        reach = None
        if found.low is not None and found.high is not None:
            reach = [[values[i] - 100 * found.low], [100 * found.high - values[i]]]
        axes.errorbar(
            costs[i],
            values[i],
            yerr=reach,
            linestyle="none",
            markersize=7,
            capsize=3,
            label=name,
            **_style(i),
        )
    edge = front([float(c) for c in costs], values)
    axes.plot(
        [costs[i] for i in edge],
        [values[i] for i in edge],
        color="0.6",
        linewidth=1,
        linestyle="--",
        zorder=0,
        label="front",
    )
    if what == "parameters":
        axes.set_xscale("log")
    label = "trainable parameters" if what == "parameters" else "training GFLOPs a clip"
    axes.set_xlabel(label)
    axes.set_ylabel(f"{comparison.metric} (%)")
    axes.set_title(comparison.title)
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _curves(comparison: Comparison) -> Any:
    from matplotlib import pyplot

    scored = any(point[2] is not None for cell in comparison.cells for point in cell.curve)
    figure, every = pyplot.subplots(1, 1 + scored, figsize=(5.4 * (1 + scored), 3.6), squeeze=False)
    for column, axes in enumerate(every[0]):
        for i, name in enumerate(comparison.entries):
            curves = [cell.curve for cell in comparison.cells if cell.entry == name]
            length = min(len(curve) for curve in curves)
            epochs = [point[0] for point in curves[0][:length]]
            values = np.array(
                [[point[1 + column] for point in curve[:length]] for curve in curves], np.float64
            )
            mean = np.nanmean(values, axis=0) if length else np.zeros(0)
            style = _style(i)
            axes.plot(
                epochs,
                mean,
                linestyle=DASHES[i % len(DASHES)],
                label=name,
                markevery=max(1, length // 6),
                markersize=4,
                linewidth=1.2,
                **style,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation metric" if column else "training loss")
        axes.grid(color="0.9")
    every[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
