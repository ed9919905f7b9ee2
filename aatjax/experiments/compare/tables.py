"""The tables of a comparison: CSV, JSON, Markdown, LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

from aatjax.experiments.compare.runs import Comparison

HEADS = (
    "method",
    "trainable",
    "mean",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "training_gflops",
    "adapter_gflops",
    "step_s",
    "activation_mib",
)
LATEX = str.maketrans(
    {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }
)


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """One row an entry, with the numbers of all tables."""
    rows = []
    for name in comparison.entries:
        summary, cost = comparison.summaries[name], comparison.costs[name]
        seconds = sorted(c.step_s for c in comparison.cells if c.entry == name)
        rows.append(
            {
                "method": name,
                "trainable": cost.trainable,
                **dataclasses.asdict(summary),
                "training_gflops": cost.training.total / 1e9,
                "adapter_gflops": cost.training.adapter / 1e9,
                "step_s": seconds[len(seconds) // 2],
                "activation_mib": cost.kept / 2**20,
            }
        )
    return rows


def as_csv(comparison: Comparison) -> str:
    """A row an entry, all digits."""
    text = io.StringIO()
    out = csv.DictWriter(text, HEADS, lineterminator="\n")
    out.writeheader()
    out.writerows({key: row[key] for key in HEADS} for row in records(comparison))
    return text.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything: rows, every cell with its curve, notes."""
    return {
        "title": comparison.title,
        "metric": comparison.metric,
        "notes": list(comparison.notes),
        "rows": records(comparison),
        "cells": [dataclasses.asdict(cell) for cell in comparison.cells],
        "costs": {name: cost.to_json() for name, cost in comparison.costs.items()},
    }


def shown(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells as people read them: percent, with intervals."""
    heads = [
        "method",
        "trainable",
        comparison.metric,
        "difference",
        "p (Holm)",
        "training GFLOPs",
        "of them added",
        "step ms",
    ]
    rows = []
    for row in records(comparison):
        rows.append(
            [
                row["method"],
                f"{row['trainable']:,}",
                _interval(row["mean"], row["low"], row["high"]),
                ""
                if row["difference"] is None
                else _interval(
                    row["difference"], row["difference_low"], row["difference_high"], sign=True
                ),
                "" if row["p_holm"] is None else f"{row['p_holm']:.3f}",
                f"{row['training_gflops']:.2f}",
                f"{row['adapter_gflops']:.3f}",
                f"{1e3 * row['step_s']:.0f}",
            ]
        )
    return heads, rows


def as_markdown(comparison: Comparison) -> str:
    """The table for a README, its notes below."""
    heads, rows = shown(comparison)
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    table = "\n".join("| " + " | ".join(_escape(c) for c in line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in comparison.notes)
    return f"# {comparison.title}\n\n{table}\n\n{notes}\n"


def as_latex(comparison: Comparison) -> str:
    """A booktabs table for a paper."""
    heads, rows = shown(comparison)
    body = [" & ".join(c.translate(LATEX) for c in line) + r" \\" for line in rows]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}",
            r"\toprule",
            " & ".join(c.translate(LATEX) for c in heads) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _interval(mean: float, low: float | None, high: float | None, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    bounds = "" if low is None or high is None else f" [{100 * low:{form}}, {100 * high:{form}}]"
    return f"{100 * mean:{form}}{bounds}"


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|")
