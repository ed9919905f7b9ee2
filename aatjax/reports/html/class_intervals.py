"""Confidence intervals of the metrics of each class, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats

from aatjax.train.metrics.intervals import percentile_interval, rank, resample

WORK = 2 * 10**8  # resamples * clips * classes spent on intervals of average precision
LEAST = 200  # resamples below which there is no interval
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class ClassIntervals:
    """95% intervals of one class; None where the metric is not defined."""

    precision: Interval
    recall: Interval
    average_precision: Interval


def estimate_class_intervals(
    logits: Float[np.ndarray, "b c"],
    targets: Float[np.ndarray, "b c"],
    *,
    multi_label: bool,
    bootstrap: int = 1000,
    interval: float = 0.95,
) -> list[ClassIntervals]:
    """Estimate the intervals of the numbers in `Metrics.per_class`, in the same order.

    Precision and recall are proportions of clips: Wilson's score interval. Average precision:
    percentiles over the bootstrap resamples of `train.metrics.evaluate`; fewer of them, or none, on
    large sets.
    """
    scores, known = np.asarray(logits, np.float64), ~np.isnan(targets)
    truth = targets == 1
    if multi_label:
        predicted = (scores > 0) & known
    else:
        predicted = np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
        scores = special.log_softmax(scores, axis=1)
    hits = (predicted & truth).sum(axis=0)
    times = min(bootstrap, WORK // max(1, truth.size))
    weights = None
    if times >= min(LEAST, bootstrap) and len(scores) > 1 and times > 0:
        weights = resample(None, len(scores), times, np.random.default_rng(0))
    found = []
    for c in range(scores.shape[1]):
        average_precision: Interval = None
        rows = known[:, c]
        if weights is not None and truth[:, c].any():
            values, _ = rank(scores[rows, c], truth[rows, c], weights[:, rows])
            average_precision = percentile_interval(values, interval)
        found.append(
            ClassIntervals(
                estimate_proportion_interval(hits[c], predicted[:, c].sum(), interval),
                estimate_proportion_interval(hits[c], truth[:, c].sum(), interval),
                average_precision,
            )
        )
    return found


def estimate_proportion_interval(hits: int, count: int, interval: float = 0.95) -> Interval:
    """Wilson's score interval (Wilson 1927) of `hits / count`; None without a count."""
    if not count:
        return None
    found = stats.binomtest(int(hits), int(count)).proportion_ci(interval, method="wilson")
    return float(found.low), float(found.high)


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
