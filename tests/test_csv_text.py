"""Exported CSV: no cell is a formula, numbers stay numbers, the text comes back."""

import csv
import io
import os
from pathlib import Path

import pytest

from aatjax.inference.prediction import Prediction
from aatjax.inference.prediction_formats import format_prediction
from aatjax.inference.segment_formats import format_segments
from aatjax.inference.segmentation import Segment, Track
from aatjax.io.csv_text import escape_path, escape_text, format_csv_rows

FORMULAS = ["=cmd|'/c calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=1", "'=1"]
FORMULAS += ["-", "--x", "+49 30/1", "-inf", "-nan", "\uff1d1", "=\udcff"]
TEXTS = ["dog", "it's", "'quoted'", "", "a=b", "x-y", "1e5", "-1", "+2.5", "-1.5e-3", "0", "nan"]


@pytest.mark.parametrize("text", FORMULAS)
def test_what_a_spreadsheet_would_run_is_text_for_it(text: str) -> None:
    escaped = escape_text(text)
    assert escaped == f"'{text}"
    assert escaped != escape_text(escaped) and escaped.removeprefix("'") == text


@pytest.mark.parametrize("text", TEXTS)
def test_other_text_and_numbers_are_unchanged(text: str) -> None:
    assert escape_text(text) == text


def test_cells_come_back_and_numbers_stay_numbers() -> None:
    cells = [*FORMULAS, *TEXTS, 'a,"b"\n;c']
    text = format_csv_rows([cells, [-1.5, 3, None, -0.0]])
    found = list(csv.reader(io.StringIO(text, newline="")))
    assert [one[1:] if one[1:] in FORMULAS else one for one in found[0]] == cells
    assert found[1] == ["-1.5", "3", "", "-0.0"]


@pytest.mark.parametrize("name", ["=1.wav", "-a b.wav", "@x/y.wav", "+.wav", "\t.wav"])
def test_a_path_stays_a_path_of_the_same_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(b"")
    escaped = escape_path(name)
    assert escape_text(escaped) == escaped and os.path.samefile(escaped, name)
    for other in ("a.wav", "/=x.wav", "./=x.wav", "../-x", "'=x.wav"):
        assert escape_path(other) == other


def test_predictions_and_segments_hold_no_formulas() -> None:
    classes = ("=evil()", "-1")
    prediction = Prediction("=1.wav", classes[0], 0.75, (0.75, 0.25), classes, ())
    track = Track("-1.wav", 1.0, (Segment(0.0, 0.5, "@evil", 0.5, False),))
    texts = format_prediction(prediction, "csv"), format_segments(track, "csv")
    rows = [row for text in texts for row in csv.reader(io.StringIO(text, newline=""))]
    assert rows[0][-2:] == ["'=evil()", "-1"]
    assert rows[1] == ["./=1.wav", "'=evil()", "0.750000", "0", "0.750000", "0.250000"]
    assert rows[3][0] == "./-1.wav" and rows[3][3] == "'@evil"
