"""The report: the numbers of `aatjax eval`, no scripts or network, escaped names, warnings."""

import base64
import csv
import dataclasses
import html.parser
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest
import soundfile
from flax import nnx
from jinja2 import UndefinedError
from markupsafe import Markup
from tiny_model import tiny_config

from aatjax import surgery
from aatjax.cli.main import run
from aatjax.config import Config, Data, Model
from aatjax.configs.default import config as default
from aatjax.convert import write_native
from aatjax.errors import DataError, UsageError
from aatjax.experiments.evaluate import evaluate_adapter
from aatjax.experiments.run import train
from aatjax.inference.calibration import (
    Calibration,
    apply_calibration,
    compute_reliability,
    fit_calibration,
)
from aatjax.models.ast import AST
from aatjax.petl.dense_moa import DenseMoA
from aatjax.petl.lora import LoRA
from aatjax.petl.soft_moa import SoftMoA
from aatjax.reports.html import charts
from aatjax.reports.html.collect import Evaluation, ReportData, collect_report
from aatjax.reports.html.page import clean, join_names, render_page
from aatjax.reports.html.report import rank_confusions, render_report
from aatjax.train.adapter_file import find_adapter, load_adapter, read_info
from aatjax.train.evaluation import evaluate, score_clips
from aatjax.train.training import Training

EVIL = "<script>alert(1)</script>"
CLASSES = (EVIL, "\"onload='x' <b>&amp;", "plain")
NAME = '"><img src=x onerror=alert(1)> {}.wav'
TINY = tiny_config(num_classes=2)
LARGEST = 3_000_000
TIMES_MEAN = np.array([[0.25, np.nan], [1.0, 9.0], [4.0, 0.0]])
COMPARE: dict[str, Any] = {
    "best": "b",
    "mean": 1.0,
    "trainable": 3,
    "rows": [],
    "notes": [],
    "charts": [],
    "command": "x",
}


