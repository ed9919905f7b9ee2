"""The folder of a comparison: tables, charts, and one HTML page with all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aatjax.errors import printable
from aatjax.experiments.compare import tables
from aatjax.experiments.compare.runs import Comparison
from aatjax.io.atomic import write_file, write_text
from aatjax.reports.html.charts import QUIET, choose_style, embed_figure, make_figure, save_figure
from aatjax.reports.html.page import render_page

PARETO = "The metric against {}; the dashed line is the Pareto front."
CAPTIONS = {
    "pareto_parameters": PARETO.format("the number of trained parameters"),
    "pareto_flops": PARETO.format("the FLOPs of a training step per clip"),
    "curves": "Means over all seeds and folds.",
}


def write_comparison(comparison: Comparison, folder: Path, command: str) -> list[Path]:
    """Write results.csv, results.json, table.md, table.tex, the charts and report.html.

    Args:
        comparison: from `run_grid`.
        folder: made if it does not exist.
        command: the command line that asked for it.

    Raises:
        WriteError: the folder cannot be written.
    """
    texts = {
        "results.csv": tables.format_csv(comparison),
        "results.json": json.dumps(tables.make_comparison_json(comparison), indent=2) + "\n",
        "table.md": tables.format_markdown(comparison),
        "table.tex": tables.format_latex(comparison),
    }
    figures = draw_comparison(comparison)
    page = _render_page(comparison, figures, command)
    charts = [folder / f"{name}.{kind}" for name in figures for kind in ("svg", "png")]
    for name, text in {**texts, "report.html": page}.items():
        write_text(folder / name, text)
    for path in charts:
        write_file(
            path, lambda place, path=path: save_figure(figures[path.stem], place, path.suffix[1:])
        )
    return [*(folder / name for name in texts), *charts, folder / "report.html"]


def _render_page(comparison: Comparison, figures: dict[str, Figure], command: str) -> str:
    heads, rows = tables.format_comparison(comparison)
    return render_page(
        "compare.html",
        title=comparison.title,
        best=tables.describe_best(comparison),
        heads=heads,
        rows=rows,
        notes=comparison.notes,
        charts=[(embed_figure(figures[name], text), text) for name, text in CAPTIONS.items()],
        command=command,
    )


def draw_comparison(comparison: Comparison) -> dict[str, Figure]:
    """Draw the charts, by name.

    `pareto_parameters` and `pareto_flops`: the metric against trainable parameters and against
    training FLOPs per clip, with intervals and the Pareto front; `curves`: loss, and the validation
    metric where there is one, by epoch.
    """
    costs = [comparison.costs[name] for name in comparison.entries]
    parameters = [float(cost.trainable) for cost in costs]
    flops = [cost.training.total / 1e9 for cost in costs]
    return {
        "pareto_parameters": _draw_pareto(comparison, parameters, "trained parameters", "log"),
        "pareto_flops": _draw_pareto(comparison, flops, "training GFLOPs per clip", "linear"),
        "curves": _draw_curves(comparison),
    }


def find_pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The points for which no other is as cheap or cheaper and as good or better, by cost."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    best, front = -np.inf, []
    for i in order:
        if values[i] > best:
            front.append(i)
            best = values[i]
    return front


def _draw_pareto(comparison: Comparison, costs: list[float], label: str, scale: str) -> Figure:
    summaries = [comparison.summaries[name] for name in comparison.entries]
    values = [100 * summary.mean for summary in summaries]

    def build(axes: Axes) -> None:
        for i, (name, summary) in enumerate(zip(comparison.entries, summaries, strict=True)):
            reach = None
            if summary.low is not None and summary.high is not None:
                reach = [[values[i] - 100 * summary.low], [100 * summary.high - values[i]]]
            style = {**choose_style(i), "linestyle": "none", "markersize": 7}
            axes.errorbar(
                costs[i], values[i], yerr=reach, capsize=3, label=printable(name), **style
            )
        front = find_pareto_front(costs, values)
        x, y = [costs[i] for i in front], [values[i] for i in front]
        axes.plot(x, y, color=QUIET, linewidth=1, linestyle="--", zorder=0, label="Pareto front")
        axes.set(xlabel=label, ylabel=f"{comparison.metric} (%)", xscale=scale)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_title(printable(comparison.title))
        axes.grid()
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return make_figure(build, 6.4, 3.8)


def _draw_curves(comparison: Comparison) -> Figure:
    scored = any(point[2] is not None for cell in comparison.cells for point in cell.curve)

    def build(*columns: Axes) -> None:
        for column, axes in enumerate(columns, 1):
            for i, name in enumerate(comparison.entries):
                curves = [cell.curve for cell in comparison.cells if cell.entry == name]
                length = min(map(len, curves))
                values = np.array([[p[column] for p in curve[:length]] for curve in curves], float)
                style = {**choose_style(i), "markevery": max(1, length // 6)}
                epochs = [point[0] for point in curves[0][:length]]
                axes.plot(epochs, np.nanmean(values, axis=0), label=printable(name), **style)
            axes.set(xlabel="epoch", ylabel=("training loss", "validation metric")[column - 1])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid()
        columns[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return make_figure(build, 5.8 * (1 + scored), 3.6, columns=1 + scored)
