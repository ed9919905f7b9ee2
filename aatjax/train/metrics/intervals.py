"""Confidence intervals of metrics between 0 and 1, for clips that are drawn in groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from aatjax.errors import UsageError

PRIOR = 0.1
"""Weight of the assumption that a group counts as one clip, in wrong clips."""


class Units:
    """What is independent among n clips: the groups (recordings, speakers), or each clip.

    Args:
        groups: the group of each clip; None, or None for a clip, makes the clip its own group.
        n: number of clips.
    """

    def __init__(self, groups: Sequence[Hashable] | None, n: int) -> None:
        names = [None] * n if groups is None else list(groups)
        keys = [("clip", i) if name is None else ("group", name) for i, name in enumerate(names)]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.members: Int[np.ndarray, " b"] = np.array([number[key] for key in keys], np.int64)
        self.count: int = len(number)
        self.grouped: bool = self.count < n

    def sum(self, values: Float[np.ndarray, " b"]) -> Float[np.ndarray, " g"]:
        """Return the sum of each group's clips."""
        return np.bincount(self.members, values, self.count) if self.grouped else values

    def count_among(self, clips: Bool[np.ndarray, " b"]) -> int:
        """Return the number of groups that have one of these clips."""
        return len(np.unique(self.members[clips])) if self.grouped else int(clips.sum())


def estimate_interval(
    value: float,
    variance: float,
    *,
    clips: float,
    units: float,
    interval: float = 0.95,
    exact: bool = False,
    freedom: float | None = None,
) -> tuple[float, float] | None:
    """Return the score interval of a metric between 0 and 1, or None where nothing is known of it.

    Wilson's interval (1927) of `value` for the number of clips whose proportion would have this
    variance, n = value (1 - value) / variance (Korn and Graubard 1998), with Student's t for the
    estimated variance. Where the value is 0 or 1 the variance is 0 and says nothing; the ratio then
    is that of `units` clips: as if the clips of a group were all right or all wrong. This weighs as
    much as `PRIOR` of one wrong clip, so that it matters only near 0 and 1.

    Args:
        value: the metric.
        variance: its estimated sampling variance.
        clips: the number of clips in it.
        units: the number of independent groups in it, at most `clips`.
        interval: confidence level.
        exact: whether it is a proportion of independent clips, whose variance is known: plain
            Wilson.
        freedom: degrees of freedom of the variance; by default `units` - 1.
    """
    from scipy import special

    if clips < 1 or not (exact or units >= 2):
        return None
    tail = (1 + interval) / 2
    if exact:
        inverse, reach = 1 / clips, float(special.ndtri(tail))
    else:
        prior = PRIOR / clips
        inverse = (variance + prior / units) / (value * (1 - value) + prior)
        reach = float(special.stdtrit(units - 1 if freedom is None else freedom, tail))
    spread = reach**2 * inverse
    middle = (value + spread / 2) / (1 + spread)
    half = np.sqrt(spread * value * (1 - value) + spread**2 / 4) / (1 + spread)
    # In exact arithmetic the bounds lie in [0, 1] and around the value.
    return min(max(0.0, float(middle - half)), value), max(min(1.0, float(middle + half)), value)


def estimate_share_interval(
    true: Bool[np.ndarray, " b"],
    groups: Sequence[Hashable] | None = None,
    interval: float = 0.95,
) -> tuple[float, float] | None:
    """Return the interval of the share of clips that are true; None without clips."""
    if not len(true):
        return None
    units, value = Units(groups, len(true)), float(true.mean())
    sums = units.sum((true - value) / len(true))
    variance = float((sums**2).sum()) * units.count / max(1, units.count - 1)
    return estimate_interval(
        value,
        variance,
        clips=len(true),
        units=units.count,
        interval=interval,
        exact=not units.grouped,
    )


def mean_interval(
    values: Sequence[float] | Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
    interval: float = 0.95,
) -> tuple[float, float | None, float | None]:
    """Return the mean of the results of k folds or seeds, with its Student-t interval.

    Returns:
        (mean, low, high); low and high are None for a single value and for equal values, which show
        no spread.

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
    if np.allclose(sample, sample[0], rtol=0, atol=1e-12):
        return mean, None, None
    reach = stats.t.ppf((1 + interval) / 2, sample.size - 1)
    reach = float(reach * sample.std(ddof=1) / np.sqrt(sample.size))
    return mean, mean - reach, mean + reach


def check_interval(interval: float) -> None:
    """Refuse a confidence level that is not between 0 and 1."""
    if not 0 < interval < 1:
        raise UsageError(f"interval is {interval:g}; it must be between 0 and 1, such as 0.95")
