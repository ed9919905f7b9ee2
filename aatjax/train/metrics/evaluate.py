"""Metrics of logits against labels: headline numbers with intervals, and a row per class."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from aatjax.errors import DataError, NotFiniteError, UsageError, format_count
from aatjax.train.metrics.estimates import (
    LEAST_POSITIVES,
    Estimate,
    MacroMean,
    estimate_f1,
    estimate_proportion,
    estimate_ranking,
)
from aatjax.train.metrics.intervals import Units, check_interval
from aatjax.train.metrics.results import ClassResult, Metrics

MOST_CONFUSED = 1000  # classes up to which the confusion matrix is kept
MACRO = {
    "balanced_accuracy": "recall",
    "macro_f1": "f1",
    "mean_ap": "average_precision",
    "macro_auc": "auc",
}
"""Metrics that are means over classes, by the metric of a class."""


def compute_metrics(
    logits: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    targets: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    *,
    classes: Sequence[str],
    multi_label: bool,
    interval: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Metrics:
    """Compare logits with targets.

    A target may be NaN in a multi-label task, where it is unknown whether the clip has the class:
    that entry enters no number of the class, and accuracy, which is over all classes, is not given.
    Classes without a clip do not enter the means; the notes give their number. Average precision
    and AUC rank clips by the softmax of the logits in a single-label task, and by the logits (hence
    by their sigmoid) in a multi-label one.

    Intervals are for a fixed model: they do not contain the spread over training runs. That of an
    accuracy, recall or precision of independent clips is Wilson's score interval. Otherwise the
    variance is estimated over clips, or over groups where they are given, and Wilson's interval is
    taken for the number of clips that has this variance (`estimate_interval`). For average
    precision the variance includes the square of its bias; classes with fewer than three clips on
    average (harmonic mean) have none.

    Args:
        logits: scores before softmax or sigmoid.
        targets: 1 where the clip has the class, 0 where not, NaN where that is unknown.
        classes: class names.
        multi_label: whether a clip may have any number of classes.
        interval: confidence level.
        groups: recording or speaker of each clip, or None for a clip on its own.

    Raises:
        UsageError: arguments that do not fit each other or the task.
        DataError: no clips.
        NotFiniteError: a logit is NaN or infinite.
    """
    from scipy import special

    scores, truth = np.asarray(logits, np.float64), np.asarray(targets)
    _check(scores, truth, classes, multi_label, groups)
    check_interval(interval)
    known = ~np.isnan(truth)
    truth = truth == 1
    best = scores.argmax(1)
    guess = (scores > 0) & known if multi_label else np.arange(len(classes)) == best[:, None]
    if not multi_label:
        scores = special.log_softmax(scores, axis=1)
    notes = _note(truth, known, classes, multi_label)
    units = Units(groups, len(scores))

    values: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    hit = truth[np.arange(len(truth)), best]
    accuracy = estimate_proportion(hit, truth.any(1)) if known.all() else None
    values["accuracy"] = accuracy and accuracy.value
    intervals["accuracy"] = accuracy and accuracy.compute_interval(units, interval)
    means = {name: MacroMean(units, len(scores)) for name in MACRO}
    rows: list[ClassResult] = []
    for c, name in enumerate(classes):
        found = _estimate_class(scores[:, c], guess[:, c], truth[:, c], known[:, c])
        for metric, part in MACRO.items():
            if (estimate := found[part]) is not None:
                means[metric].add(estimate)
        rows.append(_make_row(str(name), int(truth[:, c].sum()), found, units, interval))
    if multi_label:
        means["balanced_accuracy"] = MacroMean(units, len(scores))
    for metric, mean in means.items():
        values[metric] = None if math.isnan(mean.value) else mean.value
        intervals[metric] = mean.compute_interval(interval)
    values["d_prime"] = _d_prime(values["macro_auc"])
    bounds = [_d_prime(bound) for bound in intervals["macro_auc"] or ()]
    defined = [bound for bound in bounds if bound is not None]
    intervals["d_prime"] = (defined[0], defined[1]) if len(defined) == 2 else None
    notes += _note_intervals(means["mean_ap"], units, values)
    headline = means["mean_ap"] if multi_label else accuracy
    if headline is not None and math.isnan(headline.value):
        headline = None
    confusion = None
    if not multi_label and len(classes) <= MOST_CONFUSED:
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(confusion, (truth.argmax(1), best), 1)
    return Metrics(
        clips=len(scores),
        groups=units.count if units.grouped else None,
        multi_label=multi_label,
        **values,
        intervals=intervals,
        interval=interval,
        per_class=tuple(rows),
        confusion=confusion,
        influence=None if headline is None else headline.influence,
        notes=tuple(notes),
    )


def _estimate_class(
    scores: Float[np.ndarray, " b"],
    guess: Bool[np.ndarray, " b"],
    truth: Bool[np.ndarray, " b"],
    known: Bool[np.ndarray, " b"],
) -> dict[str, Estimate | None]:
    """Return the metrics of a class by the names in `ClassResult`; None where undefined."""
    ap, auc = estimate_ranking(scores, truth, known)
    return {
        "precision": estimate_proportion(truth, guess),
        "recall": estimate_proportion(guess, truth),
        "f1": estimate_f1(guess, truth),
        "average_precision": ap,
        "auc": auc,
    }


def _make_row(
    name: str, support: int, found: dict[str, Estimate | None], units: Units, interval: float
) -> ClassResult:
    values = {key: None if one is None else one.value for key, one in found.items()}
    intervals = {
        key: None if one is None else one.compute_interval(units, interval)
        for key, one in found.items()
    }
    return ClassResult(name, support, **values, intervals=intervals)


def _d_prime(auc: float | None) -> float | None:
    from scipy import special

    return math.sqrt(2) * float(special.ndtri(auc)) if auc is not None and 0 < auc < 1 else None


def _note_intervals(mean_ap: MacroMean, units: Units, values: dict[str, float | None]) -> list[str]:
    """Return the limits of the intervals, and of d-prime."""
    notes = []
    if units.count == 1 and units.grouped:
        notes.append(
            f"no intervals: all {len(units.members)} clips are of one group (recording or speaker)"
        )
    elif mean_ap.values and mean_ap.clips_per_class < LEAST_POSITIVES:
        notes.append(
            f"no interval of mAP: the classes have {mean_ap.clips_per_class:.1f} clips each on "
            f"average (harmonic mean); with fewer than {LEAST_POSITIVES} mAP is too high on average"
        )
    if values["macro_auc"] is not None and values["d_prime"] is None:
        notes.append(f"d-prime is not bounded at a macro AUC of {values['macro_auc']:g}")
    if units.grouped and 1 < units.count < 10:
        notes.append(
            f"the intervals rest on {format_count(units.count, 'group')} (recordings or speakers)"
        )
    return notes


def _check(
    scores: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    multi_label: bool,
    groups: Sequence[Hashable] | None,
) -> None:
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != len(classes):
        raise UsageError(
            f"logits {scores.shape}, targets {truth.shape} and {len(classes)} classes do not fit; "
            "both arrays are (clips, classes)"
        )
    if not scores.size:
        raise DataError("there are no clips to evaluate; the set is empty or all were quarantined")
    if groups is not None and len(groups) != len(scores):
        raise UsageError(f"{len(groups)} groups for {len(scores)} clips; give one for each clip")
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise NotFiniteError(
            f"the logits of {len(bad)} of {len(scores)} clips are not finite, first row {bad[0]}; "
            "look for a diverged run or a damaged weight file"
        )
    unknown = np.isnan(truth) if multi_label else np.zeros(truth.shape, bool)
    if not (np.isin(truth, (0, 1)) | unknown).all():
        raise UsageError("targets must be 0 or 1; use labels that were not mixed or smoothed")
    sums = truth.sum(1)
    rows = np.flatnonzero(sums != 1)
    if not multi_label and len(rows):
        raise UsageError(
            f"{len(rows)} of {len(truth)} clips do not have exactly one label, first row {rows[0]} "
            f"with {int(sums[rows[0]])}; set multi_label=True for such targets"
        )


def _note(
    truth: Bool[np.ndarray, "b c"],
    known: Bool[np.ndarray, "b c"],
    classes: Sequence[str],
    multi_label: bool,
) -> list[str]:
    notes = []
    if not known.all():
        notes.append(
            f"annotated in part: {known.mean():.1%} of the clip-class pairs are known and counted"
        )
    empty = [str(name) for name, used in zip(classes, truth.sum(0), strict=True) if not used]
    if empty:
        more = ", ..." if len(empty) > 5 else ""
        named = ", ".join(empty[:5]) + more
        verbs = "has no clip here and does" if len(empty) == 1 else "have no clip here and do"
        notes.append(f"{len(empty)} of {len(classes)} classes {verbs} not enter the means: {named}")
    if len(classes) == 1 and not multi_label:
        notes.append("one class only: accuracy is 1 whatever the model does")
    if multi_label and known.all() and (truth.sum(1) == 1).all():
        notes.append("every clip has one label; for a single-label task set multi_label=False")
    return notes
