"""Segments: smoothing, thresholds, durations and gaps by hand; every format read back."""

import csv
import io
import json
from typing import Any

import numpy as np
import pytest

from aatjax.errors import UsageError
from aatjax.inference.calibration import Calibration
from aatjax.inference.segment_formats import format_clock, format_segments
from aatjax.inference.segmentation import Segment, SegmentationRules, Segmenter, Track

SECOND = 16000
AB = ("a", "b")


def segment_windows(
    probabilities: np.ndarray,
    classes: tuple[str, ...],
    rules: SegmentationRules,
    *,
    samples: int,
    uncalibrated: np.ndarray | None = None,
    **options: Any,
) -> tuple[Segment, ...]:
    """Segments of all windows of a file at once."""
    segmenter = Segmenter(classes, rules, **options)
    segmenter.push(probabilities, probabilities if uncalibrated is None else uncalibrated)
    return segmenter.finish(samples)


def one(
    track: list[float],
    rules: SegmentationRules,
    *,
    size: float = 1,
    step: float = 1,
    end: float | None = None,
    **more: Any,
) -> list[tuple[float, float, str]]:
    """Segments of one class of a multi-label task."""
    rows = np.array(track)[:, None]
    last = (len(track) - 1) * step + size if end is None else end
    found = segment_windows(
        rows,
        ("a",),
        rules,
        size=round(size * SECOND),
        step=round(step * SECOND),
        samples=round(last * SECOND),
        multi_label=True,
        **more,
    )
    return [(s.start, s.end, s.label) for s in found]


def single(
    best: str, rules: SegmentationRules | None = None, p: float = 0.9, **more: Any
) -> list[tuple[float, float, str]]:
    """Segments of a single-label track, one window a second; '?' is a window that is unsure."""
    table = {"a": (p, 1 - p), "b": (1 - p, p), "?": (0.52, 0.48)}
    found = segment_windows(
        np.array([table[c] for c in best]),
        AB,
        rules or SegmentationRules(),
        size=SECOND,
        step=SECOND,
        samples=len(best) * SECOND,
        **more,
    )
    return [(s.start, s.end, s.label) for s in found]


def spans(found: list[tuple[float, float, str]]) -> list[tuple[float, float]]:
    return [(start, end) for start, end, _ in found]


def test_one_threshold() -> None:
    assert spans(one([0.1, 0.6, 0.5, 0.49, 0.7], SegmentationRules())) == [(1, 3), (4, 5)]
    assert spans(one([0.1, 0.6, 0.5, 0.49, 0.7], SegmentationRules(on=0.6))) == [(1, 2), (4, 5)]
    assert one([0.1, 0.2], SegmentationRules()) == []
    assert one([0.9], SegmentationRules()) == [(0, 1, "a")]


def test_two_thresholds() -> None:
    track = [0.5, 0.7, 0.5, 0.4, 0.39, 0.5, 0.7]
    assert spans(one(track, SegmentationRules(on=0.7, off=0.4))) == [(1, 4), (6, 7)]


def test_a_threshold_a_class() -> None:
    rows = np.array([[0.3, 0.3], [0.6, 0.6], [0.3, 0.3]])
    rules = SegmentationRules(on=(0.2, 0.6), off=(0.1, 0.3))
    found = segment_windows(
        rows, AB, rules, size=SECOND, step=SECOND, samples=3 * SECOND, multi_label=True
    )
    assert [(s.start, s.end, s.label) for s in found] == [(0, 3, "a"), (1, 3, "b")]
    assert found[0].probability == pytest.approx(0.4)
    assert found[1].probability == pytest.approx(0.45)


def test_thresholds_of_the_artefact() -> None:
    calibration = Calibration(1.0, (0.3,), 1.0, 0.9, 10)
    track = [0.1, 0.4, 0.6]
    assert spans(one(track, SegmentationRules(), calibration=calibration)) == [(1, 3)]
    assert spans(one(track, SegmentationRules(on=0.5), calibration=calibration)) == [(2, 3)]


