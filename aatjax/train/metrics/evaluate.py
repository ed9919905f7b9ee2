"""Metrics of logits against labels: headline numbers with intervals, and a row per class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from aatjax.errors import DataError, NotFiniteError, UsageError
from aatjax.train.metrics.intervals import (
    check_interval,
    percentile_interval,
    rank,
    resample,
)
from aatjax.train.metrics.results import NAMES, ClassResult, Metrics

MOST_CONFUSED = 1000  # classes up to which the confusion matrix is kept
RANKING_WORK = 4 * 10**8  # resamples * clips * classes spent on mAP and AUC, about five seconds
LEAST_RESAMPLES = 200


def compute_metrics(
    logits: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    targets: Float[np.ndarray, "b c"] | Float[Array, "b c"],
    *,
    classes: Sequence[str],
    multi_label: bool,
    bootstrap: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
    groups: Sequence[object] | None = None,
) -> Metrics:
    """Compare logits with targets.

    A target may be NaN in a multi-label task, where it is unknown whether the clip has the class:
    that entry enters no number of the class, and accuracy, which is over all classes, is not given.
    Classes without a clip do not enter the means; the notes give their number. Average precision
    and AUC rank clips by the softmax of the logits in a single-label task, and by the logits (hence
    by their sigmoid) in a multi-label one. Intervals are percentiles over bootstrap resamples of
    the clips (Efron and Tibshirani, 1993, chapter 13) for a fixed model: they do not contain the
    spread over training runs. Drawing a clip twice raises average precision slightly, so with few
    clips per class the interval of mAP is biased upwards.

    Args:
        logits: scores before softmax or sigmoid.
        targets: 1 where the clip has the class, 0 where not, NaN where that is unknown.
        classes: class names.
        multi_label: whether a clip may have any number of classes.
        bootstrap: number of resamples; 0 omits the intervals.
        seed: seed of the resamples.
        interval: confidence level.
        groups: recording or speaker of each clip; whole groups are resampled then.

    Raises:
        UsageError: arguments that do not fit each other or the task.
        DataError: no clips.
        NotFiniteError: a logit is NaN or infinite.
    """
    from scipy import special

    scores, truth = np.asarray(logits, np.float64), np.asarray(targets)
    _check(scores, truth, classes, multi_label, bootstrap, groups)
    check_interval(interval)
    known = ~np.isnan(truth)
    truth = truth == 1
    best = scores.argmax(1)
    guess = (scores > 0) & known if multi_label else np.arange(len(classes)) == best[:, None]
    if not multi_label:
        scores = special.log_softmax(scores, axis=1)
    notes = _note(truth, known, classes, multi_label)
    counts = _Counts(guess, truth, truth[np.arange(len(truth)), best], truth.any(1))
    ranking = _Ranking(scores, truth, known)

    once = np.ones((1, len(scores)))
    values = {name: numbers[0] for name, numbers in counts.headline(once).items()}
    ranks = np.array([ranking.rank_class(c, once) for c in range(len(classes))])[:, :, 0]
    values["mean_ap"], values["macro_auc"] = _mean(ranks.T)
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(NAMES)
    units = len(scores) if groups is None else len(set(groups))
    if bootstrap and units < 2:
        notes.append("no intervals: there is nothing to resample in a single clip or group")
    elif bootstrap:
        weights = resample(groups, len(scores), bootstrap, np.random.default_rng(seed))
        intervals |= _compute_intervals(counts, ranking, weights, interval, notes)
    undefined = ["balanced_accuracy"] if multi_label else []
    undefined += [] if known.all() else ["accuracy"]
    for name in undefined:
        values[name], intervals[name] = np.nan, None
    d_prime = _d_prime(values["macro_auc"])
    if d_prime is None and not np.isnan(values["macro_auc"]):
        notes.append(f"d-prime is not bounded at a macro AUC of {values['macro_auc']:g}")
    confusion = None
    if not multi_label and len(classes) <= MOST_CONFUSED:
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(confusion, (truth.argmax(1), best), 1)
    columns = [*(rows[0] for rows in counts.by_class(once)), *ranks.T]
    return Metrics(
        clips=len(scores),
        multi_label=multi_label,
        **{name: _defined(number) for name, number in values.items()},
        d_prime=d_prime,
        intervals=intervals,
        interval=interval,
        per_class=tuple(
            ClassResult(str(name), int(support), *map(_defined, row))
            for name, support, *row in zip(classes, truth.sum(0), *columns, strict=True)
        ),
        confusion=confusion,
        notes=tuple(notes),
    )


def _compute_intervals(
    counts: _Counts,
    ranking: _Ranking,
    weights: Float[np.ndarray, "k b"],
    interval: float,
    notes: list[str],
) -> dict[str, tuple[float, float] | None]:
    """Return the interval of each number over resamples; append notes on what is omitted."""
    found = {
        name: percentile_interval(numbers, interval)
        for name, numbers in counts.headline(weights).items()
    }
    bootstrap, times = len(weights), _affordable(len(weights), ranking.scores.size)
    if not times:
        notes.append("no intervals of mAP, AUC and d-prime: too many clips and classes")
        return found
    if times < bootstrap:
        notes.append(f"{times} resamples instead of {bootstrap} for mAP, AUC and d-prime")
    ap, auc = ranking.rank_resampled(weights[:times])
    found["mean_ap"] = percentile_interval(ap, interval)
    found["macro_auc"] = percentile_interval(auc, interval)
    bounds = [_d_prime(bound) for bound in found["macro_auc"] or ()]
    defined = [bound for bound in bounds if bound is not None]
    found["d_prime"] = (defined[0], defined[1]) if len(defined) == 2 else None
    return found


class _Counts:
    """Metrics that follow from counts of decisions, for k weightings of the clips at once."""

    def __init__(
        self,
        guess: Bool[np.ndarray, "b c"],
        truth: Bool[np.ndarray, "b c"],
        hit: Bool[np.ndarray, " b"],
        labelled: Bool[np.ndarray, " b"],
    ) -> None:
        from scipy import sparse

        kinds = (guess & truth, guess, truth)
        self.right, self.guessed, self.true = (sparse.csr_array(x.T, dtype=float) for x in kinds)
        self.classes = truth.shape[1]
        self.hit, self.labelled = hit.astype(float), labelled.astype(float)

    def by_class(
        self, weights: Float[np.ndarray, "k b"]
    ) -> tuple[Float[np.ndarray, "k c"], Float[np.ndarray, "k c"], Float[np.ndarray, "k c"]]:
        """Return precision, recall and F1 per class; NaN without guesses or without clips."""
        right, guessed, true = ((m @ weights.T).T for m in (self.right, self.guessed, self.true))
        with np.errstate(invalid="ignore"):
            f1 = np.where(true > 0, 2 * right / (guessed + true), np.nan)
            return right / guessed, right / true, f1

    def headline(self, weights: Float[np.ndarray, "k b"]) -> dict[str, Float[np.ndarray, " k"]]:
        """Return accuracy, balanced accuracy and macro-F1 of each weighting."""
        with np.errstate(invalid="ignore"):
            accuracy = (weights @ self.hit) / (weights @ self.labelled)
        step = max(1, 2 * 10**6 // self.classes)  # bounds the memory of many classes
        parts = []
        for start in range(0, len(weights), step):
            _, recall, f1 = self.by_class(weights[start : start + step])
            parts.append((_mean(recall), _mean(f1)))
        balanced, macro = (np.concatenate(part) for part in zip(*parts, strict=True))
        return {"accuracy": accuracy, "balanced_accuracy": balanced, "macro_f1": macro}


class _Ranking:
    """Metrics of the order of the clips, for k weightings of the clips at once."""

    def __init__(
        self,
        scores: Float[np.ndarray, "b c"],
        truth: Bool[np.ndarray, "b c"],
        known: Bool[np.ndarray, "b c"],
    ) -> None:
        self.scores, self.truth, self.known = scores, truth, known

    def rank_class(
        self, c: int, weights: Float[np.ndarray, "k b"]
    ) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Return AP and AUC of class c of each weighting, over the clips where it is known."""
        rows = self.known[:, c]
        scores, truth = self.scores[:, c], self.truth[:, c]
        if rows.all():  # no copy of the weights
            return rank(scores, truth, weights)
        return rank(scores[rows], truth[rows], weights[:, rows])

    def rank_resampled(self, weights: Float[np.ndarray, "k b"]) -> Float[np.ndarray, "2 k"]:
        """Return mAP and macro AUC of each weighting, over the classes defined in it."""
        sums, counts = np.zeros((2, len(weights))), np.zeros((2, len(weights)))
        for c in np.flatnonzero(self.truth.any(0)):
            numbers = np.array(self.rank_class(int(c), weights))
            sums += np.nan_to_num(numbers)
            counts += ~np.isnan(numbers)
        with np.errstate(invalid="ignore"):
            return sums / counts


