"""From logits to decisions: calibrated probabilities, thresholds, and sets that say "one of these".

All of it is fitted on validation clips and changes no weight: a temperature (Guo et al. 2017), a
threshold a class for multi-label tasks, and a conformal quantile (split conformal prediction).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import optimize, special

from aatjax.errors import DataError, NotFiniteError, UsageError

COVERAGE = 0.9
BINS = 15
COLDEST, HOTTEST = 0.01, 100.0  # bounds of the temperature
EVEN = 0.5  # threshold of a class that no validation clip has


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What was learnt on validation clips of how far the logits of a model can be trusted.

    Attributes:
        temperature: logits are divided by it; 1 changes nothing, above 1 makes them less sure.
        thresholds: of a multi-label task, the calibrated probability from which on a class is
            given; None otherwise.
        quantile: a class is possible where its probability at temperature 1 is at least
            1 - quantile; 1 makes every class possible, which is what too few clips give.
        coverage: share of sounds whose classes all are among the possible ones, at least.
        clips: validation clips that all this was fitted on.
    """

    temperature: float
    thresholds: tuple[float, ...] | None
    quantile: float
    coverage: float
    clips: int

    @property
    def multi_label(self) -> bool:
        """Whether a clip may have any number of classes."""
        return self.thresholds is not None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads."""
        fields = dataclasses.asdict(self)
        return {**fields, "thresholds": self.thresholds and list(self.thresholds)}

    @classmethod
    def from_json(cls, fields: Any, classes: int | None = None) -> Decisions:
        """Rebuilds what `to_json` gave; fields of later versions are left out.

        Args:
            fields: the dictionary.
            classes: number of classes that thresholds must be for.

        Raises:
            DataError: a field is missing or holds what it cannot hold.
        """
        try:
            thresholds = fields["thresholds"]
            made = cls(
                float(fields["temperature"]),
                None if thresholds is None else tuple(float(t) for t in thresholds),
                float(fields["quantile"]),
                float(fields["coverage"]),
                int(fields["clips"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"decisions: damaged: {type(error).__name__}: {error}") from error
        shares = (made.quantile, made.coverage, *(made.thresholds or ()))
        if not (0 < made.temperature < math.inf and all(0 <= share <= 1 for share in shares)):
            raise DataError("decisions: damaged: a number is out of its range")
        if classes is not None and made.thresholds is not None and len(made.thresholds) != classes:
            raise DataError(
                f"decisions: damaged: {len(made.thresholds)} thresholds for {classes} classes"
            )
        return made


@dataclasses.dataclass(frozen=True)
class Applied:
    """What decisions make of logits, one row a clip.

    Attributes:
        probabilities: calibrated, `[b, c]`.
        given: the classes given: the most probable one, or those above their thresholds.
        possible: the conformal set, with what is given in it.
        unsure: whether more classes are possible than are given.
    """

    probabilities: Float[np.ndarray, "b c"]
    given: Bool[np.ndarray, "b c"]
    possible: Bool[np.ndarray, "b c"]
    unsure: Bool[np.ndarray, " b"]


def fit_decisions(
    logits: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    targets: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    multi_label: bool,
    coverage: float = COVERAGE,
) -> Decisions:
    """Fits temperature, thresholds and conformal quantile on validation clips.

    The quantile is that of split conformal prediction (Vovk et al. 2005; Lei et al. 2018,
    theorem 2.2) with the score 1 - p of the true class, the "least ambiguous" sets of Sadinle, Lei
    and Wasserman 2019; of a clip with several classes the largest of their scores counts. With n
    validation clips it is the ceil((n + 1) coverage)-th smallest score, so that for a new clip
    drawn as these were

        coverage <= P(all its classes are possible) <= coverage + 1 / (n + 1),

    whatever the model; the upper bound holds for scores without ties. The lower one is on average
    over draws of the validation clips, and not for each class alone. It is lost where new sounds
    are of another kind, and a little where the same clips chose the weights (select='best'). The
    scores are those at temperature 1, since one fitted on the same clips would void the theorem.

    Args:
        logits: `[n, c]` scores before softmax or sigmoid.
        targets: `[n, c]`, 1 where the clip has the class, 0 where not, NaN where not known.
        multi_label: sigmoid instead of softmax.
        coverage: share of sounds whose classes all are to be possible, between 0 and 1.

    Raises:
        UsageError: arguments that do not fit each other.
        NotFiniteError: a logit is NaN or infinite.
    """
    scores, truth = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    if not 0 < coverage < 1:
        raise UsageError(f"coverage={coverage:g} must lie between 0 and 1, such as {COVERAGE}")
    _check(scores, truth, multi_label)
    temperature = fit_temperature(scores, truth, multi_label)
    probabilities = calibrated(scores, temperature, multi_label)
    thresholds = fit_thresholds(probabilities, truth) if multi_label else None
    plain = calibrated(scores, 1.0, multi_label)
    missed = np.where(truth == 1, 1 - plain, 0.0).max(axis=1)
    return Decisions(temperature, thresholds, quantile(missed, coverage), coverage, len(scores))


def apply(logits: Float[np.ndarray, "b c"] | Float[Array, "b c"], decisions: Decisions) -> Applied:
    """Calibrated probabilities, given and possible classes of logits `[b, c]`."""
    scores = np.asarray(logits, np.float64)
    plain = calibrated(scores, 1.0, decisions.multi_label)
    probabilities = calibrated(scores, decisions.temperature, decisions.multi_label)
    return decide(probabilities, plain, decisions)


def decide(
    probabilities: Float[np.ndarray, "b c"], plain: Float[np.ndarray, "b c"], decisions: Decisions
) -> Applied:
    """The same from probabilities, calibrated ones and those at temperature 1.

    What is given is always possible too, which can only raise the coverage: without it, a model
    that is right more often than `coverage` would leave sets empty to come down to it.
    """
    if decisions.thresholds is None:
        given = np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]
    else:
        given = probabilities >= np.asarray(decisions.thresholds)[None]
    possible = given | within(plain, decisions)
    return Applied(probabilities, given, possible, np.any(possible & ~given, axis=1))


def within(plain: Float[np.ndarray, "b c"], decisions: Decisions) -> Bool[np.ndarray, "b c"]:
    """The bare conformal set: classes whose score 1 - p, at temperature 1, is in the quantile."""
    return 1 - plain <= decisions.quantile


def calibrated(
    logits: Float[np.ndarray, "b c"], temperature: float, multi_label: bool
) -> Float[np.ndarray, "b c"]:
    """softmax(logits / T), or sigmoid(logits / T) of a multi-label task."""
    scaled = logits / temperature
    return special.expit(scaled) if multi_label else special.softmax(scaled, axis=1)


def fit_temperature(
    logits: Float[np.ndarray, "b c"], targets: Float[np.ndarray, "b c"], multi_label: bool
) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017, sec. 4.2).

    With b = 1/T the likelihood is concave in b, so its slope has one zero. Where there is none,
    since every clip is right and the likelihood rises for ever as T goes to 0, the clips do not
    tell how sure the model may be, and the temperature stays 1.
    """
    known = ~np.isnan(targets)
    truth = targets == 1

    def slope(b: float) -> float:
        """Derivative by b of the summed negative log-likelihood."""
        if multi_label:
            return float(((special.expit(b * logits) - truth) * logits)[known].sum())
        return float(((special.softmax(b * logits, axis=1) - truth) * logits).sum())

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(high) <= 0:
        return 1.0
    if slope(low) >= 0:  # no better than chance: as unsure as can be
        return HOTTEST
    zero: Any = optimize.brentq(slope, low, high, xtol=1e-12)
    return 1 / float(zero)


