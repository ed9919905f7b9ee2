"""Decisions from logits: the calibration that an adapter file holds, and class probabilities."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float

from aatjax.errors import DataError, Range, UsageError, check_fields
from aatjax.io.json_fields import check_json_fields


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Temperature, thresholds and conformal quantile of a model, fitted on validation clips.

    Attributes:
        temperature: divisor of the logits; above 1 makes the model less confident.
        thresholds: of a multi-label task, the calibrated probability from which a class is given;
            None for a single-label task.
        quantile: a class is possible where its probability at temperature 1 is at least
            1 - quantile; 1 (the result of too few clips) makes every class possible.
        coverage: minimum share of clips whose true classes are all among the possible ones.
        clips: number of validation clips.
    """

    temperature: Annotated[float, Range(above=0)]
    thresholds: Annotated[tuple[float, ...], Range(0, 1)] | None
    quantile: Annotated[float, Range(0, 1)]
    coverage: Annotated[float, Range(0, 1)]
    clips: Annotated[int, Range(0)]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def multi_label(self) -> bool:
        """Whether a clip may have any number of classes."""
        return self.thresholds is not None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        fields = dataclasses.asdict(self)
        return {**fields, "thresholds": self.thresholds and list(self.thresholds)}

    @classmethod
    def from_json(cls, fields: Any, classes: int | None = None) -> Calibration:
        """Rebuild from the dictionary of `to_json`; unknown fields (later versions) are ignored.

        Args:
            fields: the dictionary.
            classes: required number of thresholds.

        Raises:
            DataError: a field is missing, of another type, or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            if isinstance(fields, dict):
                fields = {name: value for name, value in fields.items() if name in names}
            check_json_fields("decisions", fields, cls, most={"clips": 2**53})
            if missing := [name for name in names if name not in fields]:
                raise UsageError(f"decisions.{missing[0]} is missing")
            thresholds = fields["thresholds"]
            if thresholds is not None:
                thresholds = tuple(map(float, thresholds))
                if classes not in (None, len(thresholds)):
                    raise UsageError(f"{len(thresholds)} thresholds for {classes} classes")
            return cls(**{**fields, "thresholds": thresholds})
        except UsageError as error:
            raise DataError(f"decisions: damaged: {error}") from error


def compute_probabilities(
    logits: Float[np.ndarray, "b c"], temperature: float, multi_label: bool
) -> Float[np.ndarray, "b c"]:
    """Return softmax(logits / T), or sigmoid(logits / T) of a multi-label task."""
    # scipy.special has both, and takes as long to import as the model to run.
    scaled = logits / temperature
    if multi_label:
        return np.exp(-np.logaddexp(0.0, -scaled))
    raw = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return raw / raw.sum(axis=1, keepdims=True)
