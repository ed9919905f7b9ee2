"""Metrics of a class with the influence of every clip on them, and their means over classes.

The influence of a clip is the derivative of the metric by the weight of the clip. The variance of a
metric is the sum of the squared influences of independent clips or groups (the infinitesimal
jackknife; Efron 1982, chapter 6). For the area under the ROC curve it is that of DeLong et al.
(1988), with groups that of Obuchowski (1997).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from aatjax.train.metrics.intervals import Units, estimate_interval

LEAST_POSITIVES = 3
"""Clips per class below which average precision is too biased for an interval."""


@dataclass(frozen=True)
class Estimate:
    """A metric of one class, or of all clips.

    Attributes:
        value: the metric.
        influence: of each clip `[b]`; sums to 0.
        members: the clips whose number limits how well the metric is known.
        exact: whether the metric is the proportion of the members that are right.
        bias: the metric's expected excess over that of many clips, by the jackknife.
        least: number of members below which there is no interval.
    """

    value: float
    influence: Float[np.ndarray, " b"]
    members: Bool[np.ndarray, " b"]
    exact: bool = False
    bias: float = 0.0
    least: int = 1

    def compute_interval(self, units: Units, interval: float) -> tuple[float, float] | None:
        """Return the confidence interval, or None without enough clips or groups."""
        count, clips = units.count_among(self.members), int(self.members.sum())
        if clips < self.least:
            return None
        variance = float((units.sum(self.influence) ** 2).sum()) * count / max(1, count - 1)
        return estimate_interval(
            self.value,
            variance + self.bias**2,
            clips=clips,
            units=count,
            interval=interval,
            exact=self.exact and count == clips,
        )


class MacroMean:
    """The mean of a metric over the classes where it is defined, added one by one."""

    def __init__(self, units: Units, n: int) -> None:
        self.units: Units = units
        self.values: list[float] = []
        self.scaled: Float[np.ndarray, " b"] = np.zeros(n)
        self.alone: list[tuple[float, Bool[np.ndarray, " b"]]] = []
        self.bias: float = 0.0
        self.inverse_clips: float = 0.0
        self.inverse_units: float = 0.0
        self.least: int = 1

    def add(self, estimate: Estimate) -> None:
        """Add the estimate of a class."""
        count = self.units.count_among(estimate.members)
        self.values.append(estimate.value)
        if count > 1:
            self.scaled += estimate.influence * math.sqrt(count / (count - 1))
        else:
            self.alone.append((estimate.value, estimate.members))
        self.bias += estimate.bias
        self.inverse_clips += 1 / estimate.members.sum()
        self.inverse_units += 1 / count
        self.least = estimate.least

    @property
    def value(self) -> float:
        """The mean; NaN without a class."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def influence(self) -> Float[np.ndarray, " b"]:
        """The influence of each clip `[b]`, scaled for the few clips or groups of a class.

        A class with one clip or group shows no variance of its own; its distance to the mean of the
        classes takes the place of it.
        """
        influence = self.scaled.copy()
        for value, members in self.alone:
            influence += (value - self.value) * members / members.sum()
        return influence / max(1, len(self.values))

    @property
    def clips_per_class(self) -> float:
        """Harmonic mean of the members of a class; 0 without a class."""
        return len(self.values) / self.inverse_clips if self.values else 0.0

    def compute_interval(self, interval: float) -> tuple[float, float] | None:
        """Return the confidence interval, or None without enough clips or groups."""
        classes = len(self.values)
        if not classes or self.clips_per_class < self.least:
            return None
        variance = float((self.units.sum(self.influence) ** 2).sum())
        return estimate_interval(
            self.value,
            variance + (self.bias / classes) ** 2,
            clips=classes**2 / self.inverse_clips,
            units=min(classes**2 / self.inverse_units, self.units.count),
            interval=interval,
        )


