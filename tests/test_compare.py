"""Comparisons: statistics against scipy, tables, charts, resuming, and the page."""

import csv
import dataclasses
import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from scipy import stats

from aatjax.cli.main import run
from aatjax.config import load_config
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError, UsageError
from aatjax.experiments.clip_scores import (
    ClipScores,
    Key,
    Spread,
    read_clip_scores,
    summarise_runs,
    write_clip_scores,
)
from aatjax.experiments.compare import runs
from aatjax.experiments.compare.runs import make_entries
from aatjax.experiments.compare.statistics import (
    compare_runs,
    compute_paired_p,
    summarise_methods,
)
from aatjax.experiments.compare.tables import (
    describe_best,
    format_csv,
    format_latex,
    format_markdown,
    list_records,
    make_comparison_json,
)
from aatjax.reports.html.compare import find_pareto_front, write_comparison
from aatjax.train.evaluation import measure_metrics

FLAGS = [
    "--training.epochs",
    "1",
    "--data.train-clips",
    "2",
    "--data.test-clips",
    "2",
    "--model.source",
    "embedded",
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
    assert found["b"].difference == pytest.approx(0.1)
    assert found["b"].p == 0.5  # two equal differences: the signs of two coins
    assert found["b"].difference_low is None
    one = summarise_methods(["a", "b"], {"a": {(0, None): 0.5}, "b": {(0, None): 0.6}})
    assert one["b"].p is None and one["b"].low is None
    assert compute_paired_p(np.array([0.0, 0.0])) == 1.0
    assert compute_paired_p(np.array([0.0125, 0.0125])) == 0.5
    assert compute_paired_p(np.full(6, -0.0125)) == pytest.approx(2 / 2**6)
    with pytest.raises(DataError, match="not defined"):
        summarise_methods(["a"], {"a": {(0, "2"): None}})


def make_run(
    right: np.ndarray, groups: list[str | None] | None = None, fold: str | None = None
) -> tuple[dict[Key, float], dict[Key, ClipScores | None]]:
    """The figure and the clip scores of one run, by which clips are right."""
    n = len(right)
    influence = tuple(((right - right.mean()) / n).tolist())
    names = tuple(groups or [None] * n)
    scores = ClipScores(tuple(f"{fold}-{i}.wav" for i in range(n)), names, influence)
    return {(0, fold): float(right.mean())}, {(0, fold): scores}


def draw_pair(n: int, seed: int = 0, gain: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n)
    first, second = (difficulty + rng.normal(size=n) > t for t in (-0.5, -0.5 - 4 * gain))
    return first.astype(float), second.astype(float)


def compare_pair(first: np.ndarray, second: np.ndarray, groups: Any = None) -> dict[str, Any]:
    (a, one), (b, other) = make_run(first, groups), make_run(second, groups)
    return compare_runs(a, b, one, other)


def test_one_run_each_is_compared_by_mcnemars_exact_test() -> None:
    first, second = draw_pair(80)
    found = compare_pair(first, second)
    gained, lost = int((second > first).sum()), int((second < first).sum())
    assert found["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert found["difference"] == pytest.approx((gained - lost) / 80)
    # Bonett and Price 2012, equation 3, with Student's t for the normal quantile.
    up, down = (gained + 1) / 82, (lost + 1) / 82
    error = np.sqrt((up + down - (up - down) ** 2) / 82)
    width = found["difference_high"] - found["difference_low"]
    assert width == pytest.approx(2 * stats.t.ppf(0.975, 79) * error, rel=0.02)
    back = compare_pair(second, first)
    assert back["p"] == found["p"] and back["difference_high"] == -found["difference_low"]


@pytest.mark.parametrize(("groups", "exact"), [(8, True), (24, False)])
def test_clips_of_a_group_change_their_sign_together(groups: int, exact: bool) -> None:
    first, second = draw_pair(96, seed=2)
    names = [f"speaker {i % groups}" for i in range(96)]
    found = compare_pair(first, second, names)
    sums = np.array([(second - first)[i::groups].sum() for i in range(groups)])
    test = stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=np.inf if exact else 20000, rng=1
    )
    assert found["p"] == pytest.approx(test.pvalue, abs=1e-12 if exact else 0.01)
    error = np.sqrt(groups / (groups - 1) * ((sums - sums.mean()) ** 2).sum()) / 96
    width = found["difference_high"] - found["difference_low"]
    assert width == pytest.approx(2 * stats.t.ppf(0.975, groups - 1) * error, rel=0.15)


def test_rows_that_are_right_on_the_same_clips_are_equal_but_not_for_certain() -> None:
    first, _ = draw_pair(13)
    for groups in (None, [f"speaker {i % 4}" for i in range(13)]):
        found = compare_pair(first, first, groups)
        assert (found["difference"], found["p"]) == (0, 1)
        assert found["difference_low"] < -0.1 and found["difference_high"] > 0.1
    one = compare_pair(first, 1 - first, ["one"] * 13)
    assert one["p"] is None and one["difference_low"] is None


def test_folds_count_by_the_larger_of_the_spreads_over_clips_and_over_folds() -> None:
    def join(shares: list[float], n: int = 40) -> tuple[dict, dict]:
        made = [
            make_run((np.arange(n) < round(n * share)).astype(float), None, str(k))
            for k, share in enumerate(shares)
        ]
        values, scores = {}, {}
        for value, score in made:
            values |= value
            scores |= score
        return values, scores

    (a, one), (b, other) = join([0.5, 0.6, 0.7, 0.8]), join([0.6, 0.9, 0.75, 0.95])
    found = compare_runs(a, b, one, other)
    test = stats.ttest_rel(list(b.values()), list(a.values()))
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-6)
    assert found["difference_low"] == pytest.approx(test.confidence_interval().low)
    # Equal differences: the folds show no spread, the clips do.
    (a, one), (b, other) = join([0.5, 0.6]), join([0.525, 0.625])
    found = compare_runs(a, b, one, other)
    assert 0.1 < found["p"] < 0.9 and found["difference_low"] < 0 < found["difference_high"]
    mean, low, high = summarise_runs(*join([0.8, 0.8]))
    assert low < 0.75 < mean < 0.85 < high
    mean, low, high = summarise_runs(*join([1.0, 1.0, 1.0]))
    assert mean == high == 1 and 0.9 < low < 1


