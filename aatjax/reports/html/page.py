"""The frame of every HTML page: templates, escaping, number formats."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aatjax.errors import printable

RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
"""Letters that are written from right to left, by Unicode's blocks."""


def render_page(template: str, **context: Any) -> str:
    """Render a template of this package, one that extends base.html, as a whole document."""
    return _ENVIRONMENT.get_template(template).render(context)


def clean(value: Any) -> Any:
    """Escape what does not print in a text, line by line: control characters, bidi marks, bytes.

    A line with letters that are written from right to left stands between Unicode's isolates, so
    that the text around it keeps its order.
    """
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(_isolate(printable(line)) for line in value.split("\n"))


def join_names(names: Iterable[str]) -> Markup:
    """Return names separated by commas, each cleaned and escaped by itself."""
    return Markup(", ").join(map(clean, names))


def _isolate(line: str) -> str:
    return f"\u2068{line}\u2069" if RIGHT_TO_LEFT.search(line) else line


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
    "names": join_names,
    "median": statistics.median,
    "thousands": "{:,}".format,
}
