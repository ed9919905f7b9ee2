"""Coverage of the confidence intervals, and false alarms and power of the paired tests."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from aatjax.experiments.clip_scores import ClipScores, Key, summarise_runs
from aatjax.experiments.compare.statistics import compare_runs
from aatjax.experiments.compare.tables import make_markdown_table
from aatjax.train.metrics.evaluate import compute_metrics
from aatjax.train.metrics.intervals import estimate_interval
from aatjax.train.metrics.results import NAMES, Metrics
from benchmarks import append_row

CLASSES = 5
PREVALENCE = 0.3
ICC = 0.1  # intraclass correlation of right answers within a speaker
SPEAKER = 0.5  # standard deviation of a speaker's shift of a class's scores, of 1 between clips
RUN = 0.1  # the same of a training run's shift of the probit of being right
METHODS_OF_ONE_RUN = "one run each, as if of the methods"
DESIGNS = ((13, None), (80, None), (400, None), (13, 5), (80, 10), (80, 5), (400, 20), (400, 5))
"""Clips and speakers; None for clips on their own."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One row: what is simulated, and how often it came out.

    Attributes:
        what: `interval` or `test`.
        figure: the metric, or the design of the runs.
        clips: test clips of a run.
        groups: speakers; empty for clips on their own.
        truth: the true metric, or the true difference.
        share: of the intervals that contain it, or of the tests with p below 0.05.
        width: mean width of the intervals.
        without: share of experiments without an interval.
        experiments: number of simulated experiments.
    """

    what: str
    figure: str
    clips: int
    groups: int | str
    truth: str
    share: str
    width: str
    without: str
    experiments: int


def intervals(experiments: int = 1000, seed: int = 0, out: Path | None = None) -> None:
    """Simulate test sets of a known truth, and count how often the intervals contain it.

    Clips are on their own, or of 5 to 20 speakers with an intraclass correlation of 0.1 (accuracy),
    or whose scores of each class are shifted by half a standard deviation (mAP). Then two methods
    are compared that are equal, or differ by 10 points. Everything is computed by the functions
    that `aatjax eval` and `aatjax compare` use. Prints a table; takes four minutes.

    Args:
        experiments: simulated test sets per row.
        seed: of the random numbers.
        out: CSV file of the rows.
    """
    rng = np.random.default_rng(seed)
    rows = [*simulate_intervals(experiments, rng), *simulate_tests(experiments, rng)]
    for row in rows:
        append_row(out, dataclasses.asdict(row))
    print(
        make_markdown_table(
            [field.name for field in dataclasses.fields(Trial)],
            [[str(v) for v in dataclasses.astuple(row)] for row in rows],
        )
    )


def simulate_intervals(experiments: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Yield a row for each design, true value and metric."""
    for clips, speakers in DESIGNS:
        groups = assign_speakers(clips, speakers)
        for accuracy in (0.5, 0.9, 1.0):
            found = [draw_single(clips, groups, accuracy, rng) for _ in range(experiments)]
            for name in ("accuracy", "balanced_accuracy", "macro_f1"):
                yield count_covered(name, found, accuracy, speakers)
            yield count_covered("recall of a class", found, accuracy, speakers)
            if speakers:
                yield count_ignoring(found, accuracy, speakers)
        for distance in (1.5, 3.0):
            found = [draw_multi(clips, groups, distance, rng) for _ in range(experiments)]
            spread = math.sqrt(1 + (SPEAKER**2 if speakers else 0))
            yield count_covered("mean_ap", found, compute_ap(distance / spread), speakers)
            area = float(special.ndtr(distance / spread / math.sqrt(2)))
            yield count_covered("macro_auc", found, area, speakers)
    for accuracy in (0.5, 0.9):
        for folds, clips in ((2, 40), (5, 80)):
            yield count_folds(folds, clips, accuracy, experiments, rng)


def assign_speakers(clips: int, speakers: int | None) -> list[str] | None:
    """Return the speaker of each clip, in turn."""
    return None if speakers is None else [f"speaker {i % speakers}" for i in range(clips)]


