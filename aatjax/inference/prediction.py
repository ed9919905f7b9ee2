"""Predictions: what a classifier returns for a file, and the logits of windows it is made of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from aatjax.audio.windows import Window


@dataclasses.dataclass(frozen=True)
class WindowPrediction:
    """Class probabilities of one window of a file, from `start` to `end` in seconds."""

    start: float
    end: float
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Classes of one file.

    Attributes:
        path: the file.
        label: the most probable class; None where the file has no score, see `reason`.
        probability: its probability; NaN without a score.
        probabilities: probability per class, pooled over the windows (`Scoring`).
        classes: class names.
        windows: probabilities per window.
        given: of a multi-label task, the classes above their thresholds; else the label alone.
        possible: classes among which the true ones are with probability `coverage`, the most
            probable first (see `aatjax.inference.calibration`).
        coverage: see `possible`.
        notes: what is odd with the file: silent, clipped, padded, truncated.
        reason: why it has no score: silent, or too short; None where it has.

    With validation clips in training the probabilities are calibrated; without, `given`, `possible`
    and `coverage` are None.
    """

    path: str
    label: str | None
    probability: float
    probabilities: tuple[float, ...]
    classes: tuple[str, ...]
    windows: tuple[WindowPrediction, ...]
    given: tuple[str, ...] | None = None
    possible: tuple[str, ...] | None = None
    coverage: float | None = None
    notes: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def unsure(self) -> bool | None:
        """Whether more classes are possible than given; None without calibration."""
        if self.possible is None or self.given is None:
            return None
        return set(self.possible) > set(self.given)

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the most probable classes with their probabilities; none without a score."""
        if self.label is None:
            return []
        order = np.argsort(self.probabilities)[::-1][:count]
        return [(self.classes[i], self.probabilities[i]) for i in order]

    def to_json(self, *, detail: bool = False) -> dict[str, Any]:
        """Return a plain dictionary, without the fields of calibration where there is none.

        Args:
            detail: with the probabilities of every window.
        """
        calibrated = {
            "given": list(self.given or ()),
            "unsure": self.unsure,
            "possible": list(self.possible or ()),
            "coverage": self.coverage,
        }
        return {
            "path": self.path,
            "label": self.label,
            "probability": None if self.label is None else self.probability,
            **({} if self.coverage is None else calibrated),
            "probabilities": None
            if self.label is None
            else dict(zip(self.classes, self.probabilities, strict=True)),
            "notes": list(self.notes),
            "reason": self.reason,
            "windows": [self._describe(window, detail) for window in self.windows],
        }

    def _describe(self, window: WindowPrediction, detail: bool) -> dict[str, Any]:
        fields = {
            "start": window.start,
            "end": window.end,
            "label": self.classes[int(np.argmax(window.probabilities))],
            "probability": max(window.probabilities),
        }
        if detail:
            fields["probabilities"] = dict(zip(self.classes, window.probabilities, strict=True))
        return fields

    def __str__(self) -> str:
        if self.label is None:
            return f"{self.path}: no class ({self.reason})"
        return f"{self.path}: {self.label} ({self.probability:.3f})"


@dataclasses.dataclass(frozen=True)
class WindowLogits:
    """The logits of the windows of one file, in time.

    Attributes:
        logits: `[w, c]`.
        spans: first and last sample of each window.
        silent: whether each holds no sound.
    """

    logits: Float[np.ndarray, "w c"]
    spans: tuple[tuple[int, int], ...]
    silent: Bool[np.ndarray, " w"]

    @classmethod
    def join(cls, parts: Sequence["WindowLogits"]) -> "WindowLogits":
        """Join the windows of one file."""
        spans = tuple(span for part in parts for span in part.spans)
        silent = np.concatenate([part.silent for part in parts])
        return cls(np.concatenate([part.logits for part in parts]), spans, silent)

    @classmethod
    def from_windows(
        cls, logits: Float[np.ndarray, "w c"], windows: Sequence[Window]
    ) -> "WindowLogits":
        """Collect the spans of the windows that the logits are of."""
        spans = tuple(window.span for window in windows)
        return cls(logits, spans, np.array([window.silent for window in windows], bool))
