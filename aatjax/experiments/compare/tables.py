"""The table of a comparison as CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median_high
from typing import Any

from aatjax.errors import format_count, printable
from aatjax.experiments.compare.runs import Comparison
from aatjax.io.csv_text import format_csv_rows

LEVEL = 0.05
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "_%&#${}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "*": r"\*", "`": r"\`", "\\": r"\\"}
)


def list_records(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per entry, with the numbers of all tables."""
    rows = []
    for name in comparison.entries:
        cost = comparison.costs[name]
        rows.append(
            {
                "method": name,
                "trainable": cost.trainable,
                **dataclasses.asdict(comparison.summaries[name]),
                "training_gflops": cost.training.total / 1e9,
                "adapter_gflops": cost.training.adapter / 1e9,
                "step_s": median_high(c.step_s for c in comparison.cells if c.entry == name),
                "activation_mib": cost.activation_bytes / 2**20,
            }
        )
    return rows


def format_csv(comparison: Comparison) -> str:
    """A row per entry, all digits."""
    rows = list_records(comparison)
    return format_csv_rows([list(rows[0]), *(list(row.values()) for row in rows)])


def make_comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything: rows, every run with its curve, notes."""
    return {
        "title": comparison.title,
        "metric": comparison.metric,
        "test": comparison.counts,
        "notes": list(comparison.notes),
        "rows": list_records(comparison),
        "cells": [
            dataclasses.asdict(dataclasses.replace(cell, scores=None)) for cell in comparison.cells
        ],
        "costs": {name: cost.to_json() for name, cost in comparison.costs.items()},
    }


def format_comparison(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells to be read: percent, with intervals."""
    heads = [
        "method",
        "trainable",
        f"{comparison.metric} ({comparison.counts})" if comparison.counts else comparison.metric,
        "difference",
        "p (Holm)",
        "training GFLOPs",
        "adapter GFLOPs",
        "step ms",
    ]
    rows = []
    for row in list_records(comparison):
        change = (row["difference"], row["difference_low"], row["difference_high"])
        rows.append(
            [
                row["method"],
                f"{row['trainable']:,}",
                _format_percent(row["mean"], row["low"], row["high"], ".1f"),
                _format_percent(*change, "+.1f"),
                _format_p(row["p_holm"]),
                f"{row['training_gflops']:.2f}",
                f"{row['adapter_gflops']:.3f}",
                f"{1e3 * row['step_s']:.0f}",
            ]
        )
    return heads, rows


def describe_best(comparison: Comparison) -> str:
    """Return which rows are highest, with equal ones as equal, and which differences are sure."""
    rows = comparison.summaries
    top = max(row.mean for row in rows.values())
    best = [name for name in comparison.entries if abs(rows[name].mean - top) < 1e-9]
    value = _format_percent(top, None, None, ".1f")
    if len(best) == 1:
        count = comparison.costs[best[0]].trainable
        text = f"{best[0]} is highest with {value} %, training {format_count(count, 'parameter')}."
    else:
        text = f"{', '.join(best[:-1])} and {best[-1]} are equal with {value} %."
    first = comparison.entries[0]
    sure = [name for name in comparison.entries if (rows[name].p_holm or 1.0) < LEVEL]
    tested = any(row.p_holm is not None for row in rows.values())
    if sure:
        text += f" Significantly different from {first} at 5 % (Holm): {', '.join(sure)}."
    elif tested:
        text += f" No difference to {first} is significant at 5 % (Holm)."
    return text


def make_markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, a line for each row, all columns but the first to the right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def format_markdown(comparison: Comparison) -> str:
    """The table for a README, with its notes below."""
    heads, rows = format_comparison(comparison)
    cells = [[escape_markdown(cell) for cell in row] for row in (heads, *rows)]
    table = make_markdown_table(cells[0], cells[1:])
    title, best, *notes = map(
        escape_markdown, (comparison.title, describe_best(comparison), *comparison.notes)
    )
    items = "\n".join(f"- {note}" for note in notes)
    return f"# {title}\n\n{best}\n\n{table}\n\n{items}\n"


def escape_markdown(text: str) -> str:
    """Return a line of text for Markdown, in which it is no mark-up, link or HTML."""
    return printable(text).translate(MARKDOWN).replace("](", "]\\(")


def format_latex(comparison: Comparison) -> str:
    """A booktabs table for a paper."""
    heads, rows = format_comparison(comparison)
    head, *body = [
        " & ".join(printable(cell).translate(LATEX) for cell in line) + r" \\"
        for line in (heads, *rows)
    ]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}"
    rules = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(rules)


def _format_percent(mean: float | None, low: float | None, high: float | None, form: str) -> str:
    if mean is None:
        return ""
    bounds = "" if low is None or high is None else f" [{100 * low:{form}}, {100 * high:{form}}]"
    return f"{100 * mean:{form}}{bounds}"


def _format_p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