def test_seeds_add_their_spread_to_that_over_clips() -> None:
    rng = np.random.default_rng(5)
    right = [(rng.random(200) < 0.7).astype(float) for _ in range(3)]
    values = {(seed, None): float(one.mean()) for seed, one in enumerate(right)}
    scores = {(seed, None): make_run(one)[1][0, None] for seed, one in enumerate(right)}
    clips = np.mean(right, axis=0).var(ddof=1) / 200
    seeds = np.var(list(values.values()), ddof=1) / 3
    spread = Spread.measure(values, clips, 200)
    reach = np.hypot(stats.t.ppf(0.975, 199) * clips**0.5, stats.t.ppf(0.975, 2) * seeds**0.5)
    assert spread.compute_reach(0.05) == pytest.approx(reach)
    assert spread.compute_p(reach) == pytest.approx(0.05)
    assert spread.compute_p(0) == 1 and spread.compute_p(9) < 1e-5
    mean, low, high = summarise_runs(values, scores)
    assert high - low == pytest.approx(2 * reach, rel=0.05) and low < mean < high


def test_clip_scores_are_kept_with_the_run(tmp_path) -> None:
    targets = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    clips = [Clip(f"{i}.wav", (i % 2,), None, group=["a", None][i % 2]) for i in range(4)]
    source = Source(clips, ["x", "y"], name="four")
    metrics = measure_metrics(targets[[0, 1, 1, 1]], source)
    assert read_clip_scores(tmp_path) is None
    write_clip_scores(tmp_path, metrics, source)
    found = read_clip_scores(tmp_path)
    assert found is not None and found.groups == ("a", None, "a", None)
    assert found.ids == ("0.wav", "1.wav", "2.wav", "3.wav")
    assert found.influence == pytest.approx([1 / 16, 1 / 16, -3 / 16, 1 / 16])
    (tmp_path / "test_clips.json").write_text('{"ids": ["0.wav"], "groups": []}')
    with pytest.raises(DataError, match=r"clip scores\.influence is missing: delete it"):
        read_clip_scores(tmp_path)


