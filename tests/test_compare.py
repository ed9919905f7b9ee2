"""Comparisons: statistics against scipy, tables, charts, resuming, and the page."""

import csv
import dataclasses
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from aatjax.cli.main import run
from aatjax.config import load_config
from aatjax.errors import DataError, UsageError
from aatjax.experiments.compare import runs
from aatjax.experiments.compare.runs import make_entries
from aatjax.experiments.compare.statistics import compute_paired_p, summarise_methods
from aatjax.experiments.compare.tables import (
    format_csv,
    format_latex,
    format_markdown,
    list_records,
)
from aatjax.reports.html.compare import find_pareto_front, write_comparison

FLAGS = [
    "--training.epochs",
    "1",
    "--data.train-clips",
    "2",
    "--data.test-clips",
    "2",
    "--model.source",
    "random:tiny",
    "--model.frames",
    "64",
    "--training.batch-size",
    "8",
]


def values(rng, mean, seeds=2, folds="1234"):
    return {(s, f): float(mean + 0.05 * rng.standard_normal()) for s in range(seeds) for f in folds}


def test_means_intervals_and_paired_tests_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    given = {"a": values(rng, 0.6), "b": values(rng, 0.7), "c": values(rng, 0.61)}
    found = summarise_methods(["a", "b", "c"], given)
    by_fold = {n: [np.mean([v[0, f], v[1, f]]) for f in "1234"] for n, v in given.items()}
    p = {}
    for name in "bc":
        test = stats.ttest_rel(by_fold[name], by_fold["a"])
        interval = test.confidence_interval(0.95)
        assert found[name].p == pytest.approx(test.pvalue)
        assert found[name].difference_low == pytest.approx(interval.low)
        assert found[name].difference_high == pytest.approx(interval.high)
        p[name] = test.pvalue
    order = sorted(p, key=lambda n: p[n])
    assert found[order[0]].p_holm == pytest.approx(min(1, 2 * p[order[0]]))
    assert found[order[1]].p_holm == pytest.approx(max(2 * p[order[0]], p[order[1]]))
    assert found["a"].difference is None and found["a"].mean == pytest.approx(np.mean(by_fold["a"]))


def test_one_division_counts_seeds_and_one_run_has_no_interval() -> None:
    given = {"a": {(0, None): 0.5, (1, None): 0.7}, "b": {(0, None): 0.6, (1, None): 0.8}}
    found = summarise_methods(["a", "b"], given)
    assert found["b"].difference == pytest.approx(0.1) and found["b"].p == pytest.approx(
        0, abs=1e-6
    )
    one = summarise_methods(["a", "b"], {"a": {(0, None): 0.5}, "b": {(0, None): 0.6}})
    assert one["b"].p is None and one["b"].low is None
    assert compute_paired_p(np.array([0.0, 0.0])) == 1.0
    with pytest.raises(DataError, match="not defined"):
        summarise_methods(["a"], {"a": {(0, "2"): None}})


def test_no_point_beats_the_pareto_front() -> None:
    assert find_pareto_front([1, 2, 3, 4], [50, 60, 55, 70]) == [0, 1, 3]
    assert find_pareto_front([2, 2, 1], [50, 60, 60]) == [2]


def test_rows_need_the_same_clips_and_different_names() -> None:
    config = load_config("default")
    rows = make_entries([config], ["soft_moa", "linear@0.01"], None)
    assert [(r.name, r.config.optim.lr) for r in rows] == [("soft_moa", 5e-3), ("linear", 0.01)]
    sized = make_entries([config], ["soft_moa", "lora"], 50_000)
    assert sized[0].config.petl.budget == 50_000  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="not a learning rate"):
        make_entries([config], ["linear@fast"], None)
    with pytest.raises(UsageError, match="same name"):
        make_entries([config, config], [], None)
    with pytest.raises(UsageError, match="same clips"):
        make_entries([load_config("esc50_lora"), load_config("gtzan_lora")], [], None)
    for change in ({"seed": 1}, {"test_fraction": 0.3}, {"channels": "left"}, {"draw": 2}):
        data = dataclasses.replace(config.data, **change)
        other = dataclasses.replace(config, name="other", data=data)
        with pytest.raises(UsageError, match=f"differ in data.{next(iter(change))} "):
            make_entries([config, other], [], None)
    elsewhere = dataclasses.replace(config.data, statistics="esc50", cache="there")
    make_entries([config, dataclasses.replace(config, name="other", data=elsewhere)], [], None)
    with pytest.raises(UsageError, match="goes with one config"):
        make_entries([config, config], ["linear"], None)


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "use", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.mark.slow
def test_a_comparison_is_resumed_and_reported(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    command = [
        "compare",
        "default",
        "--methods",
        "linear@0.01",
        "lora",
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
        *FLAGS,
    ]
    real, begun = runs.train, []

    def dies_at_the_third(config, **more):
        begun.append(more["run_dir"])
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(config, **more)

    monkeypatch.setattr(runs, "train", dies_at_the_third)
    assert run(command) == 130
    assert not (out / "report.html").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("adapter.safetensors")}
    assert len(before) == 2
    monkeypatch.setattr(runs, "train", real)
    assert run(command) == 0
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    output = capsys.readouterr().out
    assert "lora" in output and "2 seeds" in output

    results = json.loads((out / "results.json").read_text())
    assert len(results["cells"]) == 4 and results["metric"] == "accuracy"
    for cell in results["cells"]:
        place = out / "runs" / cell["entry"] / f"seed{cell['seed']}" / "result.json"
        assert json.loads(place.read_text())["headline"][1] == cell["value"]
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [row["method"] for row in rows] == ["linear", "lora"]
    mean = np.mean([c["value"] for c in results["cells"] if c["entry"] == "lora"])
    assert float(rows[1]["mean"]) == pytest.approx(mean)
    assert r"\toprule" in (out / "table.tex").read_text()
    for name in ("pareto_parameters", "pareto_flops", "curves"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (out / f"{name}.svg").read_text()
    page = (out / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert {"table", "svg", "figure"} <= parser.seen and "script" not in parser.seen
    assert "linear@0.01" in page  # the command that makes it


def test_names_are_escaped_everywhere(tmp_path) -> None:
    config = load_config("default")
    entries = make_entries([config], ["linear", "bitfit"], None)
    evil = "a<b>&_%|"
    entries = [dataclasses.replace(entries[0], name=evil), entries[1]]
    cells = [
        runs.CompareCell(e.name, 0, None, "accuracy", 0.5, 0.1, ((1, 2.0, None),), {})
        for e in entries
    ]
    costs = runs.estimate_costs(entries)
    found = runs.assemble_comparison(entries, cells, costs)
    assert "a<b>" not in "".join(
        p.read_text() for p in write_comparison(found, tmp_path, "x <y>") if p.suffix == ".html"
    )
    assert r"\_\%" in format_latex(found) and r"\|" in format_markdown(found)
    assert evil in format_csv(found)
    assert list_records(found)[0]["trainable"] > 0


def test_too_few_rows_are_refused(capsys) -> None:
    assert run(["compare", "default"]) == 2
    assert "needs two rows" in capsys.readouterr().err
    assert run(["compare", "default", "--method", "lora", "--methods", "a", "b"]) == 2
    assert "--methods" in capsys.readouterr().err
