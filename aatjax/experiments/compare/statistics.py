"""Means, confidence intervals and paired tests of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from aatjax.errors import DataError
from aatjax.experiments.clip_scores import (
    ClipScores,
    Key,
    PooledClips,
    Spread,
    average_repeats,
    pool_clips,
    summarise_runs,
)
from aatjax.train.metrics.intervals import Units, mean_interval

Values = Mapping[Key, float | None]
"""The metric by seed and fold."""
Scores = Mapping[Key, ClipScores | None]
"""The clip scores by seed and fold."""
FLIPS = 9999  # random sign flips where there are too many to try all


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """Statistics of one row of a comparison.

    Attributes:
        mean, low, high: mean over runs with its 95 % interval (`summarise_runs`).
        difference: mean difference to the first row, paired by clip, seed and fold; None for the
            first.
        difference_low, difference_high: its 95 % interval.
        p: two-sided test of that difference, see `compare_runs`; None where there is one pair of
            runs without clip scores.
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
    names: Sequence[str],
    values: Mapping[str, Values],
    scores: Mapping[str, Scores] | None = None,
) -> dict[str, MethodSummary]:
    """Summarise each row, with differences to the first.

    Args:
        names: the rows.
        values: the figures of each row by seed and fold.
        scores: the clip scores of each row; without them the runs alone are compared.

    Raises:
        DataError: a value is not defined.
    """
    defined = {name: _check_defined(name, values[name]) for name in names}
    known = scores or {name: dict.fromkeys(values[name]) for name in names}
    first, found = names[0], {}
    for name in names:
        found[name] = MethodSummary(*summarise_runs(defined[name], known[name]))
        if name != first:
            change = compare_runs(defined[first], defined[name], known[first], known[name])
            found[name] = dataclasses.replace(found[name], **change)
    corrected = correct_p({name: row.p for name, row in found.items() if row.p is not None})
    for name, p in corrected.items():
        found[name] = dataclasses.replace(found[name], p_holm=p)
    return found


def compare_runs(
    first: Mapping[Key, float],
    second: Mapping[Key, float],
    first_scores: Scores,
    second_scores: Scores,
) -> dict[str, float | None]:
    """Return the difference of two rows, its 95 % interval and p, by the names in `MethodSummary`.

    Runs are paired by seed and fold, and their test clips by name. With one pair of runs, p is that
    of the sign-flip test over clips or groups (`compute_flip_p`), for an accuracy of independent
    clips McNemar's exact test. With several, it is that of Student's t with the variances over
    test clips and over runs (`Spread`). Without clip scores, it is that of the paired t-test
    over folds or seeds (`compute_paired_p`).
    """
    change = {key: second[key] - value for key, value in first.items()}
    sample = average_repeats(change)
    one, other = pool_clips(first_scores), pool_clips(second_scores)
    if one is None or other is None or set(one.keys) != set(other.keys):
        middle, low, high = mean_interval(sample)
        return _name_change(middle, low, high, compute_paired_p(sample))
    middle, clips = float(sample.mean()), _subtract(one, other)
    units = clips.units
    if units.count < 2:
        return _name_change(middle, None, None, None)
    variance = _estimate_change_variance(clips, units, middle)
    spread = Spread.measure(change, variance, units.count)
    if len(change) == 1:
        p = compute_flip_p(units.sum(clips.influence + middle / len(clips.keys)))
    else:
        p = spread.compute_p(middle)
    reach = spread.compute_reach(0.05)
    return _name_change(middle, max(-1.0, middle - reach), min(1.0, middle + reach), p)


def correct_p(found: Mapping[str, float]) -> dict[str, float]:
    """Return p values corrected for their number (Holm 1979)."""
    corrected, worst = {}, 0.0
    for rank, (name, p) in enumerate(sorted(found.items(), key=lambda pair: (pair[1], pair[0]))):
        worst = max(worst, min(1.0, p * (len(found) - rank)))
        corrected[name] = worst
    return corrected


def describe_test(runs: int, clips: PooledClips | None) -> str:
    """Return what the intervals and p values of a comparison are, in one sentence."""
    if clips is None:
        return (
            "95 % intervals and p: Student's t over folds, or over seeds of one division; the runs "
            "hold no clip scores, so that the spread over test clips is not counted"
        )
    units = "groups of clips" if clips.units.grouped else "clips"
    if runs == 1:
        return (
            f"differences are paired by clip; p: sign-flip test over {units}; 95 % intervals from "
            f"the variance over {units}"
        )
    return (
        f"differences are paired by clip and run; 95 % intervals and p from the variance over "
        f"{units} and over runs (Student's t)"
    )


def compute_paired_p(change: Float[np.ndarray, " k"]) -> float | None:
    """Two-sided p of paired differences with mean zero; None for one pair.

    Student's t; where the differences are equal, and show no variance, the sign-flip test.
    """
    if len(change) < 2:
        return None
    if np.allclose(change, change[0], rtol=0, atol=1e-12):
        return compute_flip_p(change)
    found: Any = stats.ttest_1samp(change, 0.0)
    return float(found.pvalue)


def compute_flip_p(change: Float[np.ndarray, " k"]) -> float:
    """Two-sided p of the sum of differences whose signs are random (Fisher 1935).

    Exact for differences of one size (then it is the sign test, of two classifiers McNemar's) and
    for up to 13 that are not zero; otherwise of 9,999 random flips.
    """
    sizes = np.abs(change)
    moved = change[sizes > 1e-9 * max(float(sizes.max(initial=0.0)), 1e-300)]
    if not len(moved):
        return 1.0
    if np.allclose(np.abs(moved), abs(moved[0]), rtol=1e-9):
        return float(stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    k, least = len(moved), abs(float(moved.sum())) * (1 - 1e-9)
    if k <= 13:
        signs = 1 - 2 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
        return float((np.abs(signs @ moved) >= least).mean())
    rng, beyond = np.random.default_rng(0), 0
    for start in range(0, FLIPS, 1000):  # bounds the memory of many clips
        signs = rng.choice(np.array([-1.0, 1.0]), (min(1000, FLIPS - start), k))
        beyond += int((np.abs(signs @ moved) >= least).sum())
    return (1 + beyond) / (1 + FLIPS)


def _subtract(first: PooledClips, second: PooledClips) -> PooledClips:
    """The influence of each clip on the difference, in the first one's order of clips."""
    place = {key: i for i, key in enumerate(second.keys)}
    other = second.influence[[place[key] for key in first.keys]]
    return dataclasses.replace(first, influence=other - first.influence)


def _estimate_change_variance(clips: PooledClips, units: Units, change: float) -> float:
    """The variance of a difference over clips or groups, with one clip more in either direction.

    The two added clips (Bonett and Price 2012) keep it above zero where both rows are right on the
    same clips.
    """
    n = len(clips.keys)
    added = (n / (n + 2)) ** 2 * (
        float((units.sum(clips.influence) ** 2).sum()) + 2 * (1 + change**2) / n**2
    )
    return added * units.count / max(1, units.count - 1)


def _name_change(
    difference: float, low: float | None, high: float | None, p: float | None
) -> dict[str, float | None]:
    return {"difference": difference, "difference_low": low, "difference_high": high, "p": p}


def _check_defined(name: str, values: Values) -> dict[Key, float]:
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise DataError(f"{name}: the metric is not defined for seed and fold {missing[0]}")
    return {key: value for key, value in values.items() if value is not None}
