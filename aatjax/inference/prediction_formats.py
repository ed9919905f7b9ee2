"""Text formats of predictions: a line per file, CSV, JSON."""

import json
from typing import Literal

from aatjax.errors import printable
from aatjax.inference.prediction import Prediction
from aatjax.io.csv_text import escape_path, format_csv_rows

PredictionFormat = Literal["table", "csv", "json"]


def format_prediction(
    prediction: Prediction, form: PredictionFormat, *, top: int = 3, first: bool = True
) -> str:
    """Return the prediction of a file as text that can follow that of another file.

    Args:
        prediction: of one file.
        form: 'table': a line with the `top` most probable classes; 'csv': a row with the label and
            the probability of every class; 'json': an object on one line, with the windows.
        top: classes of a line.
        first: with the header, where the format has one.
    """
    match form:
        case "csv":
            return _format_csv(prediction, first)
        case "json":
            return json.dumps(prediction.to_json()) + "\n"
    best = "  ".join(f"{printable(label)} {p:.3f}" for label, p in prediction.top(top))
    if prediction.label is None:
        best = f"no class ({printable(prediction.reason or '')})"
    return f"{printable(prediction.path)}  {best}{format_unsure(prediction)}\n"


def format_unsure(prediction: Prediction, most: int = 5) -> str:
    """Return the possible classes of an unsure prediction as text; empty for a sure one."""
    possible = prediction.possible
    if prediction.label is None or not prediction.unsure or possible is None:
        return ""
    more = len(possible) - most
    named = ", ".join(map(printable, possible[:most])) + (f" and {more} more" if more > 0 else "")
    if len(possible) == len(prediction.classes):
        named = "any class"
    return f"  unsure: {named} ({prediction.coverage:.0%})"


def _format_csv(prediction: Prediction, first: bool) -> str:
    head = ["file", "label", "probability", "unsure", *prediction.classes]
    row = [escape_path(prediction.path), *("" for _ in head[1:])]
    if prediction.label is not None:
        sure = [prediction.label, f"{prediction.probability:.6f}", int(bool(prediction.unsure))]
        row[1:] = [*sure, *(f"{p:.6f}" for p in prediction.probabilities)]
    return format_csv_rows([head, row] if first else [row])
