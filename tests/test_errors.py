"""Checks of dataclass fields by their annotations."""

import dataclasses
import math
from typing import Annotated, Literal

import numpy as np
import pytest

from aatjax.cli import main
from aatjax.cli.output import format_table
from aatjax.errors import Range, UsageError, check_fields, printable
from aatjax.inference.prediction import Prediction
from aatjax.inference.prediction_formats import format_prediction
from aatjax.inference.segment_formats import format_segments
from aatjax.inference.segmentation import Segment, Track
from aatjax.train.metrics.evaluate import compute_metrics


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("dog caf\u00e9 \u72d7 \u05d0\u0634", "dog caf\u00e9 \u72d7 \u05d0\u0634"),
        ("\x1b]0;title\x07\x9b31m\r\n\t", r"\x1b]0;title\x07\x9b31m\r\n\t"),
        ("\u202ea\u200b\u2066\ufeff\U000e0001", r"\u202ea\u200b\u2066\ufeff\U000e0001"),
        ("\udcff \ud800", r"\xff \ud800"),
    ],
)
def test_text_for_a_terminal_holds_nothing_that_acts_on_it(text, shown):
    assert printable(text) == shown == printable(shown)
    prediction = Prediction(text, text, 0.5, (0.5,), (text,), (), (), (text,), 0.9)
    silent = dataclasses.replace(prediction, label=None, reason=text)
    track = Track(text, 1.0, (Segment(0, 1, text, 0.5),))
    metrics = compute_metrics(np.eye(2), np.eye(2), classes=(text, "b"), multi_label=False)
    for table in (
        format_prediction(prediction, "table"),
        format_prediction(silent, "table"),
        format_segments(track, "table"),
        format_table([text], [[text]]),
        metrics.table(),
    ):
        assert shown in table and all(line.isprintable() for line in table.splitlines())


def test_an_error_reaches_the_terminal_as_one_printable_line(capsys):
    assert main.run(["\x1b[31m\u202e"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


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
