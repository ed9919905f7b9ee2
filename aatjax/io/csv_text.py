"""CSV text that a spreadsheet does not compute.

Spreadsheets run a cell that begins with `=`, `+`, `-` or `@`, also after a tab or a line break, as
a formula, and names of classes and files may come from anybody (OWASP, "CSV Injection"). Such a
name gets an apostrophe before it, a relative path `./`, which names the same file. Numbers stay
numbers.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

_START = "[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # and their full-width forms
_FORMULA = re.compile(f"'*{_START}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def format_csv_rows(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as lines of CSV: comma, quotes where needed, text escaped by `escape_text`."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        cells = [escape_text(cell) if isinstance(cell, str) else cell for cell in row]
        csv.writer(line).writerow(cells)  # its \r\n at the end has it quote both in a cell
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def escape_text(text: str) -> str:
    """Return text with an apostrophe before it where a spreadsheet would run it as a formula.

    One apostrophe is taken off again where apostrophes are followed by one of these characters.
    """
    formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def escape_path(path: str) -> str:
    """Return a path that no spreadsheet takes for a formula: `./-a.wav` for `-a.wav`."""
    return f"./{path}" if re.match(_START, path) else path