def draw_right(
    clips: int, groups: list[str] | None, accuracy: float, rng: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """Draw which clips are right: beta-binomial within a speaker."""
    if groups is None or accuracy in (0, 1):
        return (rng.random(clips) < accuracy).astype(float)
    weight = (1 - ICC) / ICC
    own = {
        name: rng.beta(accuracy * weight, (1 - accuracy) * weight) for name in dict.fromkeys(groups)
    }
    return (rng.random(clips) < np.array([own[name] for name in groups])).astype(float)


def draw_single(
    clips: int, groups: list[str] | None, accuracy: float, rng: np.random.Generator
) -> Metrics:
    """Draw a single-label test set; its wrong predictions are of any other class."""
    labels = rng.permutation(clips) % CLASSES
    right = draw_right(clips, groups, accuracy, rng)
    wrong = (labels + rng.integers(1, CLASSES, clips)) % CLASSES
    eye = np.eye(CLASSES, dtype=np.float32)
    logits = eye[np.where(right > 0, labels, wrong)]
    return compute_metrics(logits, eye[labels], classes="abcde", multi_label=False, groups=groups)


def draw_multi(
    clips: int, groups: list[str] | None, distance: float, rng: np.random.Generator
) -> Metrics:
    """Draw a multi-label test set with normal scores."""
    truth = rng.random((clips, CLASSES)) < PREVALENCE
    scores = rng.normal(size=truth.shape) + distance * truth
    scores += shift_speakers(groups, rng)
    return compute_metrics(
        scores.astype(np.float32),
        truth.astype(np.float32),
        classes="abcde",
        multi_label=True,
        groups=groups,
    )


def compute_ap(distance: float) -> float:
    """Return the average precision of normal scores that are this far apart, of many clips."""
    recall = (np.arange(200_000) + 0.5) / 200_000
    others = special.ndtr(special.ndtri(recall) - distance)
    return float(np.mean(PREVALENCE * recall / (PREVALENCE * recall + (1 - PREVALENCE) * others)))


def solve_ap(wanted: float) -> float:
    """Return the distance of the scores that gives this average precision."""
    found: Any = optimize.brentq(lambda distance: compute_ap(distance) - wanted, 0.1, 10.0)
    return float(found)


def count_covered(name: str, found: list[Metrics], truth: float, speakers: int | None) -> Trial:
    """Count how often the interval of a metric contains the truth."""
    if name in NAMES:
        pairs = [metrics.intervals[name] for metrics in found]
    else:
        pairs = [metrics.per_class[0].intervals["recall"] for metrics in found]
    return make_trial(NAMES.get(name, name), pairs, truth, found[0].clips, speakers)


def count_ignoring(found: list[Metrics], truth: float, speakers: int) -> Trial:
    """Count for the interval of accuracy that takes the clips as independent."""
    pairs = [
        estimate_interval(one.accuracy or 0.0, 0.0, clips=one.clips, units=one.clips, exact=True)
        for one in found
    ]
    return make_trial("accuracy, speakers ignored", pairs, truth, found[0].clips, speakers)


def make_trial(
    figure: str,
    pairs: list[tuple[float, float] | None],
    truth: float,
    clips: int,
    speakers: int | None,
) -> Trial:
    """Return the row of intervals."""
    given = [pair for pair in pairs if pair is not None]
    covered = np.mean([low <= truth <= high for low, high in given]) if given else math.nan
    width = np.mean([high - low for low, high in given]) if given else math.nan
    return Trial(
        "interval",
        figure,
        clips,
        speakers or "",
        f"{truth:.3f}",
        f"{covered:.3f}",
        f"{width:.3f}",
        f"{1 - len(given) / len(pairs):.3f}",
        len(pairs),
    )


def score_run(
    right: Float[np.ndarray, " n"], groups: list[str] | None, fold: str | None
) -> ClipScores:
    """Return the clip scores of a run by which clips are right."""
    n = len(right)
    names = [None] * n if groups is None else [f"{fold} {name}" for name in groups]
    influence = (right - right.mean()) / n
    return ClipScores(tuple(map(str, range(n))), tuple(names), tuple(influence.tolist()))


def count_folds(
    folds: int, clips: int, accuracy: float, experiments: int, rng: np.random.Generator
) -> Trial:
    """Count how often the interval of a cross-validation contains the mean accuracy."""
    pairs: list[tuple[float, float] | None] = []
    for _ in range(experiments):
        level = special.ndtri(accuracy) * math.sqrt(1 + RUN**2)
        values: dict[Key, float] = {}
        scores: dict[Key, ClipScores | None] = {}
        for k in range(folds):
            right = rng.random(clips) < special.ndtr(level + RUN * rng.normal())
            values[0, str(k)] = float(right.mean())
            scores[0, str(k)] = score_run(right.astype(float), None, str(k))
        _, low, high = summarise_runs(values, scores)
        pairs.append(None if low is None or high is None else (low, high))
    return make_trial(f"accuracy, mean of {folds} folds", pairs, accuracy, clips, None)


def simulate_tests(experiments: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Yield a row for each design of the runs and each true difference."""
    for gain in (0.0, 0.1):
        for clips, speakers in ((80, None), (400, None), (80, 10), (400, 20)):
            yield count_rejected(
                "one run each", clips, speakers, gain, [(0, None)], experiments, rng
            )
        for clips, speakers in ((80, None), (400, None), (400, 20)):
            yield count_rejected_map(clips, speakers, gain, experiments, rng)
        keys: list[Key] = [(0, None)]
        yield count_rejected(METHODS_OF_ONE_RUN, 400, None, gain, keys, experiments, rng)
        for seeds in (2, 3):
            keys = [(seed, None) for seed in range(seeds)]
            yield count_rejected(f"{seeds} seeds", 400, None, gain, keys, experiments, rng)
        for folds in (2, 4, 5):
            keys = [(0, str(fold)) for fold in range(folds)]
            yield count_rejected(f"{folds} folds", 80, None, gain, keys, experiments, rng)
        keys = [(0, str(fold)) for fold in range(5)]
        yield count_rejected("5 folds", 80, 10, gain, keys, experiments, rng)


def count_rejected(
    design: str,
    clips: int,
    speakers: int | None,
    gain: float,
    keys: list[Key],
    experiments: int,
    rng: np.random.Generator,
) -> Trial:
    """Count how often two methods, of accuracy 0.7 and 0.7 + gain, differ at p < 0.05.

    Both are right on the same clips more often than by chance: a clip is right where a probit of
    its difficulty, of the speaker for this method, of the run, and of noise is positive. The runs
    of "one run each" are the models that are compared, so that there is none of the run.
    """
    run = 0.0 if design == "one run each" else RUN
    speaker = 0.3 if speakers else 0.0
    spread = math.sqrt(1 + 1 + speaker**2 + run**2)
    levels = [special.ndtri(0.7) * spread, special.ndtri(0.7 + gain) * spread]
    groups = assign_speakers(clips, speakers)
    rejected = 0
    for _ in range(experiments):
        values: list[dict[Key, float]] = [{}, {}]
        scores: list[dict[Key, ClipScores | None]] = [{}, {}]
        shared: dict[str | None, tuple[np.ndarray, np.ndarray]] = {}
        for key in keys:
            fold = key[1]
            if fold not in shared:
                own = rng.normal(size=(2, speakers or 1))[:, np.arange(clips) % (speakers or 1)]
                shared[fold] = rng.normal(size=clips), speaker * own
            difficulty, shift = shared[fold]
            for method, level in enumerate(levels):
                latent = level + difficulty + shift[method] + run * rng.normal()
                right = (latent + rng.normal(size=clips) > 0).astype(float)
                values[method][key] = float(right.mean())
                scores[method][key] = score_run(right, groups, fold)
        p = compare_runs(values[0], values[1], scores[0], scores[1])["p"]
        rejected += p is not None and p < 0.05
    return make_test_trial(design, clips, speakers, gain, rejected, experiments)


def count_rejected_map(
    clips: int, speakers: int | None, gain: float, experiments: int, rng: np.random.Generator
) -> Trial:
    """Count how often two models whose mAP differs by `gain` differ at p < 0.05.

    Half of the variance of their scores is the same in both.
    """
    groups = assign_speakers(clips, speakers)
    first = 1.5
    second = solve_ap(compute_ap(first) + gain)
    rejected = 0
    for _ in range(experiments):
        truth = rng.random((clips, CLASSES)) < PREVALENCE
        same = rng.normal(size=truth.shape)
        found = []
        for distance in (first, second):
            scores = np.sqrt(0.5) * (same + rng.normal(size=truth.shape)) + distance * truth
            scores += shift_speakers(groups, rng)
            found.append(
                compute_metrics(
                    scores.astype(np.float32),
                    truth.astype(np.float32),
                    classes="abcde",
                    multi_label=True,
                    groups=groups,
                )
            )
        values: list[dict[Key, float]] = [{(0, None): metrics.mean_ap or 0.0} for metrics in found]
        ids, names = tuple(map(str, range(clips))), tuple(groups or [None] * clips)
        own: list[dict[Key, ClipScores | None]] = [
            {(0, None): ClipScores(ids, names, tuple(metrics.influence.tolist()))}
            for metrics in found
            if metrics.influence is not None
        ]
        p = compare_runs(values[0], values[1], own[0], own[1])["p"]
        rejected += p is not None and p < 0.05
    return make_test_trial("one run each, mAP", clips, speakers, gain, rejected, experiments)


def shift_speakers(
    groups: list[str] | None, rng: np.random.Generator
) -> Float[np.ndarray, "n c"] | float:
    """Draw the shift of the scores of each class by the speaker of each clip."""
    if groups is None:
        return 0.0
    names = list(dict.fromkeys(groups))
    shift = SPEAKER * rng.normal(size=(len(names), CLASSES))
    return shift[[names.index(name) for name in groups]]


def make_test_trial(
    design: str, clips: int, speakers: int | None, gain: float, rejected: int, experiments: int
) -> Trial:
    """Return the row of tests."""
    share = f"{rejected / experiments:.3f}"
    return Trial("test", design, clips, speakers or "", f"{gain:+.2f}", share, "", "", experiments)