PEAK_AND_DIP = [0.0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (SegmentationRules(on=0.6), [(2, 3), (5, 7), (8, 10)]),
        (SegmentationRules(on=0.6, smooth=3), [(5, 10)]),  # the peak goes, the dip is filled
        (SegmentationRules(on=0.6, smooth=2.1), [(5, 10)]),
        (SegmentationRules(on=0.6, smooth=3, kind="mean"), [(5, 10)]),
        (SegmentationRules(on=0.3, smooth=3, kind="mean"), [(1, 11)]),
        (SegmentationRules(on=0.6, smooth=5), [(4, 5), (6, 9)]),
    ],
)
def test_smoothing(rules: SegmentationRules, expected: list[tuple[float, float]]) -> None:
    assert spans(one(PEAK_AND_DIP, rules)) == expected


def test_the_ends_are_smoothed_over_what_is_there() -> None:
    assert spans(one([0.9, 0.3, 0.0, 0.0, 0.9], SegmentationRules(on=0.6, smooth=3))) == [(0, 1)]
    assert spans(one([0.9], SegmentationRules(on=0.6, smooth=3))) == [(0, 1)]


def test_smoothing_that_does_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="give at least 2 s"):
        one([0.1, 0.2], SegmentationRules(smooth=1.9))


def test_gaps_and_durations() -> None:
    track = [1.0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert spans(one(track, SegmentationRules())) == [(0, 1), (2, 3), (5, 6), (9, 10)]
    assert spans(one(track, SegmentationRules(gap=1))) == [(0, 3), (5, 6), (9, 10)]
    assert spans(one(track, SegmentationRules(gap=2))) == [(0, 6), (9, 10)]
    assert spans(one(track, SegmentationRules(gap=1, min_duration=3))) == [(0, 3)], (
        "gaps come first"
    )
    assert spans(one(track, SegmentationRules(min_duration=1))) == [(0, 1), (2, 3), (5, 6), (9, 10)]
    assert one(track, SegmentationRules(min_duration=1.001)) == []


def test_a_probability_is_the_mean_of_what_was_heard() -> None:
    found = segment_windows(
        np.array([[0.8], [0.1], [0.6]]),
        ("a",),
        SegmentationRules(gap=1),
        size=SECOND,
        step=SECOND,
        samples=2 * SECOND + SECOND // 2,
        multi_label=True,
    )
    assert [(s.start, s.end) for s in found] == [(0, 2.5)]
    assert found[0].probability == pytest.approx((0.8 + 0.5 * 0.6) / 1.5)


def test_borders_lie_between_centres() -> None:
    # Windows of 2 s every half second: centres at 1, 1.5, 2 and 2.5 s, the file ends at 3.5 s.
    track = [1.0, 0, 1, 0]
    assert spans(one(track, SegmentationRules(), size=2, step=0.5)) == [(0, 1.25), (1.75, 2.25)]
    assert spans(one([0, 0, 0, 1.0], SegmentationRules(), size=2, step=0.5)) == [(2.25, 3.5)]
    # No overlap, a last window of 0.3 s.
    assert spans(one([0, 1.0], SegmentationRules(), size=1, step=1, end=1.3)) == [(1, 1.3)]
    # Holes between the windows: each stands for the half of the hole beside it.
    assert spans(one([0, 1.0, 0], SegmentationRules(), size=1, step=2)) == [(1.5, 3.5)]


def test_a_single_label_is_a_track() -> None:
    assert single("aabba") == [(0, 2, "a"), (2, 4, "b"), (4, 5, "a")]
    assert single("aabaa", SegmentationRules(smooth=3)) == [(0, 5, "a")]
    # A gap is closed over what was left out, never over another class.
    assert single("aabaa", SegmentationRules(gap=1)) == [(0, 2, "a"), (2, 3, "b"), (3, 5, "a")]
    assert single("aabaa", SegmentationRules(min_duration=2)) == [(0, 2, "a"), (3, 5, "a")]
    assert single("aabaa", SegmentationRules(min_duration=2, gap=1)) == [(0, 5, "a")]
    assert single("aabaa", SegmentationRules(min_duration=2, gap=0.9)) == [(0, 2, "a"), (3, 5, "a")]


def test_unsure_where_the_decision_says_so() -> None:
    calibration = Calibration(1.0, None, 0.55, 0.9, 20)  # possible from 0.45 on
    assert single("aa?b", calibration=calibration) == [(0, 2, "a"), (2, 3, "unsure"), (3, 4, "b")]
    assert single("aa?b") == [(0, 3, "a"), (3, 4, "b")]
    assert single("aa?a", SegmentationRules(gap=1), calibration=calibration) == [(0, 4, "a")]
    assert single("a??a", SegmentationRules(gap=1), calibration=calibration) == [
        (0, 1, "a"),
        (1, 3, "unsure"),
        (3, 4, "a"),
    ]
    # The set is made of probabilities at temperature 1, not of the calibrated ones.
    found = segment_windows(
        np.array([[0.9, 0.1]]),
        AB,
        SegmentationRules(),
        size=SECOND,
        step=SECOND,
        samples=SECOND,
        calibration=calibration,
        uncalibrated=np.array([[0.5, 0.5]]),
    )
    assert found == (Segment(0, 1, "unsure", 0.9, True),)


def test_a_threshold_takes_the_place_of_the_decision() -> None:
    calibration = Calibration(1.0, None, 1.0, 0.9, 3)  # everything is possible
    assert single("ab", calibration=calibration) == [(0, 2, "unsure")]
    assert single("a?b", SegmentationRules(on=0.6), calibration=calibration) == [
        (0, 1, "a"),
        (1, 2, "unsure"),
        (2, 3, "b"),
    ]
    assert single("a?b?", SegmentationRules(on=0.6, off=0.5)) == [
        (0, 2, "a"),
        (2, 3, "b"),
        (3, 4, "unsure"),
    ]


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 7], [2, 2, 7]])
@pytest.mark.parametrize("smooth", [0, 3, 6])
def test_how_windows_come_does_not_matter(pieces: list[int], smooth: float) -> None:
    rows = np.random.default_rng(0).random((11, 2))
    rules = SegmentationRules(smooth=smooth, gap=1)
    options: dict[str, Any] = {"size": 2 * SECOND, "step": SECOND, "multi_label": True}
    whole = segment_windows(rows, AB, rules, samples=12 * SECOND, **options)
    segmenter = Segmenter(AB, rules, **options)
    for part in np.split(rows, np.cumsum(pieces)[:-1]):
        segmenter.push(part, part)
    assert segmenter.finish(12 * SECOND) == whole