class Page(html.parser.HTMLParser):
    """What is in a document: elements with their attributes, text, and whether tags are paired."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in ("meta", "img", "br"):
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def check(text: str) -> Page:
    """Parses a report and checks what holds for every one."""
    assert text.startswith("<!doctype html>\n") and len(text.encode()) < LARGEST
    page = Page(text)
    assert not page.open, "every element is closed"
    for name, attributes in page.elements:
        assert name not in ("script", "iframe", "object", "embed", "link", "base", "form", "a")
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert name in ("use", "image", "img", "audio") and value is not None
                local = (
                    "#" if name == "use" else ("data:image/png;base64,", "data:audio/wav;base64,")
                )
                assert value.startswith(local)
            assert "url(" not in (value or "").replace("url(#", "")
    assert len(page.named("style")) == 1
    style = re.search("<style>(.*?)</style>", text, re.S)
    assert style and not re.search(r"url\(|@import|http|<", style.group(1))
    assert not re.search(r"https?://", text)
    policy = next(a for a in page.named("meta") if a.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'")
    assert any(a.get("name") == "viewport" for a in page.named("meta"))
    return page


def tone(label: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * 300 * 3**label * np.arange(12000) / 16000)
    return 0.3 * wave + 0.25 * rng.normal(size=12000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds with hostile names, and a small backbone."""
    root = tmp_path_factory.mktemp("<b>place&")
    rows = []
    for i in range(45):
        label = i % 3
        name = NAME.format(i)
        soundfile.write(root / name, tone(label if i % 5 else (label + 1) % 3, i), 16000)
        rows.append([name, CLASSES[label], ["train", "train", "valid", "test", "test"][i // 3 % 5]])
    with (root / "sounds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    model = AST(TINY, rngs=nnx.Rngs(0))
    write_native(root / "base.safetensors", surgery.arrays(model), TINY)
    return root


def config_of(place: Path, method: Any, **data: Any) -> Config:
    data = {"path": str(place / "sounds.csv"), "cache": str(place / "cache"), **data}
    return Config(
        petl=method,
        model=Model(source=str(place / "base.safetensors")),
        data=Data(**data),
        training=Training(epochs=2, batch_size=8, average=0.5),
    )


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    """A finished run, with findings of the data checks."""
    folder = place / "runs" / EVIL.replace("/", "\\")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aatjax.inference.calibration.LEAST_CLIPS", 9)
        train(config_of(place, SoftMoA(num_experts=2, reduction=8)), run_dir=folder, show=None)
    findings = [
        {"kind": EVIL, "severity": "high", "count": 3, "text": f"{EVIL} twice"},
        "odd",
        3,
        {"kind": "silent", "message": "said", "items": [{"subject": EVIL + "!"}, 7]},
    ]
    (folder / "diagnosis.json").write_text(json.dumps({"findings": findings}))
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> ReportData:
    return collect_report(folder)


@pytest.fixture(scope="module")
def page(data: ReportData) -> Page:
    return check(render_report(data, ["aatjax", "report", EVIL]))


def test_names_and_paths_are_text_and_nothing_else(page: Page, data: ReportData) -> None:
    evaluation = data.evaluation
    assert isinstance(evaluation, Evaluation) and evaluation.mistakes
    whole = "".join(page.text)
    for text in (*CLASSES, f"{EVIL} twice", EVIL + "!", evaluation.mistakes[0].clip, str(data.run)):
        assert text in whole
    assert "alert(1)" in whole
    for _, attributes in page.elements:
        assert "onerror" not in attributes and "onload" not in attributes


def test_the_numbers_are_those_of_eval(page: Page, data: ReportData, folder: Path) -> None:
    adapter = load_adapter(folder / "adapter.safetensors")
    metrics, source = evaluate_adapter(adapter)
    again = evaluate(adapter.model, source, adapter.frontend)
    assert metrics.to_json() == again.to_json(), "one step, one set of figures"
    evaluation = data.evaluation
    assert isinstance(evaluation, Evaluation)
    assert evaluation.metrics.to_json() == metrics.to_json()
    for shown, value in (
        ("accuracy", metrics.accuracy),
        ("mAP", metrics.mean_ap),
        ("macro-F1", metrics.macro_f1),
    ):
        assert page.row(shown)[1] == f"{value:.4f}"
    assert metrics.counts in "".join(page.text) and metrics.method in "".join(page.text)
    low, high = metrics.intervals["accuracy"] or (0, 0)
    assert page.row("accuracy")[2] == f"[{low:.4f}, {high:.4f}]"
    for one in metrics.per_class:
        rows = [row for row in page.rows if row and row[0] == one.name and len(row) == 7]
        assert len(rows) == 1
        row = rows[0]
        assert row[1] == str(one.support) and row[5] == (
            "n/a" if one.f1 is None else f"{one.f1:.3f}"
        )
        assert row[3].startswith(f"{one.recall:.3f} [")
        assert row[4].startswith(f"{one.average_precision:.3f} [")
    result = json.loads((folder / "result.json").read_text())
    assert result["test"]["accuracy"] == metrics.accuracy
    assert "in result.json" not in "".join(page.text)


def test_decisions_were_fitted_on_the_validation_clips(data: ReportData, place: Path) -> None:
    run_dir = data.run
    assert run_dir is not None and data.decisions is not None
    info = read_info(run_dir / "adapter.safetensors")
    assert info is not None and Calibration.from_json(info["decisions"], 3) == data.decisions
    assert json.loads((run_dir / "result.json").read_text())["decisions"] == info["decisions"]
    other = read_info(run_dir / "average.safetensors")
    assert other is not None and "decisions" not in other, "they are of the selected weights"
    from aatjax.experiments.partition import make_partition

    valid = make_partition(config_of(place, LoRA()).data).valid
    assert valid is not None and data.decisions.clips == len(valid) == 9
    adapter = data.adapter
    logits = score_clips(adapter.model, valid, adapter.frontend).logits
    fitted = fit_calibration(logits, valid.targets(), False)
    assert fitted.quantile == pytest.approx(data.decisions.quantile, abs=1e-6)
    assert fitted.temperature == pytest.approx(data.decisions.temperature, rel=1e-4)


def test_calibration_and_coverage_are_reported(page: Page, data: ReportData) -> None:
    evaluation, decisions = data.evaluation, data.decisions
    assert isinstance(evaluation, Evaluation) and decisions is not None
    applied = apply_calibration(evaluation.logits, decisions)
    error = compute_reliability(applied.probabilities, evaluation.targets, False).error
    assert page.row(f"T = {decisions.temperature:.2f}")[1] == f"{error:.4f}"
    covered = (applied.possible & (evaluation.targets == 1)).any(axis=1).mean()
    assert page.row("clips with the class in the set")[1].startswith(f"{covered:.3f} [")
    assert page.row("target coverage")[1] == "0.900"


def test_the_mistakes_are_the_most_confident_and_can_be_played(
    page: Page, data: ReportData
) -> None:
    evaluation, decisions = data.evaluation, data.decisions
    assert isinstance(evaluation, Evaluation) and decisions is not None
    p = apply_calibration(evaluation.logits, decisions).probabilities
    wrong = p.argmax(axis=1) != evaluation.targets.argmax(axis=1)
    most_confident = np.sort(p.max(axis=1)[wrong])[::-1][:8]
    np.testing.assert_allclose([one.probability for one in evaluation.mistakes], most_confident)
    players = page.named("audio")
    assert len(players) == len(evaluation.mistakes) > 0
    for one, player in zip(evaluation.mistakes, players, strict=True):
        data = base64.b64decode(str(player["src"]).partition(",")[2])
        samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        row = [clip.id for clip in evaluation.source.clips].index(one.clip)
        assert rate == 16000 and not one.cut
        np.testing.assert_array_equal(samples, evaluation.source.waveform(row))


def test_cost_and_provenance_are_reported(page: Page, data: ReportData) -> None:
    assert page.row("trained parameters")[1] == f"{data.counts.trainable:,}"
    assert page.row("training clips")[1] == "18"
    assert data.flops is not None and data.flops > 1e6
    assert page.row("jax")[1] == page.row("jax")[2] == jax.__version__
    commands = next(text for text in page.text if text.startswith("aatjax train "))
    assert "config.json" in commands and "aatjax report '<script>" in commands
    words = "".join(page.text)
    assert "Expert routing" in words and "blocks/0/attn/soft_moa" in words
    assert "Data checks" in words and "training loss" in words
    assert len([a for a in page.named("img") if a.get("class") == "map"]) == 2 * 2


def test_warnings_about_the_data_are_reported(data: ReportData) -> None:
    about = {
        "benchmark": "ESC-50 " + EVIL,
        "whole": False,
        "there": "400 of 2000 clips",
        "protocol": "petl",
        "paper": "arXiv 2402.00828",
        "run": "1, 1 of 5",
        "duplicates": 2,
        "leaks": f"3 recordings lie in two parts: {EVIL}",
        "shots": 8,
        "draw": 0,
        "chosen_on_test": "arXiv 2312.03694",
    }
    worse = {"data": about, "test": {"accuracy": 2.0}, "seconds": 1}
    page = check(render_report(dataclasses.replace(data, result=worse), ["aatjax"]))
    words = "".join(page.text)
    for text in (
        "SUBSET: 400 of 2000",
        "protocol petl (arXiv 2402.00828), run 1, 1 of 5",
        "LEAK: ",
        "2 pairs of duplicate clips in different parts",
        "few-shot: 8",
        "weights are chosen by the test clips",
        "accuracy is 2.000 in result.json",
        "these numbers are too good",
    ):
        assert text in words, text
    warned = sum(a.get("class") == "warn" for a in page.named("p"))
    assert warned >= 5
    odd = {"data": {"benchmark": EVIL}}  # as another version may have written it
    check(render_report(dataclasses.replace(data, result=odd), ["aatjax"]))
    check(render_report(dataclasses.replace(data, result={"data": 3}), ["aatjax"]))


def test_few_validation_clips_are_reported(data: ReportData) -> None:
    few = dataclasses.replace(data, decisions=Calibration(1.0, None, 1.0, 0.9, 5))
    words = "".join(check(render_report(few, ["aatjax"])).text)
    assert "5 validation clips are too few for a coverage of 90%" in words
    bare = dataclasses.replace(data, decisions=None)
    held = "not calibrated: 9 validation clips, 20 are needed"
    for about, words in (({}, "No validation clips were held out"), ({"calibration": held}, held)):
        result = {**data.result, "data": about}
        page = check(render_report(dataclasses.replace(bare, result=result), ["aatjax"]))
        assert words in "".join(page.text)


@pytest.mark.slow
def test_without_mixture_validation_or_run_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = place / "all.csv"
    text = (place / "sounds.csv").read_text()
    every.write_text(re.sub(",(train|valid|test)(\r?\n)", r"\2", text).replace(",split", ""))
    config = config_of(place, LoRA(), path=str(every), test_fraction=0.0)
    train(dataclasses.replace(config, name="x"), run_dir=tmp_path / "run", show=None)
    info = read_info(tmp_path / "run" / "adapter.safetensors")
    assert info is not None and "decisions" not in info
    (tmp_path / "run" / "diagnosis.json").write_text("{")
    found = collect_report(tmp_path / "run")
    assert isinstance(found.evaluation, str) and "no test clips" in found.evaluation
    page = check(render_report(found, ["aatjax", "report", "run"]))
    words = "".join(page.text)
    assert "not evaluated" in words and "Expert routing" not in words and "cannot be read" in words
    # The adapter alone, on sounds that are named; to the file that was asked for.
    alone = tmp_path / "moved.safetensors"
    (tmp_path / "run" / "adapter.safetensors").rename(alone)
    assert run(["report", str(alone), str(every), "--out", str(tmp_path / "o.html")]) == 0
    assert "o.html" in capsys.readouterr().out
    words = "".join(check((tmp_path / "o.html").read_text()).text)
    assert "(45 clips) on the given clips of 3 classes" in words and "Training curves" not in words
    assert run(["report", str(tmp_path / "run")]) == 65
    assert "has no adapter.safetensors" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "gone")]) == 65
    assert run(["report", str(alone), str(tmp_path / "gone")]) == 65
    assert run(["report", str(alone), "--clipz", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.slow
def test_several_labels_and_dense_gates(place: Path, tmp_path: Path) -> None:
    lines = ["path,labels,split"]
    for i in range(45):
        labels = "plain|other" if i % 3 == 0 else "plain" if i % 3 == 1 else "other"
        name = NAME.format(i).replace('"', '""')
        lines.append(f'"{name}",{labels},{["train", "train", "valid", "test", "test"][i // 3 % 5]}')
    (place / "many.csv").write_text("\n".join(lines) + "\n")
    config = config_of(place, DenseMoA(num_experts=2, reduction=8), path=str(place / "many.csv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aatjax.inference.calibration.LEAST_CLIPS", 9)
        train(config, run_dir=tmp_path / "run", show=None)
    found = collect_report(tmp_path / "run")
    evaluation = found.evaluation
    assert isinstance(evaluation, Evaluation) and evaluation.source.multi_label
    assert found.decisions is not None and found.decisions.thresholds is not None
    page = check(render_report(found, ["aatjax"]))
    words = "".join(page.text)
    assert page.row("mAP")[1] == f"{evaluation.metrics.mean_ap:.4f}"
    assert "clips with all classes in the set" in words and "Mean gates over" in words
    assert all(one.predicted.endswith((": yes", ": no")) for one in evaluation.mistakes)


@pytest.mark.slow
def test_the_default_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(default.data, train_clips=4, test_clips=2, valid_fraction=0.25)
    training = dataclasses.replace(default.training, epochs=1, batch_size=8)
    config = dataclasses.replace(default, data=data, training=training)
    result = train(config, run_dir="run", show=None)
    assert run(["report", "run"]) == 0
    page = check((tmp_path / "run" / "report.html").read_text())
    metrics, _ = evaluate_adapter(load_adapter(result.artefact))
    assert page.row("accuracy")[1] == f"{metrics.accuracy:.4f}"
    assert page.row("mAP")[1] == f"{metrics.mean_ap:.4f}"
    assert page.row("macro AUC")[2] == "[{:.4f}, {:.4f}]".format(
        *(metrics.intervals["macro_auc"] or ())
    )


# The parts.


def test_text_of_any_kind_is_escaped() -> None:
    assert clean("a\x00b\u202ec\udcff\nd") == "a\\x00b\\u202ec\\xff\nd"
    assert clean("a\n\u05d0 1") == "a\n\u2068\u05d0 1\u2069", "the order of the page is kept"
    assert join_names(["<b>", "\u05d0", "\u202e"]) == "&lt;b&gt;, \u2068\u05d0\u2069, \\u202e"
    assert clean(Markup("<i>")) == "<i>" and clean(3) == 3
    text = render_page("compare.html", **COMPARE, title=EVIL, heads=[EVIL, "\u202e"])
    page = check(text)
    assert page.rows[0] == [EVIL, "\\u202e"] and "script" not in {name for name, _ in page.elements}
    with pytest.raises(UndefinedError):
        render_page("compare.html", title="a value is missing")


def test_charts_keep_any_name_as_text() -> None:
    names = [EVIL, "$\\frac{1}{0}$", "\u72d7 \udcff", '"/><script>']
    chart = charts.draw_confusion(np.eye(4, dtype=int), names)
    page = Page(chart)
    words = "".join(page.text)
    assert all(charts.shorten(clean(name), 15) in words for name in names)
    assert {name for name, _ in page.elements} <= {
        *("svg", "g", "defs", "clippath", "path", "rect", "use", "text", "image")
    }
    assert page.named("svg")[0]["aria-label"] == "confusion matrix"
    assert "predicted class" in words and "share of the true class" in words
    curve = charts.Curve(EVIL, [1, 2], [0.5, 1])
    title = Page(str(charts.draw_curves([curve], y_label=EVIL))).named("svg")[0]["aria-label"]
    assert title == f"{EVIL} by epoch"


def test_charts_have_axes_and_follow_the_page() -> None:
    nan = float("nan")
    curves = [charts.Curve("a", [1, 2, 3], [1, nan, 2]), charts.Curve("b", [1], [nan])]
    chart = charts.draw_curves(curves, y_label="training loss")
    assert chart is not None and "nan" not in chart.lower().replace("nanum", "")
    assert "epoch" in chart and "training loss" in chart
    assert (
        "var(--c1)" in chart
        and "var(--c2)" in chart
        and not set(charts.VARIABLES) & set(re.findall("#[0-9a-f]{6}", chart))
    )
    assert charts.draw_curves(curves[1:], y_label="y") is None
    assert charts.draw_curves([charts.Curve("a", [1, 1], [3, 3])], y_label="y")
    ids = [re.findall(' id="([^"]+)"', str(charts.draw_use([1, 2], name))) for name in "ab"]
    assert ids[0] and not set(ids[0]) & set(ids[1]), "ids are unique in a page"


def test_maps_are_pngs_the_right_way_up_and_rise_in_lightness() -> None:
    file = io.BytesIO(base64.b64decode(charts.encode_map(TIMES_MEAN).partition(",")[2]))
    image = matplotlib.image.imread(file, format="png")[..., :3]
    assert image.shape == (3, 2, 3)
    grey = image @ [0.2126, 0.7152, 0.0722]
    order = [grey[2, 0], grey[1, 0], grey[0, 0]]
    assert order == sorted(order) and order[0] < order[1] < order[2]
    assert grey[2, 1] == grey[1, 0], "NaN is the mean"
    assert grey[1, 1] == grey[0, 0] and grey[0, 1] == grey[2, 0], "values outside are clipped"


def test_the_most_frequent_confusions() -> None:
    matrix = np.array([[5, 3, 0], [1, 9, 0], [0, 4, 2]])
    assert rank_confusions(matrix, ["a", "b", "c"], 8) == [
        ("c", "b", 4, 6),
        ("a", "b", 3, 8),
        ("b", "a", 1, 10),
    ]
    assert rank_confusions(np.eye(3, dtype=int), ["a", "b", "c"], 8) == []


@pytest.mark.parametrize("size", [2, 31, 200])
def test_confusion_matrices_of_any_size(size: int) -> None:
    matrix = np.eye(size, dtype=int) * 3
    chart = charts.draw_confusion(matrix, [f"<{i}>" for i in range(size)])
    assert len(chart) < 200_000 and ("<0>" in "".join(Page(chart).text)) == (size <= 30)


def test_a_missing_extra_is_named_and_adapt_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aatjax.cli.commands.adapt import write_report

    for name in [name for name in sys.modules if name.startswith("aatjax.reports.html")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("aatjax.io.optional.find_spec", lambda name: None)
    assert run(["report", "run"]) == 69
    assert "pip install 'aatjax[report]'" in capsys.readouterr().err
    line = write_report(Path("run"), ["aatjax", "adapt"])
    assert line.startswith("report not written: ") and "aatjax[report]" in line
    assert line.endswith("then run aatjax report run")


def test_run_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "fold-1").mkdir()
    (tmp_path / "fold-1" / "adapter.safetensors").write_text("x")
    with pytest.raises(DataError, match="name one of its runs: fold-1"):
        find_adapter(tmp_path)
    assert find_adapter(tmp_path / "fold-1")[1] == tmp_path / "fold-1"
    assert find_adapter(tmp_path / "fold-1" / "adapter.safetensors")[1] is None


def test_clips_of_other_classes_are_refused(folder: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,label\na.wav,other\n")
    soundfile.write(tmp_path / "a.wav", tone(0, 0), 16000)
    with pytest.raises(UsageError, match="'other': not among the classes of the adapter"):
        collect_report(folder, Data(path=str(tmp_path / "s.csv"), cache=str(tmp_path / "c")))
