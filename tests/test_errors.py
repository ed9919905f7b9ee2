"""Checks of dataclass fields by their annotations."""

import dataclasses
import math
from typing import Annotated, Literal

import numpy as np
import pytest

from aatjax.errors import Range, UsageError, check_fields


@dataclasses.dataclass(frozen=True)
class Mixup:
    prob: Annotated[float, Range(0, 1)] = 0.5
    alpha: Annotated[float, Range(above=0)] = 10.0
    every: Annotated[int, Range(1)] | None = None
    decay: Annotated[float | None, Range(above=0, below=1)] = None
    sizes: Annotated[tuple[int, ...], Range(1, 8)] = (1, 2)
    domain: Literal["wave", "features"] | None = "wave"
    channel: Literal["mean"] | Annotated[int, Range(0)] = "mean"
    note: str | Literal["x"] = ""

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prob=1.5), "Mixup prob=1.5 must be at least 0 and at most 1"),
        (dict(prob=math.nan), "prob=nan must be a finite number, at"),
        (dict(prob=True), "prob=True must be a finite number, at"),
        (dict(prob=None), "prob=None must be a finite number, at"),
        (dict(prob="half"), "prob='half' must be a finite number, at"),
        (dict(alpha=0), "alpha=0 must be above 0"),
        (dict(alpha=math.inf), "alpha=inf must be"),
        (dict(every=0), "every=0 must be at least 1"),
        (dict(every=1.5), "every=1.5 must be a whole number, at least 1"),
        (dict(decay=1.0), "decay=1.0 must be above 0 and below 1"),
        (dict(sizes=(4, 9)), r"sizes=\(4, 9\) must be at least 1 and at most 8"),
        (dict(domain="mel"), "domain='mel' is not one of wave, features"),
        (dict(channel=-1), "channel=-1 must be at least 0"),
        (dict(channel="left"), "channel='left' must be"),
    ],
)
def test_a_value_outside_its_annotation_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        Mixup(**changes)


def test_what_the_annotation_allows_passes():
    Mixup(prob=1, every=np.int64(3), decay=np.float32(0.5), sizes=(), domain=None, note="y")
    Mixup(prob=0.0, alpha=1e-9, channel=2)


def test_the_prefix_stands_before_the_name_of_the_field():
    @dataclasses.dataclass
    class Data:
        shots: Annotated[int, Range(1)] = 0

    with pytest.raises(UsageError, match=r"^data\.shots=0 must be"):
        check_fields(Data(), "data.")