def _affordable(bootstrap: int, size: int) -> int:
    """Return the resamples for the ranking metrics: fewer on large sets, none on huge ones."""
    if size * LEAST_RESAMPLES > 10 * RANKING_WORK:
        return 0
    return min(bootstrap, max(LEAST_RESAMPLES, RANKING_WORK // size))


def _mean(rows: Float[np.ndarray, "k c"]) -> Float[np.ndarray, " k"]:
    """Return the mean of the defined entries of each row; NaN without any."""
    defined = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(defined, rows, 0).sum(1) / defined.sum(1)


def _d_prime(auc: float) -> float | None:
    from scipy import special

    return math.sqrt(2) * float(special.ndtri(auc)) if 0 < auc < 1 else None


def _defined(number: float | np.floating) -> float | None:
    return None if np.isnan(number) else float(number)


def _check(
    scores: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    multi_label: bool,
    bootstrap: int,
    groups: Sequence[object] | None,
) -> None:
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != len(classes):
        raise UsageError(
            f"logits {scores.shape}, targets {truth.shape} and {len(classes)} classes do not fit; "
            "both arrays are (clips, classes)"
        )
    if not scores.size:
        raise DataError("there are no clips to evaluate; the set is empty or all were quarantined")
    if groups is not None and len(groups) != len(scores):
        raise UsageError(f"{len(groups)} groups for {len(scores)} clips; give one for each clip")
    if bootstrap < 0:
        raise UsageError(f"bootstrap is {bootstrap}; it is a number of resamples, or 0 for none")
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise NotFiniteError(
            f"the logits of {len(bad)} of {len(scores)} clips are not finite, first row {bad[0]}; "
            "look for a diverged run or a damaged weight file"
        )
    unknown = np.isnan(truth) if multi_label else np.zeros(truth.shape, bool)
    if not (np.isin(truth, (0, 1)) | unknown).all():
        raise UsageError("targets must be 0 or 1; use labels that were not mixed or smoothed")
    sums = truth.sum(1)
    rows = np.flatnonzero(sums != 1)
    if not multi_label and len(rows):
        raise UsageError(
            f"{len(rows)} of {len(truth)} clips do not have exactly one label, first row {rows[0]} "
            f"with {int(sums[rows[0]])}; set multi_label=True for such targets"
        )


def _note(
    truth: Bool[np.ndarray, "b c"],
    known: Bool[np.ndarray, "b c"],
    classes: Sequence[str],
    multi_label: bool,
) -> list[str]:
    notes = []
    if not known.all():
        notes.append(
            f"annotated in part: {known.mean():.1%} of the clip-class pairs are known and counted"
        )
    empty = [str(name) for name, used in zip(classes, truth.sum(0), strict=True) if not used]
    if empty:
        more = ", ..." if len(empty) > 5 else ""
        named = ", ".join(empty[:5]) + more
        count = f"{len(empty)} of {len(classes)} classes"
        notes.append(f"{count} have no clip here and do not enter the means: {named}")
    if len(classes) == 1 and not multi_label:
        notes.append("one class only: accuracy is 1 whatever the model does")
    if multi_label and known.all() and (truth.sum(1) == 1).all():
        notes.append("every clip has one label; for a single-label task set multi_label=False")
    return notes
