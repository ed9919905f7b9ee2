"""Confidence intervals: ranking metrics over resamples, percentile and Student-t intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from aatjax.errors import UsageError


def resample(
    groups: Sequence[object] | None, n: int, times: int, rng: np.random.Generator
) -> Float[np.ndarray, "k b"]:
    """Return how often each of n clips is drawn in each of `times` bootstrap resamples.

    Clips are drawn with replacement; with `groups`, whole groups are, so that clips of one
    recording or speaker are not counted as independent.
    """
    members = np.arange(n)
    if groups is not None:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        members = np.array([number[group] for group in groups])
    units = int(members.max()) + 1
    drawn = rng.multinomial(units, np.full(units, 1 / units), size=times)
    return drawn[:, members].astype(np.float32)


def rank(
    scores: Float[np.ndarray, " b"],
    positive: Bool[np.ndarray, " b"],
    weights: Float[np.ndarray, "k b"],
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return average precision and ROC area of one class, for k weightings of the clips.

    Average precision is the step-wise sum of precision over the rises of recall, tied scores being
    one step; the area is that of the curve with tied scores joined by a straight line.

    Returns:
        (average precision, area), NaN where the positives (or, for the area, the negatives) of a
        weighting sum to zero.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    at = np.flatnonzero(positive[order])
    if not len(at):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    # Clips of one score form a step; only steps with a positive add to either sum.
    heads = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
    steps, first = np.unique(np.searchsorted(heads, at, side="right") - 1, return_index=True)
    start, end = heads[steps], np.append(heads, len(ranked))[steps + 1]
    edges = np.unique(np.concatenate([[0], start, end, [len(ranked)]]))
    drawn = np.take(weights, order, axis=1)
    before = np.cumsum(np.add.reduceat(drawn, edges[:-1], axis=1), axis=1)
    before = np.concatenate([np.zeros_like(before[:, :1]), before], axis=1)
    above = before[:, np.searchsorted(edges, start)]
    taken = before[:, np.searchsorted(edges, end)]
    rises = np.add.reduceat(drawn[:, at], first, axis=1)
    hits = np.cumsum(rises, axis=1)
    positives = hits[:, -1]
    negatives = before[:, -1] - positives
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    beaten = negatives[:, None] - (taken - hits) + (taken - above - rises) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        average = (rises * precision).sum(axis=1) / positives
        area = (rises * beaten).sum(axis=1) / (positives * negatives)
    return average, area


def percentile_interval(
    values: Float[np.ndarray, " k"], interval: float
) -> tuple[float, float] | None:
    """Return the bounds of the middle share `interval` of the defined values; None without any."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    tails = [(1 - interval) / 2, (1 + interval) / 2]
    low, high = np.quantile(defined, tails, method="inverted_cdf")
    return float(low), float(high)


def mean_interval(
    values: Sequence[float] | Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
    interval: float = 0.95,
) -> tuple[float, float | None, float | None]:
    """Return the mean of the results of k folds or seeds, with its Student-t interval.

    Returns:
        (mean, low, high); low and high are None for a single value, which has no spread.

    Raises:
        UsageError: no value, one that is not finite, or an interval not between 0 and 1.
    """
    from scipy import stats

    check_interval(interval)
    sample = np.asarray(values, np.float64)
    if not sample.size or not np.isfinite(sample).all():
        raise UsageError(
            f"the mean of {list(map(float, sample))} is not defined; give one or more finite values"
        )
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, None, None
    reach = stats.t.ppf((1 + interval) / 2, sample.size - 1)
    reach = float(reach * sample.std(ddof=1) / np.sqrt(sample.size))
    return mean, mean - reach, mean + reach


def check_interval(interval: float) -> None:
    """Refuse a confidence level that is not between 0 and 1."""
    if not 0 < interval < 1:
        raise UsageError(f"interval is {interval:g}; it must be between 0 and 1, such as 0.95")
