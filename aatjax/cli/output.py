"""Tables of results."""

from collections.abc import Callable, Iterable
from typing import Any

from aatjax.errors import printable

Headline = tuple[str, float | None, float | None, float | None]


def format_headline(headline: Headline | None) -> str:
    """Return `value [low, high]` of (metric, value, low, high)."""
    from aatjax.train.metrics.results import format_figure

    return "n/a" if headline is None else format_figure(*headline[1:])


Columns = dict[str, Callable[[Any], str]]
"""Columns of a table by their heads: the cell of an item."""


def fill_rows(columns: Columns, items: Iterable[Any]) -> list[list[str]]:
    """Return a row of cells per item."""
    return [[cell(item) for cell in columns.values()] for item in items]


def format_table(heads: list[str], rows: list[list[str]]) -> str:
    """Return the rows with aligned columns; what does not print is escaped."""
    lines = [list(map(printable, line)) for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_result(result: Any) -> str:
    """A table of one row: method, trainable parameters, test metric, test clips, seconds."""
    metric = result.headline[0] if result.headline else "test"
    row = [
        result.method,
        f"{result.trainable:,}",
        format_headline(result.headline),
        result.counts or "none",
        f"{result.seconds:.0f}",
    ]
    table = format_table(["method", "trainable", metric, "tested on", "seconds"], [row])
    omitted = result.about.get("not_counted")
    return f"{table}\nnote: {omitted}" if omitted else table
