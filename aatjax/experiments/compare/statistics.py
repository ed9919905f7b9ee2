"""Means, intervals and paired tests of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from aatjax.errors import DataError
from aatjax.train.metrics.intervals import mean_interval

Values = Mapping[tuple[int, str | None], float | None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """One row of a comparison.

    Attributes:
        mean, low, high: over folds, or over seeds where there is one division; 95 %, Student t.
        difference: mean difference to the first row over the same seeds and folds; None of it.
        difference_low, difference_high: its 95 % interval, by folds as above.
        p: two-sided paired t-test of that difference; None where it cannot be made.
        p_holm: the same, corrected for the number of rows (Holm 1979).
    """

    mean: float
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


def summarise(names: Sequence[str], values: Mapping[str, Values]) -> dict[str, Summary]:
    """The summary of each row; the first is what the others are compared with.

    Seeds of a fold share its clips, so they are averaged before the interval is taken: the number
    of folds, or of seeds where there is one division, is the number of independent values.

    Raises:
        DataError: a value is not defined.
    """
    units = {name: _units(name, values[name]) for name in names}
    first = units[names[0]]
    found: dict[str, Summary] = {}
    for name in names:
        mean, low, high = mean_interval(units[name])
        if name == names[0]:
            found[name] = Summary(mean, low, high)
            continue
        change = units[name] - first
        middle, below, above = mean_interval(change)
        found[name] = Summary(mean, low, high, middle, below, above, paired_p(change))
    tested = sorted((s.p, n) for n, s in found.items() if s.p is not None)
    worst = 0.0
    for rank, (p, name) in enumerate(tested):
        worst = max(worst, min(1.0, p * (len(tested) - rank)))
        found[name] = dataclasses.replace(found[name], p_holm=worst)
    return found


def paired_p(change: np.ndarray) -> float | None:
    """Two-sided p of the mean of paired differences being zero (Student t); None for one pair."""
    if len(change) < 2:
        return None
    if np.ptp(change) == 0:
        return 1.0 if change[0] == 0 else 0.0
    t = change.mean() / (change.std(ddof=1) / np.sqrt(len(change)))
    return float(2 * stats.t.sf(abs(t), len(change) - 1))


def _units(name: str, values: Values) -> np.ndarray:
    """One value a fold, its seeds averaged, or one a seed where there is one division."""
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise DataError(f"{name}: the metric is not defined with seed and fold {missing[0]}")
    folds = list(dict.fromkeys(fold for _, fold in values))
    if len(folds) < 2:
        return np.array([value for value in values.values()], np.float64)
    return np.array(
        [np.mean([float(v or 0) for (_, f), v in values.items() if f == fold]) for fold in folds]
    )
