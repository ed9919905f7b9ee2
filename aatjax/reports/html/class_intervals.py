"""How sure the figures of each class are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special, stats

from aatjax.train.metrics.intervals import percentile_interval, rank, resample

WORK = 2 * 10**8  # resamples * clips * classes spent on intervals of average precision
LEAST = 200
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class ClassIntervals:
    """95% intervals of one class; None where the figure is not defined."""

    precision: Interval
    recall: Interval
    average_precision: Interval


def class_intervals(
    logits: Float[np.ndarray, "b c"],
    targets: Float[np.ndarray, "b c"],
    *,
    multi_label: bool,
    bootstrap: int = 1000,
    interval: float = 0.95,
) -> list[ClassIntervals]:
    """Intervals of the figures in `Metrics.per_class`, in the same order.

    Precision and recall are shares of clips: Wilson's score interval (Wilson 1927), which stays
    honest for few clips. Average precision: percentiles over the bootstrap resamples that
    `train.metrics.evaluate` draws; fewer of them, or none, on large sets.
    """
    scores, known = np.asarray(logits, np.float64), ~np.isnan(targets)
    truth = targets == 1
    if multi_label:
        guess = (scores > 0) & known
    else:
        guess = np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
        scores = special.log_softmax(scores, axis=1)
    right, guessed, true = (guess & truth).sum(0), guess.sum(0), truth.sum(0)
    times = min(bootstrap, WORK // max(1, truth.size))
    drawn = None
    if times >= min(LEAST, bootstrap) and len(scores) > 1 and times > 0:
        drawn = resample(None, len(scores), times, np.random.default_rng(0))
    found = []
    for c in range(scores.shape[1]):
        ranked: Interval = None
        rows = known[:, c]
        if drawn is not None and true[c]:
            ap, _ = rank(scores[rows, c], truth[rows, c], drawn[:, rows])
            ranked = percentile_interval(ap, interval)
        found.append(
            ClassIntervals(
                wilson(int(right[c]), int(guessed[c]), interval),
                wilson(int(right[c]), int(true[c]), interval),
                ranked,
            )
        )
    return found


def wilson(right: int, count: int, interval: float = 0.95) -> Interval:
    """Wilson's score interval of a share `right / count`; None without a count."""
    if not count:
        return None
    z = float(stats.norm.ppf((1 + interval) / 2))
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def confused(
    matrix: np.ndarray, names: Sequence[str], most: int = 8
) -> list[tuple[str, str, int, int]]:
    """The commonest mistakes: (true class, predicted class, clips, clips of the true class)."""
    off = matrix * (1 - np.eye(len(names), dtype=matrix.dtype))
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = [divmod(int(at), len(names)) for at in order]
    return [
        (names[i], names[j], int(off[i, j]), int(matrix[i].sum())) for i, j in pairs if off[i, j]
    ]
