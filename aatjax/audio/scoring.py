"""The score of a clip: which of its windows count, and how their logits become those of the clip.

A clip that is longer than the model's input is cut into windows (`aatjax.audio.windows`). The
probabilities of its windows are pooled over time, and the pooled probabilities are written as
logits again, so that a clip of one window has the logits of that window. Everything that follows
(metrics, temperature, thresholds, conformal sets) is defined on the logits of clips; a temperature
therefore never changes which class is the most probable one.

Windows without sound do not count; a clip without sound, or of one frame (25 ms) or less, has no
score.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int16, Integer

from aatjax.audio.waveform import FRAME, SILENCE
from aatjax.errors import Range, UsageError, check_fields

WindowPooling = Literal["mean", "max", "attention", "first"]

LONG_ENOUGH = 0.5  # of the longest window: shorter ones, mostly padding, are not looked at by max
MOST_SHARPNESS = 100.0


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the logits of a clip are made of those of its windows.

    Attributes:
        pooling: of the windows' probabilities, per class. `mean` weighted by the windows' length;
            `max`; `attention`, the mean weighted by length * exp(sharpness * probability) as in
            the adaptive pooling of McFee, Salamon and Bello 2018 (eq. 7), from 0 (`mean`) towards
            `max` as the sharpness grows; `first`, the first window with sound alone.
        hop: seconds between the starts of windows; None for windows that do not overlap.
        sharpness: of `attention`; training learns it from the validation clips.
    """

    pooling: WindowPooling = "mean"
    hop: Annotated[float, Range(above=0)] | None = None
    sharpness: Annotated[float, Range(0, MOST_SHARPNESS)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "scoring: ")

    def pool(
        self,
        logits: Float[np.ndarray, "w c"],
        lengths: Sequence[int] | Integer[np.ndarray, " w"],
        multi_label: bool,
    ) -> Float[np.ndarray, " c"]:
        """Return the logits of a clip `[c]` from those of its windows with sound.

        Args:
            logits: one row per window, in time.
            lengths: samples of each window.
            multi_label: sigmoid instead of softmax.

        Raises:
            UsageError: no window.
        """
        if not len(logits):
            raise UsageError("a clip without a window has no score")
        if self.pooling == "first" or len(logits) == 1:
            return np.asarray(logits[0])
        scores, weight = np.asarray(logits, np.float64), np.asarray(lengths, np.float64)[:, None]
        yes, no = _log_probabilities(scores, multi_label)
        if self.pooling == "max":
            best = np.where(weight >= LONG_ENOUGH * weight.max(), yes, -np.inf).argmax(axis=0)
            columns = np.arange(yes.shape[1])
            found = yes[best, columns], no[best, columns]
        else:
            log_weight = np.log(weight)
            if self.pooling == "attention":
                log_weight = log_weight + self.sharpness * np.exp(yes)
            log_weight = log_weight - np.logaddexp.reduce(log_weight, axis=0)
            found = [np.logaddexp.reduce(log_weight + part, axis=0) for part in (yes, no)]
        return (found[0] - found[1] if multi_label else found[0]).astype(logits.dtype)


def _log_probabilities(
    scores: Float[np.ndarray, "w c"], multi_label: bool
) -> tuple[Float[np.ndarray, "w c"], Float[np.ndarray, "w c"]]:
    """Return the logarithms of p and, of a multi-label task, of 1 - p."""
    if multi_label:
        return -np.logaddexp(0.0, -scores), -np.logaddexp(0.0, scores)
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return log_p, np.zeros_like(log_p)


def is_silent(samples: Int16[np.ndarray, " n"]) -> bool:
    """Return whether samples hold no sound: all within `SILENCE` of each other."""
    return not samples.size or int(samples.max()) - int(samples.min()) <= SILENCE


def explain_unscored(samples: int, has_sound: bool) -> str | None:
    """Return why a clip has no score; None for one that has.

    Args:
        samples: of the clip; shorter ones than a frame are padded to one.
        has_sound: whether any of its windows holds sound.
    """
    if not has_sound:
        return "silent"
    return "too short: 25 ms or less" if samples <= FRAME else None


def pool_clips(
    scoring: Scoring,
    logits: Float[np.ndarray, "w c"],
    owner: Integer[np.ndarray, " w"],
    lengths: Integer[np.ndarray, " w"],
    sounding: Bool[np.ndarray, " w"],
    clips: int,
    multi_label: bool,
) -> Float[np.ndarray, "n c"]:
    """Return the logits `[n, c]` of clips from those of all windows; NaN for clips without sound.

    Args:
        scoring: how windows are pooled.
        logits: one row per window.
        owner: the clip of each window, ascending.
        lengths: samples of each window.
        sounding: whether each window holds sound.
        clips: number of clips.
        multi_label: sigmoid instead of softmax.
    """
    pooled = np.full((clips, logits.shape[1]), np.nan, np.float32)
    borders = np.searchsorted(owner, np.arange(clips + 1))
    for clip, (low, high) in enumerate(itertools.pairwise(borders)):
        rows = low + np.flatnonzero(sounding[low:high])
        if rows.size:
            pooled[clip] = scoring.pool(logits[rows], lengths[rows], multi_label)
    return pooled


def fit_sharpness(
    scoring: Scoring,
    windows: Sequence[tuple[Float[np.ndarray, "_ c"], Integer[np.ndarray, " _"]]],
    targets: Float[np.ndarray, "n c"],
    multi_label: bool,
) -> Scoring:
    """Return the scoring with the sharpness of least cross-entropy on labelled clips.

    One number is learned for all classes. Clips of one window do not depend on it; where there is
    no other, it stays 0.

    Args:
        scoring: with pooling `attention`.
        windows: logits and lengths of the windows with sound, per clip.
        targets: `[n, c]`, NaN where unknown.
        multi_label: sigmoid instead of softmax.
    """
    from scipy import optimize

    chosen = [row for row, (logits, _) in enumerate(windows) if len(logits) > 1]
    if not chosen:
        return dataclasses.replace(scoring, sharpness=0.0)

    def measure(sharpness: float) -> float:
        tried = dataclasses.replace(scoring, sharpness=float(sharpness))
        total = 0.0
        for row in chosen:
            logits, lengths = windows[row]
            pooled = tried.pool(np.asarray(logits, np.float64), lengths, multi_label)[None]
            yes, no = _log_probabilities(pooled, multi_label)
            target = targets[row]
            loss = -(target * yes[0] + (1 - target) * no[0])
            total += float(np.nansum(loss))
        return total

    grid = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, MOST_SHARPNESS])
    losses = [measure(value) for value in grid]
    best = int(np.argmin(losses))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found: optimize.OptimizeResult = optimize.minimize_scalar(
        measure, bounds=(low, high), method="bounded"
    )
    sharpness = float(found.x) if found.fun < losses[best] else float(grid[best])
    return dataclasses.replace(scoring, sharpness=sharpness)
