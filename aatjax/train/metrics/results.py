"""Results of an evaluation: numbers, intervals and a table, as text and as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from aatjax.errors import format_count, printable

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "mean_ap": "mAP",
    "macro_auc": "macro AUC",
    "d_prime": "d-prime",
}


@dataclass(frozen=True)
class ClassResult:
    """One class: number of clips that have it, and its metrics; None where undefined.

    `intervals` holds the confidence interval of each metric by its attribute name.
    """

    name: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None
    auc: float | None
    intervals: dict[str, tuple[float, float] | None] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Result of `compute_metrics`; a number that is not defined is None and shown as n/a.

    Attributes:
        clips: number of clips.
        groups: number of groups (recordings, speakers) that they are of; None where each clip is
            on its own.
        multi_label: whether a clip may have any number of classes.
        accuracy: share of clips whose highest-scored class is right; in a multi-label task, is
            one of the clip's classes, over clips that have one.
        balanced_accuracy: mean recall of the classes that have clips; None in a multi-label task.
        macro_f1: mean F1 of the classes that have clips; in a multi-label task at logit 0.
        mean_ap: mean over classes of average precision (mAP).
        macro_auc: mean over classes of the area under the ROC curve.
        d_prime: sqrt(2) times the normal quantile of `macro_auc`; None where that is 0 or 1.
        intervals: confidence interval of each number, by its attribute name.
        interval: confidence level of the intervals.
        per_class: one `ClassResult` per class, in the order of the classes.
        confusion: clips by true (row) and predicted class; None in a multi-label task and for
            more than 1000 classes.
        influence: of each clip on the headline metric `[b]`, see `metrics.estimates`; for comparing
            two models on the same clips.
        notes: limits of the numbers.
    """

    clips: int
    groups: int | None
    multi_label: bool
    accuracy: float | None
    balanced_accuracy: float | None
    macro_f1: float | None
    mean_ap: float | None
    macro_auc: float | None
    d_prime: float | None
    intervals: dict[str, tuple[float, float] | None]
    interval: float
    per_class: tuple[ClassResult, ...]
    confusion: Int[np.ndarray, "c c"] | None = field(repr=False, default=None)
    influence: Float[np.ndarray, " b"] | None = field(repr=False, default=None)
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> tuple[str, float | None, float | None, float | None]:
        """(name, value, low, high): mAP for a multi-label task, else accuracy."""
        name = "mean_ap" if self.multi_label else "accuracy"
        low, high = self.intervals.get(name) or (None, None)
        return NAMES[name], getattr(self, name), low, high

    @property
    def method(self) -> str:
        """What the intervals are, in one sentence."""
        return (
            f"{self.interval:.0%} intervals are Wilson's score intervals for the effective number "
            f"of clips, with the variance over {'clips' if self.groups is None else 'groups'}; the "
            "variation between training runs is not included"
        )

    @property
    def counts(self) -> str:
        """The number of clips and of their groups, as `320 clips, 64 groups`."""
        return format_clips(self.clips, self.groups)

    def format_headline(self, digits: int = 3) -> str:
        """Return the headline as `accuracy 0.954 [0.921, 0.976] (320 clips, 64 groups)`."""
        name, *figures = self.headline
        return f"{name} {format_figure(*figures, digits=digits)} ({self.counts})"

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; undefined numbers are None."""
        return {
            "clips": self.clips,
            "groups": self.groups,
            "multi_label": self.multi_label,
            **{name: getattr(self, name) for name in NAMES},
            "interval": self.interval,
            "method": self.method,
            "intervals": {k: list(v) if v else None for k, v in self.intervals.items()},
            "per_class": [vars(row).copy() for row in self.per_class],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "notes": list(self.notes),
        }

    def table(self, most: int | None = None) -> str:
        """Return the numbers and up to `most` classes as aligned text."""
        lines = []
        for name, shown in NAMES.items():
            bounds = self.intervals.get(name)
            extra = f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
            lines.append(f"{shown:<18}{_show(getattr(self, name))}{extra}")
        lines[0] += f"  ({self.counts}; {self.interval:.0%} intervals)"
        names = [printable(row.name) for row in self.per_class]
        width = max(5, *map(len, names))
        heads = "".join(f"{h:>10}" for h in ("support", "precision", "recall", "F1", "AP", "AUC"))
        lines += ["", f"{'class':<{width}}{heads}"]
        for name, row in zip(names[:most], self.per_class, strict=False):
            numbers = (row.precision, row.recall, row.f1, row.average_precision, row.auc)
            cells = "".join(f"{_show(number):>10}" for number in numbers)
            lines.append(f"{name:<{width}}{row.support:>10}{cells}")
        if most is not None and len(self.per_class) > most:
            lines.append(f"... and {len(self.per_class) - most} more classes")
        lines.append(f"note: {self.method}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _show(number: float | None) -> str:
    return "n/a" if number is None else f"{number:.4f}"


def format_clips(clips: int, groups: int | None) -> str:
    """Return a number of clips, and of their groups where there are any."""
    text = format_count(clips, "clip")
    return text if groups is None else f"{text}, {format_count(groups, 'group')}"


def format_figure(
    value: float | None, low: float | None, high: float | None, *, digits: int = 3
) -> str:
    """Return `0.954 [0.921, 0.976]`; without bounds the value only, without a value n/a."""
    if value is None:
        return "n/a"
    bounds = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{bounds}"