def fit_thresholds(
    probabilities: Float[np.ndarray, "b c"], targets: Float[np.ndarray, "b c"]
) -> tuple[float, ...]:
    """For each class the threshold of best F1 on these clips, half-way between two probabilities.

    Of several that are equally good, the one nearest to 0.5. A class that no clip has gets 0.5.
    """
    return tuple(
        _threshold(column[known], truth[known])
        for column, truth, known in zip(
            probabilities.T, (targets == 1).T, ~np.isnan(targets).T, strict=True
        )
    )


def _threshold(probability: Float[np.ndarray, " b"], positive: Bool[np.ndarray, " b"]) -> float:
    if not positive.any():
        return EVEN
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order]
    hits = np.cumsum(positive[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + positive.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # a threshold cannot part equals
    below = np.append(ranked[1:], 0.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    cuts = (ranked[best] + below[best]) / 2
    # 0.5 itself where it lies in the gap: nothing speaks for another place.
    cuts = np.where((below[best] < EVEN) & (ranked[best] >= EVEN), EVEN, cuts)
    return float(cuts[np.abs(cuts - EVEN).argmin()])


def quantile(scores: Float[np.ndarray, " b"], coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest of n scores in [0, 1]; 1 where n is too small."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return 1.0 if rank > len(scores) else float(np.sort(scores)[rank - 1])


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often what is said with a confidence is so.

    Attributes:
        edges: of the bins of confidence, one more than bins.
        confidence: mean confidence in each bin, NaN where it is empty.
        accuracy: share that is right in each bin, NaN where it is empty.
        count: entries in each bin.
        error: expected calibration error: mean of |accuracy - confidence| over the entries' bins.
    """

    edges: Float[np.ndarray, " k"]
    confidence: Float[np.ndarray, " m"]
    accuracy: Float[np.ndarray, " m"]
    count: Float[np.ndarray, " m"]
    error: float


def reliability(
    probabilities: Float[np.ndarray, "b c"],
    targets: Float[np.ndarray, "b c"],
    multi_label: bool,
    bins: int = BINS,
) -> Reliability:
    """Reliability curve and expected calibration error (Guo et al. 2017, eq. 2-3).

    Of a single-label task the entries are the clips, each with the probability of its most
    probable class; of a multi-label one all known pairs of clip and class, each with the
    probability of the class. Bins are equally wide, closed on the right.

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
    place = np.clip(np.ceil(confidence * bins - 1e-12).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        share = np.bincount(place, right.astype(float), bins) / count
    gaps = np.nan_to_num(np.abs(share - mean))
    error = float((gaps * count).sum() / max(1.0, count.sum()))
    return Reliability(edges, mean, share, count, error)


def names(mask: Sequence[bool] | Bool[np.ndarray, " c"], classes: Sequence[str]) -> tuple[str, ...]:
    """The classes that a row of a mask has."""
    return tuple(name for name, there in zip(classes, mask, strict=True) if there)


def stored(info: Mapping[str, Any], classes: int) -> Decisions | None:
    """The decisions in an adapter's metadata, or None where it holds none.

    Raises:
        DataError: they are damaged.
    """
    fields = info.get("decisions")
    return None if fields is None else Decisions.from_json(fields, classes)


def _check(scores: np.ndarray, truth: np.ndarray, multi_label: bool) -> None:
    if scores.ndim != 2 or scores.shape != truth.shape or not scores.size:
        raise UsageError(
            f"logits {scores.shape} and targets {truth.shape} do not fit: both are (clips, classes)"
        )
    if not np.isfinite(scores).all():
        raise NotFiniteError("a validation logit is not finite: look for a diverged run")
    if not multi_label and not (truth.sum(axis=1) == 1).all():
        raise UsageError("a clip has no label or several: set multi_label=True for such targets")
