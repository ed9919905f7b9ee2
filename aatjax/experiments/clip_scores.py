"""Test figures of several runs: their mean with an interval over test clips and over runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aatjax.data.source import Source
from aatjax.errors import DataError, UsageError
from aatjax.io.json_fields import read_json_fields
from aatjax.io.json_file import read_json_object, write_json
from aatjax.train.metrics.intervals import Units, estimate_interval, mean_interval
from aatjax.train.metrics.results import Metrics, format_clips

CLIP_SCORES = "test_clips.json"
Key = tuple[int, str | None]
"""Repeat (a seed, or a draw of the training clips), and fold."""


@dataclasses.dataclass(frozen=True)
class ClipScores:
    """The test clips of one run, with the influence of each on the run's figure.

    Attributes:
        ids: names of the clips.
        groups: recording or speaker of each, or None.
        influence: see `Metrics.influence`.
    """

    ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    influence: tuple[float, ...]


def write_clip_scores(folder: Path, metrics: Metrics, source: Source) -> None:
    """Write the clip scores of a run to its folder; nothing where its figure is not defined."""
    if metrics.influence is None:
        return
    scores = ClipScores(
        tuple(clip.id for clip in source.clips),
        tuple(clip.group for clip in source.clips),
        tuple(metrics.influence.tolist()),
    )
    write_json(folder / CLIP_SCORES, dataclasses.asdict(scores))


def read_clip_scores(folder: Path) -> ClipScores | None:
    """Read the clip scores of a run; None where it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / CLIP_SCORES
    if not path.exists():
        return None
    try:
        found = read_json_fields(
            "clip scores", read_json_object(path, advice="delete it"), ClipScores
        )
    except UsageError as error:
        raise DataError(f"{path}: {error}: delete it") from error
    if not len(found.ids) == len(found.groups) == len(found.influence) > 0:
        raise DataError(f"{path}: holds no clip scores: delete it")
    return found


@dataclasses.dataclass(frozen=True)
class PooledClips:
    """The clips of several runs, the mean over the runs of one figure's influence on each.

    Attributes:
        keys: (fold, clip) of each.
        groups: recording or speaker of each, or None.
        influence: of each on the mean figure `[n]`.
    """

    keys: tuple[tuple[str | None, str], ...]
    groups: tuple[str | None, ...]
    influence: Float[np.ndarray, " n"]

    @property
    def units(self) -> Units:
        """The independent groups among the clips."""
        return Units(self.groups, len(self.keys))

    @property
    def counts(self) -> str:
        """The numbers of different clips and of their groups, as `320 clips, 64 groups`."""
        units = self.units
        return format_clips(len(self.keys), units.count if units.grouped else None)

    def estimate_variance(self) -> float:
        """Return the sampling variance of the mean figure, over clips or groups."""
        units = self.units
        sums = units.sum(self.influence)
        return float((sums**2).sum()) * units.count / max(1, units.count - 1)


def pool_clips(runs: Mapping[Key, ClipScores | None]) -> PooledClips | None:
    """Return the clips of all runs; None where a run has no clip scores."""
    per_fold = {fold: sum(other == fold for _, other in runs) for _, fold in runs}
    groups: dict[tuple[str | None, str], str | None] = {}
    total: dict[tuple[str | None, str], float] = {}
    for (_, fold), scores in runs.items():
        if scores is None:
            return None
        share = 1 / (per_fold[fold] * len(per_fold))
        for id, group, influence in zip(scores.ids, scores.groups, scores.influence, strict=True):
            groups[fold, id] = group
            total[fold, id] = total.get((fold, id), 0.0) + share * influence
    return PooledClips(tuple(total), tuple(groups.values()), np.array(list(total.values())))


def average_repeats(values: Mapping[Key, float]) -> Float[np.ndarray, " k"]:
    """Return one value per fold, its repeats averaged, or one per repeat of one division."""
    folds = list(dict.fromkeys(fold for _, fold in values))
    if len(folds) < 2:
        return np.array(list(values.values()), np.float64)
    return np.array([np.mean([v for (_, of), v in values.items() if of == fold]) for fold in folds])


@dataclasses.dataclass(frozen=True)
class Spread:
    """How uncertain the mean figure of several runs is, over test clips and over runs.

    Folds have different test clips, so that the variance between them contains that over clips:
    the larger reach of the two holds. Repeats have the same test clips: the two add up, each with
    its own quantile of Student's t (after Cochran and Cox 1950), which keeps the level where there
    are only two or three repeats.

    Attributes:
        clips: variance of the mean over test clips or their groups.
        groups: number of these.
        between: variance of the mean by the differences between runs.
        runs: folds, or repeats of one division.
        folds: whether the runs are folds.
    """

    clips: float
    groups: int
    between: float
    runs: int
    folds: bool

    @classmethod
    def measure(cls, values: Mapping[Key, float], clips: float, groups: int) -> Spread:
        """Return the spread of figures by repeat and fold, given their variance over clips."""
        sample = average_repeats(values)
        runs = len(sample)
        between = float(sample.var(ddof=1)) / runs if runs > 1 else 0.0
        return cls(clips, groups, between, runs, len({fold for _, fold in values}) > 1)

    def list_variances(self, p: float) -> list[tuple[float, float]]:
        """Return variances with their degrees of freedom; at level p the larger reach holds."""
        clips, freedom = self.clips, self.groups - 1
        if not self.between:  # one run, or equal ones, which show no spread
            return [(clips, freedom)]
        if self.folds:
            return [(clips, freedom), (self.between, self.runs - 1)]
        ratio = find_t(p, self.runs - 1) / find_t(p, freedom)
        return [(clips + ratio**2 * self.between, freedom)]

    def compute_reach(self, p: float) -> float:
        """Return half the width of the interval of level 1 - p."""
        return max(find_t(p, f) * math.sqrt(v) for v, f in self.list_variances(p))

    def compute_p(self, change: float) -> float:
        """Return the two-sided p at which the interval around `change` ends at zero."""
        from scipy import optimize

        least, most = 1e-12, 1 - 1e-9
        if abs(change) <= self.compute_reach(most):
            return 1.0
        if abs(change) >= self.compute_reach(least):
            return least
        found: Any = optimize.brentq(lambda p: self.compute_reach(p) - abs(change), least, most)
        return float(found)


def find_t(p: float, freedom: float) -> float:
    """Return the two-sided quantile of Student's t."""
    from scipy import special

    return float(special.stdtrit(freedom, 1 - p / 2))


def summarise_runs(
    values: Mapping[Key, float], scores: Mapping[Key, ClipScores | None]
) -> tuple[float, float | None, float | None]:
    """Return the mean figure of several runs with its 95 % interval.

    The interval is `estimate_interval` for the variances over test clips (or their groups) and over
    runs, see `Spread`; without clip scores Student's t over folds or repeats.
    """
    pooled = pool_clips(scores)
    if pooled is None:
        return mean_interval(average_repeats(values))
    mean, units = float(average_repeats(values).mean()), pooled.units
    if units.count < 2:
        return mean, None, None
    spread = Spread.measure(values, pooled.estimate_variance(), units.count)
    bounds = [
        estimate_interval(
            mean, variance, clips=len(pooled.keys), units=units.count, freedom=freedom
        )
        for variance, freedom in spread.list_variances(0.05)
    ]
    defined = [pair for pair in bounds if pair is not None]
    return mean, min(low for low, _ in defined), max(high for _, high in defined)