def test_only_what_smoothing_needs_is_kept() -> None:
    segmenter = Segmenter(
        AB, SegmentationRules(smooth=5), size=SECOND, step=SECOND, multi_label=True
    )
    for _ in range(100):
        segmenter.push(np.full((10, 2), 0.9), np.full((10, 2), 0.9))
    assert len(segmenter._rows) <= 6
    assert len(segmenter.finish(1000 * SECOND)) == 2


def test_no_windows_no_segments() -> None:
    assert (
        segment_windows(np.zeros((0, 2)), AB, SegmentationRules(), size=8, step=8, samples=0) == ()
    )


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ({"smooth": -1.0}, "smooth"),
        ({"gap": float("nan")}, "gap"),
        ({"min_duration": float("inf")}, "min_duration"),
        ({"on": 1.5}, "on=1.5"),
        ({"on": float("nan")}, "on=nan"),
        ({"off": 0.5}, "give both"),
        ({"on": 0.3, "off": 0.5}, "above where it begins"),
        ({"on": (0.1, 0.2, 0.3)}, "3 thresh"),
    ],
)
def test_rules_that_cannot_be(rules: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Segmenter(AB, SegmentationRules(**rules), size=SECOND, step=SECOND)


# --- formats -------------------------------------------------------------------------------------

NAMES = ["plain.wav", 'a, "b"; c.wav', "line\nbreak\r.wav", "tab\there  ü.wav", "b\udcff.wav"]
LABELS = ("dog", 'big, "bad"\tcat\n', "ü 音")


def tracks() -> list[Track]:
    segments = tuple(
        Segment(i + 0.25, i + 1.0000004, label, 0.5 + i / 10) for i, label in enumerate(LABELS)
    )
    return [
        Track(name, 3600.5, (*segments, Segment(3, 4, "unsure", 0.4, True))) for name in NAMES
    ] + [Track("nothing.wav", 1.0, (), "cut off")]


def text(form: Any) -> str:
    return "".join(format_segments(track, form, first=i == 0) for i, track in enumerate(tracks()))


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(text("csv"), newline="")))
    assert len(rows) == 4 * len(NAMES)
    assert [row["file"] for row in rows[::4]] == NAMES
    assert tuple(row["label"] for row in rows[:3]) == LABELS
    assert [float(row["start"]) for row in rows[:4]] == [0.25, 1.25, 2.25, 3]
    assert [row["unsure"] for row in rows[:4]] == ["0", "0", "0", "1"]
    assert float(rows[1]["probability"]) == pytest.approx(0.6)


