"""The report of a trained adapter: the values of templates/report.html."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from markupsafe import Markup

from aatjax.experiments.partition import Partition, describe_partition
from aatjax.inference.calibration import (
    Reliability,
    apply_calibration,
    compute_probabilities,
    compute_reliability,
)
from aatjax.reports.html import charts
from aatjax.reports.html.collect import Evaluation, ReportData
from aatjax.reports.html.experts import describe_experts
from aatjax.reports.html.page import format_interval, format_number, render_page
from aatjax.reports.routing_maps import RoutingMap
from aatjax.train.adapter_file import find_versions
from aatjax.train.metrics.intervals import estimate_share_interval
from aatjax.train.metrics.results import NAMES

MOST_ROWS = 1000  # classes, or findings, in a table
MOST_CONFUSIONS = 100
GRAVE = ("SUBSET", "LEAK", "NOTE", "different parts")  # in lines that must not be overlooked
TOLERANCE = 5e-4  # between a number and the same one in result.json
CURVES = (
    ("training loss", None, {"training loss": "train/loss"}),
    (
        "normalised entropy",
        (0.0, 1.0),
        {
            "balance": "mixture/balance",
            "dispatch": "mixture/dispatch_entropy",
            "combine": "mixture/combine_entropy",
        },
    ),
    ("learning rate", None, {"learning rate": "train/lr"}),
)
"""Charts of metrics.jsonl: label of the axis, its limits, and names and keys of the curves."""


def render_report(data: ReportData, command: Sequence[str]) -> str:
    """Render the whole report as one HTML document.

    Args:
        data: from `collect_report`.
        command: the words of the command line that asked for it.
    """
    name = Path(data.run or data.path).absolute().name
    counts = data.counts
    evaluation = data.evaluation if isinstance(data.evaluation, Evaluation) else None
    routing = data.routing
    return render_page(
        "report.html",
        title=f"{name} - aatjax report",
        name=name,
        method=data.adapter.info.get("method", {}).get("name", "adapter"),
        share=100 * counts.trainable / max(1, counts.total),
        counts=counts,
        data=data,
        evaluation=evaluation,
        data_notes=[
            (any(word in line for word in GRAVE), line) for line in _describe_data(data, evaluation)
        ],
        findings=_list_findings(data.findings),
        experts=describe_experts(routing) if isinstance(routing, RoutingMap) else routing,
        curves=_draw_training(data.rows),
        seconds=_read_number(data.result, "seconds"),
        train_clips=_read_number(data.result, "train_clips"),
        speeds=[v for row in data.rows if (v := _read_number(row, "train/clips_per_s"))],
        **(_describe_evaluation(data, evaluation) if evaluation else {"confusions": []}),
        **_describe_provenance(data, command),
    )


def _describe_data(data: ReportData, evaluation: Evaluation | None) -> list[str]:
    """The lines that `aatjax train` prints about the data, and doubts about the metrics."""
    about, lines = data.about, []
    if about:
        source: Any = evaluation and evaluation.source
        try:
            lines = describe_partition(
                Partition(source, None, None, about, about.get("chosen_on_test"))
            )
        except (KeyError, TypeError):  # written by another version
            lines = [f"data: {json.dumps(about)}"]
    if evaluation is None:
        return lines
    metrics = evaluation.metrics
    key = "mean_ap" if metrics.multi_label else "accuracy"
    test, value = data.result.get("test"), getattr(metrics, key)
    stored = test.get(key) if evaluation.own and isinstance(test, dict) else None
    if isinstance(stored, int | float) and value is not None and abs(stored - value) > TOLERANCE:
        lines.append(
            f"NOTE: {NAMES[key]} is {format_number(stored)} in result.json and "
            f"{format_number(value)} now: the sounds or the weights have changed since"
        )
    return [*lines, *(f"Note: {note}." for note in metrics.notes)]


def _list_findings(findings: list[dict[str, Any]] | str) -> list[list[str]] | str:
    if isinstance(findings, str):
        return findings
    rows = []
    for one in findings[:MOST_ROWS]:
        items = one.get("items")
        items = (
            [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        )
        cells = [one.get("severity", ""), one.get("kind", ""), one.get("text", one.get("message"))]
        examples = ", ".join(str(item.get("subject")) for item in items[:3])
        rows.append([*map(str, cells), examples, str(one.get("count", ""))])
    return rows


def _describe_evaluation(data: ReportData, evaluation: Evaluation) -> dict[str, Any]:
    metrics, classes = evaluation.metrics, evaluation.source.classes
    matrix = metrics.confusion
    rate = data.adapter.frontend.rate
    return {
        "metric_names": NAMES,
        "confusions": [] if matrix is None else rank_confusions(matrix, classes, MOST_CONFUSIONS),
        "confusion_chart": None if matrix is None else charts.draw_confusion(matrix, classes),
        "class_rows": metrics.per_class[:MOST_ROWS],
        "calibration": _describe_calibration(data, evaluation),
        "mistakes": [
            (
                one,
                charts.draw_spectrogram(
                    one.features, len(one.samples) / rate, rate, f"spectrogram of {one.clip}"
                ),
                charts.encode_sound(one.samples, rate),
            )
            for one in evaluation.mistakes
        ],
    }


def rank_confusions(
    matrix: Int[np.ndarray, "c c"], names: Sequence[str], most: int
) -> list[tuple[str, str, int, int]]:
    """The most frequent confusions: (true class, predicted class, clips, clips of the true)."""
    errors = matrix * (1 - np.eye(len(names), dtype=matrix.dtype))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    return [
        (names[i], names[j], int(errors[i, j]), int(matrix[i].sum()))
        for i, j in (divmod(int(at), len(names)) for at in order)
        if errors[i, j]
    ]


def _describe_calibration(data: ReportData, evaluation: Evaluation) -> dict[str, Any]:
    multi_label, targets = evaluation.source.multi_label, evaluation.targets
    temperatures = {"uncalibrated": 1.0}
    if data.decisions is not None:
        temperature = data.decisions.temperature
        temperatures[f"T = {temperature:.2f}"] = temperature
    curves = []
    for name, temperature in temperatures.items():
        probabilities = compute_probabilities(evaluation.logits, temperature, multi_label)
        curves.append((name, compute_reliability(probabilities, targets, multi_label)))
    return {
        "chart": charts.draw_reliability(curves),
        "rows": [(name, curve.error, _measure_overconfidence(curve)) for name, curve in curves],
        "bins": [
            (name, format_number(confidence), format_number(accuracy), f"{count:,.0f}")
            for name, curve in curves
            for confidence, accuracy, count in zip(
                curve.confidence, curve.accuracy, curve.count, strict=True
            )
            if count
        ],
        "coverage": _list_coverage(data, evaluation),
    }


def _measure_overconfidence(curve: Reliability) -> float:
    """Mean confidence minus accuracy."""
    gap = np.nan_to_num(curve.confidence - curve.accuracy)
    return float((gap * curve.count).sum() / max(1.0, curve.count.sum()))


def _list_coverage(data: ReportData, evaluation: Evaluation) -> list[tuple[str, str]]:
    """How often the conformal prediction sets of these clips hold their classes."""
    if data.decisions is None:
        return []
    applied = apply_calibration(evaluation.logits, data.decisions)
    truth = evaluation.targets == 1
    covered = (applied.possible | ~truth).all(axis=1)
    right = ((applied.given == truth) | np.isnan(evaluation.targets)).all(axis=1)
    sure = ~applied.unsure
    groups = [clip.group for clip in evaluation.source.clips]

    def share(true: Bool[np.ndarray, " b"], of: Bool[np.ndarray, " b"]) -> str:
        return _format_share(true[of], [groups[i] for i in np.flatnonzero(of)])

    every = np.ones(len(truth), bool)
    label = "all classes" if evaluation.source.multi_label else "the class"
    return [
        (f"clips with {label} in the set", share(covered, every)),
        ("target coverage", f"{data.decisions.coverage:.3f}"),
        ("mean classes per set", f"{applied.possible.sum(axis=1).mean():.2f}"),
        ("sure (no other class in the set)", f"{sure.mean():.3f} of the clips"),
        ("accuracy where sure", share(right, sure)),
        ("accuracy where unsure", share(right, ~sure)),
    ]


def _format_share(true: Bool[np.ndarray, " b"], groups: Sequence[str | None]) -> str:
    if not len(true):
        return "n/a"
    interval = format_interval(estimate_share_interval(true, groups), 2)
    return " ".join(filter(None, [f"{true.mean():.3f}", interval, f"of {len(true):,}"]))


def _draw_training(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    """Charts of the rows of metrics.jsonl that have an epoch."""
    rows = [row for row in rows if isinstance(row.get("epoch"), int | float)]
    scores = {"train accuracy": "train/accuracy", "train micro-F1": "train/micro_f1"}
    valid = sorted({key for row in rows for key in row if key.startswith("valid/")})
    scores |= {key.replace("/", " "): key for key in valid[:3]}
    found = []
    for label, limits, keys in (CURVES[0], ("score", (0.0, 1.0), scores), *CURVES[1:]):
        curves = []
        for name, key in keys.items():
            y = [_read_number(row, key, math.nan) for row in rows]
            if any(map(math.isfinite, y)):
                curves.append(charts.Curve(name, [float(row["epoch"]) for row in rows], y))
        found.append(charts.draw_curves(curves, y_label=label, limits=limits))
    return [chart for chart in found if chart is not None]


def _read_number(values: dict[str, Any], key: str, default: float = 0.0) -> float:
    """A number of a file that another version may have written."""
    value = values.get(key)
    return value if isinstance(value, int | float) else default


def _describe_provenance(data: ReportData, command: Sequence[str]) -> dict[str, Any]:
    info = data.adapter.info
    trained_with = info.get("versions")
    trained_with = trained_with if isinstance(trained_with, dict) else {}
    commands = [list(command)]
    if data.run is not None:
        config = str(data.run / "config.json")
        train = ["aatjax", "train", config, "--out", f"{data.run}-again"]
        commands = [train, ["aatjax", "eval", str(data.path)], *commands]
    config = {key: info[key] for key in ("config", "method", "frontend") if key in info}
    return {
        "commands": "\n".join(map(shlex.join, commands)),
        "origin": data.adapter.model.origin,
        "info": info,
        "version_rows": [
            (name, str(trained_with.get(name, "unknown")), current)
            for name, current in find_versions().items()
        ],
        "config": json.dumps(config, indent=2),
    }
