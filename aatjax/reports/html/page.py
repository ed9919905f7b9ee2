"""The frame of every HTML page: templates, escaping, number formats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from aatjax.errors import printable


def render_page(template: str, **context: Any) -> str:
    """Render a template of this package, one that extends base.html, as a whole document."""
    return _ENVIRONMENT.get_template(template).render(context)


def clean(value: Any) -> Any:
    """Escape what does not print in a text, line by line: control characters, bidi marks, bytes."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(printable(line) for line in value.split("\n"))


def format_number(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits; n/a where it is not defined."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_interval(pair: Sequence[float] | None, digits: int = 3) -> str:
    """An interval in brackets, empty where there is none."""
    return "" if pair is None else f"[{pair[0]:.{digits}f}, {pair[1]:.{digits}f}]"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("aatjax.reports.html"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=clean,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "number": format_number,
    "interval": format_interval,
    "median": statistics.median,
    "thousands": "{:,}".format,
}