def test_json_a_line_a_file() -> None:
    lines = text("json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["path"] for one in found] == [*NAMES, "nothing.wav"]
    assert tuple(s["label"] for s in found[0]["segments"][:3]) == LABELS
    assert found[0]["segments"][3]["unsure"] is True and found[0]["seconds"] == 3600.5
    assert found[-1]["segments"] == [] and found[-1]["cut"] == "cut off"
    assert "cut" not in found[0]


def test_audacity() -> None:
    lines = format_segments(tracks()[0], "audacity").split("\n")
    rows = [line.split("\t") for line in lines[:-1]]
    assert lines[-1] == "" and [len(row) for row in rows] == [3] * 4
    assert [(float(a), float(b)) for a, b, _ in rows][:2] == [(0.25, 1), (1.25, 2)]
    assert [label for *_, label in rows] == ["dog", 'big, "bad" cat ', "ü 音", "unsure"]


def test_rttm() -> None:
    rows = [line.split() for line in text("rttm").splitlines()]
    assert len(rows) == 4 * len(NAMES) and {len(row) for row in rows} == {10}
    assert {row[0] for row in rows} == {"SPEAKER"} and {row[2] for row in rows} == {"1"}
    assert [row[1] for row in rows[::4]] == [
        "plain.wav",
        'a,_"b";_c.wav',
        "line_break_.wav",
        "tab_here__ü.wav",
        "b\udcff.wav",
    ]
    assert (float(rows[1][3]), float(rows[1][4])) == (1.25, 0.75)
    assert rows[1][5:] == ["<NA>", "<NA>", 'big,_"bad"_cat_', "<NA>", "<NA>"]


def test_table() -> None:
    lines = text("table").splitlines()
    assert len(lines) == len(NAMES) * 5 + 1, "one line a file and one a segment"
    assert lines[0] == "plain.wav  1:00:00.50, 4 segments"
    assert lines[1].split() == ["0:00:00.25", "0:00:01.00", "0.500", "dog"]
    assert lines[10].startswith(r"line\nbreak\r.wav") and lines[20].startswith(r"b\xff.wav")


def test_clock() -> None:
    assert [format_clock(s) for s in (0, 59.996, 3600, 36000.5)] == [
        "0:00:00.00",
        "0:01:00.00",
        "1:00:00.00",
        "10:00:00.50",
    ]


def test_another_format_is_refused() -> None:
    with pytest.raises((UsageError, TypeError)):
        format_segments(tracks()[0], "xml")  # type: ignore[arg-type]