def make_comparison(right: dict[str, np.ndarray], groups: Any = None) -> runs.Comparison:
    config = load_config("default")
    entries = make_entries([config], list(right), None)
    cells = [
        runs.CompareCell(
            name, 0, None, "accuracy", float(one.mean()), 0.1, ((1, 2.0, None),), {}, 0.2, 0.9,
            make_run(one, groups)[1][0, None],
        )
        for name, one in right.items()
    ]  # fmt: skip
    return runs.assemble_comparison(entries, cells, runs.estimate_costs(entries))


def test_rows_that_tie_are_reported_as_equal() -> None:
    first, second = draw_pair(80)
    found = make_comparison({"linear": first, "lora": np.roll(first, 1), "bitfit": 0 * first})
    value = f"{100 * first.mean():.1f} %"
    text = describe_best(found)
    assert text.startswith(f"linear and lora are equal with {value}. ")
    assert "Significantly different from linear at 5 % (Holm): bitfit." in text
    better = make_comparison({"linear": first, "lora": second})
    assert describe_best(better).startswith("lora is highest with ")
    one_more = first.copy()
    one_more[int(np.argmin(first))] = 1
    close = make_comparison({"linear": first, "lora": one_more}, [f"s{i % 9}" for i in range(80)])
    assert describe_best(close).endswith("No difference to linear is significant at 5 % (Holm).")
    assert close.counts == "80 clips, 9 groups"
    assert "accuracy (80 clips, 9 groups)" in format_markdown(close)
    assert any("sign-flip test over groups of clips" in note for note in close.notes)
    assert (close.summaries["lora"].low, close.summaries["lora"].high) == (0.2, 0.9)
    assert json.loads(json.dumps(make_comparison_json(close)))["cells"][0]["scores"] is None


def test_no_point_beats_the_pareto_front() -> None:
    assert find_pareto_front([1, 2, 3, 4], [50, 60, 55, 70]) == [0, 1, 3]
    assert find_pareto_front([2, 2, 1], [50, 60, 60]) == [2]


def test_rows_need_the_same_clips_and_different_names() -> None:
    config = load_config("default")
    rows = make_entries([config], ["soft_moa", "linear@0.01"], None)
    assert [(r.name, r.config.optim.lr) for r in rows] == [("soft_moa", None), ("linear", 0.01)]
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
    evil = "=a<b>&_%|\u202e"
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
    assert f"\n'{evil}," in format_csv(found)  # no formula in a spreadsheet
    title = "\x1b[31m[x](http://y) `*`\n<img src=x> \u202e"
    text = format_markdown(dataclasses.replace(found, title=title, notes=(title, *found.notes)))
    shown = r"\\x1b[31m[x]\(http://y) \`\*\`\\n&lt;img src=x&gt; \\u202e"
    assert text.startswith(f"# {shown}\n\n=a&lt;b&gt;&amp;_%|") and f"\n- {shown}\n" in text
    assert all(c.isprintable() or c == "\n" for c in text + format_latex(found))
    assert list_records(found)[0]["trainable"] > 0


def test_too_few_rows_are_refused(capsys) -> None:
    assert run(["compare", "default"]) == 2
    assert "needs two rows" in capsys.readouterr().err
    assert run(["compare", "default", "--method", "lora", "--methods", "a", "b"]) == 2
    assert "--methods" in capsys.readouterr().err
