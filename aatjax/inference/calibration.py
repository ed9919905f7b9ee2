"""Calibration of logits: temperature, decision thresholds and conformal sets.

All of it is fitted on validation clips and changes no weight: a temperature (Guo et al. 2017), a
threshold per class for multi-label tasks, and a conformal quantile (split conformal prediction).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from aatjax.errors import NotFiniteError, UsageError, format_count
from aatjax.train.metrics.decisions import Calibration, compute_probabilities

COVERAGE = 0.9
BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
PRIOR = 0.7
"""Standard deviation of the prior on the logarithm of the temperature: 95 % within 1/4 and 4."""
LEAST_CLIPS = 20
"""Validation clips from which on a model is calibrated."""
LEAST_POSITIVE = 5
"""Clips with a class, and without it, from which on its threshold is fitted."""
DEFAULT_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class PredictionSets:
    """Calibrated decisions, one row per clip.

    Attributes:
        probabilities: calibrated, `[b, c]`.
        given: the predicted classes: the most probable one, or those above their thresholds.
        possible: the conformal set, joined with the predicted classes.
        unsure: whether more classes are possible than given.
    """

    probabilities: Float[np.ndarray, "b c"]
    given: Bool[np.ndarray, "b c"]
    possible: Bool[np.ndarray, "b c"]
    unsure: Bool[np.ndarray, " b"]


def fit_calibration(
    logits: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    targets: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    multi_label: bool,
    coverage: float = COVERAGE,
) -> Calibration:
    """Fit temperature, thresholds and conformal quantile on validation clips.

    The quantile is that of split conformal prediction (Vovk et al. 2005; Lei et al. 2018,
    theorem 2.2) with the score 1 - p of the true class, the "least ambiguous" sets of Sadinle, Lei
    and Wasserman 2019; for a clip with several classes the largest of their scores counts. With n
    validation clips it is the ceil((n + 1) coverage)-th smallest score, so that for a new clip of
    the same distribution

        coverage <= P(all its classes are possible) <= coverage + 1 / (n + 1),

    whatever the model; the upper bound holds for scores without ties. The lower bound is marginal:
    on average over draws of the validation clips, not per class. It fails for clips of another
    distribution, and slightly where the same clips selected the weights (select='best'). The
    scores are those at temperature 1: a temperature fitted on the same clips would void the
    theorem.

    Args:
        logits: `[n, c]` scores before softmax or sigmoid.
        targets: `[n, c]`, 1 where the clip has the class, 0 where not, NaN where unknown.
        multi_label: sigmoid instead of softmax.
        coverage: minimum share of clips whose classes are all possible, between 0 and 1.

    Raises:
        UsageError: arguments that do not match.
        NotFiniteError: a logit is NaN or infinite.
    """
    scores, truth = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    if not 0 < coverage < 1:
        raise UsageError(f"coverage={coverage:g} must lie between 0 and 1, such as {COVERAGE}")
    _check_logits(scores, truth, multi_label)
    temperature = fit_temperature(scores, truth, multi_label)
    probabilities = compute_probabilities(scores, temperature, multi_label)
    thresholds = fit_thresholds(probabilities, truth) if multi_label else None
    uncalibrated = compute_probabilities(scores, 1.0, multi_label)
    nonconformity = np.where(truth == 1, 1 - uncalibrated, 0.0).max(axis=1)
    quantile = compute_quantile(nonconformity, coverage)
    return Calibration(temperature, thresholds, quantile, coverage, len(scores))


def calibrate_clips(
    logits: Float[np.ndarray, "b c"], targets: Float[np.ndarray, "b c"], multi_label: bool
) -> tuple[Calibration | None, str]:
    """Fit a calibration where there are enough validation clips, and describe it in a sentence.

    Args:
        logits, targets, multi_label: as for `fit_calibration`.
    """
    clips = format_count(len(logits), "validation clip")
    if len(logits) < LEAST_CLIPS:
        return None, f"not calibrated: {clips}, {LEAST_CLIPS} are needed"
    found = fit_calibration(logits, targets, multi_label)
    return found, f"calibrated on {clips}: temperature {found.temperature:.3g}"


def apply_calibration(
    logits: Float[np.ndarray, "b c"] | Float[Array, "b c"], calibration: Calibration
) -> PredictionSets:
    """Return calibrated probabilities, given and possible classes of logits `[b, c]`."""
    scores = np.asarray(logits, np.float64)
    uncalibrated = compute_probabilities(scores, 1.0, calibration.multi_label)
    probabilities = compute_probabilities(scores, calibration.temperature, calibration.multi_label)
    return decide(probabilities, uncalibrated, calibration)


def decide(
    probabilities: Float[np.ndarray, "b c"],
    uncalibrated: Float[np.ndarray, "b c"],
    calibration: Calibration,
) -> PredictionSets:
    """Return the decisions for calibrated probabilities and those at temperature 1.

    Given classes are always possible too, which can only raise the coverage: otherwise a model
    that is right more often than `coverage` would have empty sets.
    """
    if calibration.thresholds is None:
        given = np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]
    else:
        given = probabilities >= np.asarray(calibration.thresholds)[None]
    possible = given | select_conformal(uncalibrated, calibration)
    return PredictionSets(probabilities, given, possible, np.any(possible & ~given, axis=1))


def select_conformal(
    uncalibrated: Float[np.ndarray, "b c"], calibration: Calibration
) -> Bool[np.ndarray, "b c"]:
    """Return the conformal sets: classes whose 1 - p at temperature 1 is at most the quantile."""
    return 1 - uncalibrated <= calibration.quantile


def fit_temperature(
    logits: Float[np.ndarray, "b c"], targets: Float[np.ndarray, "b c"], multi_label: bool
) -> float:
    """Return the temperature that fits the clips, shrunk towards 1 where they are few.

    The negative log-likelihood (Guo et al. 2017, sec. 4.2) with a normal prior on log T, of mean 0
    and standard deviation `PRIOR`: that of hundreds of clips outweighs it.
    """
    from scipy import optimize, special

    known = ~np.isnan(targets)
    truth = targets == 1

    def slope(log_b: float) -> float:
        """Derivative of the negative log posterior by log(1 / T)."""
        b = math.exp(log_b)
        if multi_label:
            found = ((special.expit(b * logits) - truth) * logits)[known].sum()
        else:
            found = ((special.softmax(b * logits, axis=1) - truth) * logits).sum()
        return float(b * found + log_b / PRIOR**2)

    most = math.log(MAX_TEMPERATURE)
    if slope(most) <= 0:
        return MIN_TEMPERATURE
    if slope(-most) >= 0:
        return MAX_TEMPERATURE
    root: Any = optimize.brentq(slope, -most, most, xtol=1e-12)
    return math.exp(-float(root))


def fit_thresholds(
    probabilities: Float[np.ndarray, "b c"], targets: Float[np.ndarray, "b c"]
) -> tuple[float, ...]:
    """Return the threshold of best F1 per class, half-way between two probabilities.

    Of several equally good ones, the one nearest to 0.5; 0.5 for a class with fewer than
    `LEAST_POSITIVE` clips, or as few without it.
    """
    return tuple(
        _fit_threshold(column[known], truth[known])
        for column, truth, known in zip(
            probabilities.T, (targets == 1).T, ~np.isnan(targets).T, strict=True
        )
    )


def _fit_threshold(probability: Float[np.ndarray, " b"], positive: Bool[np.ndarray, " b"]) -> float:
    if min(positive.sum(), (~positive).sum()) < LEAST_POSITIVE:
        return DEFAULT_THRESHOLD
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order]
    hits = np.cumsum(positive[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + positive.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # a threshold cannot separate ties
    below = np.append(ranked[1:], 0.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    cuts = (ranked[best] + below[best]) / 2
    # 0.5 itself where it lies in the gap.
    default = (below[best] < DEFAULT_THRESHOLD) & (ranked[best] >= DEFAULT_THRESHOLD)
    cuts = np.where(default, DEFAULT_THRESHOLD, cuts)
    return float(cuts[np.abs(cuts - DEFAULT_THRESHOLD).argmin()])


def compute_quantile(scores: Float[np.ndarray, " b"], coverage: float) -> float:
    """Return the ceil((n + 1) coverage)-th smallest of n scores in [0, 1]; 1 if n is too small."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return 1.0 if rank > len(scores) else float(np.sort(scores)[rank - 1])


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Reliability curve: accuracy by confidence.

    Attributes:
        edges: bin edges, one more than bins.
        confidence: mean confidence per bin, NaN where it is empty.
        accuracy: share of correct entries per bin, NaN where it is empty.
        count: entries per bin.
        error: expected calibration error: mean of |accuracy - confidence| weighted by count.
    """

    edges: Float[np.ndarray, " k"]
    confidence: Float[np.ndarray, " m"]
    accuracy: Float[np.ndarray, " m"]
    count: Float[np.ndarray, " m"]
    error: float


def compute_reliability(
    probabilities: Float[np.ndarray, "b c"],
    targets: Float[np.ndarray, "b c"],
    multi_label: bool,
    bins: int = BINS,
) -> Reliability:
    """Return the reliability curve and expected calibration error (Guo et al. 2017, eq. 2-3).

    The entries of a single-label task are the clips, each with its top probability; those of a
    multi-label task all known pairs of clip and class. Bins have equal width, closed on the right.

    Raises:
        UsageError: fewer than one bin.
    """
    if bins < 1:
        raise UsageError(f"bins={bins} must be at least 1")
    truth = targets == 1
    if multi_label:
        known = ~np.isnan(targets)
        confidence, right = probabilities[known], truth[known]
    else:
        best = probabilities.argmax(axis=1)
        rows = np.arange(len(best))
        confidence, right = probabilities[rows, best], truth[rows, best]
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.ceil(confidence * bins - 1e-12).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence, bins) / count
        accuracy = np.bincount(index, right.astype(float), bins) / count
    gaps = np.nan_to_num(np.abs(accuracy - mean))
    error = float((gaps * count).sum() / max(1.0, count.sum()))
    return Reliability(edges, mean, accuracy, count, error)


def select_names(
    mask: Sequence[bool] | Bool[np.ndarray, " c"], classes: Sequence[str]
) -> tuple[str, ...]:
    """Return the class names where the mask is true."""
    return tuple(name for name, chosen in zip(classes, mask, strict=True) if chosen)


def read_calibration(info: Mapping[str, Any], classes: int) -> Calibration | None:
    """Return the calibration in an adapter's metadata, or None where it has none.

    Raises:
        DataError: damaged fields.
    """
    fields = info.get("decisions")
    return None if fields is None else Calibration.from_json(fields, classes)


def _check_logits(scores: np.ndarray, truth: np.ndarray, multi_label: bool) -> None:
    if scores.ndim != 2 or scores.shape != truth.shape or not scores.size:
        raise UsageError(
            f"logits {scores.shape} and targets {truth.shape} do not match: both are "
            "(clips, classes)"
        )
    if not np.isfinite(scores).all():
        raise NotFiniteError("a validation logit is not finite: the training may have diverged")
    if not multi_label and not (truth.sum(axis=1) == 1).all():
        raise UsageError("a clip has no label or several: set multi_label=True for such targets")
