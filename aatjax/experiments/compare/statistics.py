"""Means, confidence intervals and paired tests of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from aatjax.errors import DataError
from aatjax.train.metrics.intervals import mean_interval

Values = Mapping[tuple[int, str | None], float | None]
"""The metric by seed and fold."""


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """Statistics of one row of a comparison.

    Attributes:
        mean, low, high: over folds, or over seeds where there is one division; 95 %, Student t.
        difference: mean difference to the first row, paired by seed and fold; None for the first.
        difference_low, difference_high: its 95 % interval, over folds as above.
        p: two-sided paired t-test of that difference; None where there is one pair.
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


def summarise_methods(
    names: Sequence[str], values: Mapping[str, Values]
) -> dict[str, MethodSummary]:
    """Summarise each row, with differences to the first.

    Seeds of a fold share its clips, so they are averaged before the interval is taken: the number
    of folds, or of seeds where there is one division, is the number of independent values.

    Raises:
        DataError: a value is not defined.
    """
    samples = {name: _average_seeds(name, values[name]) for name in names}
    first = samples[names[0]]
    found = {names[0]: MethodSummary(*mean_interval(first))}
    for name in names[1:]:
        change = samples[name] - first
        found[name] = MethodSummary(
            *mean_interval(samples[name]), *mean_interval(change), compute_paired_p(change)
        )
    tested = sorted((row.p, name) for name, row in found.items() if row.p is not None)
    worst = 0.0
    for rank, (p, name) in enumerate(tested):
        worst = max(worst, min(1.0, p * (len(tested) - rank)))
        found[name] = dataclasses.replace(found[name], p_holm=worst)
    return found


def compute_paired_p(change: Float[np.ndarray, " k"]) -> float | None:
    """Two-sided p of paired differences with mean zero (Student t); None for one pair."""
    if len(change) < 2:
        return None
    if np.allclose(change, change[0]):
        return 1.0 if np.isclose(change[0], 0) else 0.0
    found: Any = stats.ttest_1samp(change, 0.0)
    return float(found.pvalue)


def _average_seeds(name: str, values: Values) -> Float[np.ndarray, " k"]:
    """One value per fold, its seeds averaged, or one per seed where there is one division."""
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise DataError(f"{name}: the metric is not defined for seed and fold {missing[0]}")
    folds = list(dict.fromkeys(fold for _, fold in values))
    if len(folds) < 2:
        return np.array(list(values.values()), np.float64)
    by_fold = [[v for (_, fold), v in values.items() if fold == one] for one in folds]
    return np.array([np.mean(np.array(seeds, np.float64)) for seeds in by_fold])