def estimate_proportion(
    right: Bool[np.ndarray, " b"], members: Bool[np.ndarray, " b"]
) -> Estimate | None:
    """Estimate the share of the members that are right: accuracy, recall, precision."""
    count = members.sum()
    if not count:
        return None
    value = float((right & members).sum() / count)
    return Estimate(value, members * (right - value) / count, members, exact=True)


def estimate_f1(guess: Bool[np.ndarray, " b"], truth: Bool[np.ndarray, " b"]) -> Estimate | None:
    """Estimate F1, 2 TP / (guessed + true); None without a true clip."""
    if not truth.any():
        return None
    both, total = 2.0 * (guess & truth), guess.astype(float) + truth
    value = float(both.sum() / total.sum())
    return Estimate(value, (both - value * total) / total.sum(), truth)


def estimate_ranking(
    scores: Float[np.ndarray, " b"], positive: Bool[np.ndarray, " b"], known: Bool[np.ndarray, " b"]
) -> tuple[Estimate | None, Estimate | None]:
    """Estimate average precision and the area under the ROC curve over the clips that are known.

    Average precision is the step-wise sum of precision over the rises of recall, tied scores being
    one step; the area is that of the curve with tied scores joined by a straight line. With few
    positive clips average precision is too high on average, as each of them counts among those that
    it is compared with. None without positive clips, and without negative ones, where every order
    of the clips has an average precision of 1.
    """
    rows = np.flatnonzero(known)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    ranked, hit = scores[rows], positive[rows].astype(float)
    n, found = len(rows), hit.sum()
    if found in (0, n):
        return None, None
    heads = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
    ends = np.append(heads[1:], n)
    step = np.repeat(np.arange(len(heads)), ends - heads)
    taken, hits = ends[step].astype(float), np.cumsum(hit)[ends - 1][step]
    precision = hits / taken
    average = float((hit * precision).sum() / found)
    # A clip enters the precision of every positive clip at or below its step.
    below = np.append(np.cumsum((hit / taken)[::-1])[::-1], 0.0)[heads[step]]
    spent = np.append(np.cumsum((hit * precision / taken)[::-1])[::-1], 0.0)[heads[step]]
    influence = np.zeros(len(scores))
    influence[rows] = (hit * (precision - average) + hit * below - spent) / found
    bias = _compute_bias(hit, taken, hits, average)
    members = positive & known
    ap = Estimate(average, influence, members, bias=bias, least=LEAST_POSITIVES)

    other = n - found
    if not other:
        return ap, None
    misses = np.add.reduceat(1 - hit, heads)
    tied_hits, above = np.add.reduceat(hit, heads), np.cumsum(misses)
    beaten = (other - above + misses / 2)[step] / other
    beating = (np.cumsum(tied_hits) - tied_hits / 2)[step] / found
    area = float((hit * beaten).sum() / found)
    influence = np.zeros(len(scores))
    influence[rows] = np.where(hit > 0, (beaten - area) / found, (beating - area) / other)
    rarer = members if found <= other else known & ~positive
    return ap, Estimate(area, influence, rarer)


def _compute_bias(
    hit: Float[np.ndarray, " b"],
    taken: Float[np.ndarray, " b"],
    hits: Float[np.ndarray, " b"],
    average: float,
) -> float:
    """Return the jackknife's bias of average precision (Efron 1982, chapter 2), in closed form.

    Leaving out each clip in turn changes the precision at the positive clips at or below it.
    Of a single positive clip nothing can be left out; its bias is taken as 0.
    """
    n, found = len(hit), hit.sum()
    if found < 2:
        return 0.0
    before, fewer = taken - hits, np.maximum(taken - 1, 1)
    precision = hits / taken
    negative = (hit * (before * hits / fewer + (n - found - before) * precision)).sum() / found
    # Without a positive clip: the others keep it out of their counts, or lie above it.
    positive = (hit * ((hits - 1) ** 2 / fewer + (found - hits) * precision)).sum() / (found - 1)
    return float((n - 1) * ((negative + positive) / n - average))
