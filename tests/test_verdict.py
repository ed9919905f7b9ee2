"""The registered comparison: its clips, its runs, and the tables made of their rows."""

import csv
import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from adapter_files import write_base
from scipy import stats

from aatjax import petl

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def verdict():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("benchmarks.verdict")
    sys.path.remove(str(TOOLS))


def test_shots_come_from_the_groups_in_turn_and_never_from_the_tested_fold(verdict: Any) -> None:
    items = [
        verdict.Item(Path(f"{label}-{group}-{k}"), label, str(group), str(group))
        for label in "ab"
        for group in range(4)
        for k in range(5)
    ]
    rows = verdict.cut(items, "2", 3)
    tested = [row for row in rows if row[2] == "test"]
    trained = [row for row in rows if row[2] == "train"]
    assert len(tested) == 10 and {row[3] for row in tested} == {"2"}
    assert Counter((row[1], row[3]) for row in trained) == {
        (label, group): 1 for label in "ab" for group in "013"
    }
    assert rows == verdict.cut(items, "2", 3)
    assert len(verdict.cut(items, "2", 0)) == 40
    assert {row[0] for row in verdict.cut(items, "2", 2)} < {row[0] for row in rows}
    assert {row[0] for row in verdict.cut(items, "2", 1)} < {
        row[0] for row in verdict.cut(items, "2", 0)
    }


def write_speakers(
    folder: Path, names: tuple[str, ...] = ("ann", "ben", "cat"), takes: int = 3
) -> None:
    """Speakers say two words several times, by names as those of FSDD."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for digit, step in (("0", 5), ("1", 9)):
        for name in names:
            for take in range(takes):
                wave = 0.3 * np.sin(np.arange(4000) / step) + 0.05 * rng.normal(size=4000)
                soundfile.write(folder / f"{digit}_{name}_{take}.wav", wave, 8000)


@pytest.mark.slow
def test_a_run_is_written_once_and_its_rate_is_chosen_without_the_first_fold(
    verdict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_speakers(tmp_path / "data/fsdd/recordings")
    base = str(write_base(tmp_path / "base.safetensors"))
    task = verdict.Task("fsdd", 64, lambda group, fold: group, takes=2)
    monkeypatch.setattr(verdict, "TASKS", {"digits": task})
    monkeypatch.setattr(verdict, "RATE_TASKS", ("digits",))
    monkeypatch.setattr(verdict, "METHODS", {"ridge": petl.Ridge(), "linear": petl.Linear()})
    config = verdict.load_config("verdict")
    short = verdict.dataclasses.replace(
        config, training=verdict.dataclasses.replace(config.training, epochs=1, batch_size=4)
    )
    load = verdict.load_config
    monkeypatch.setattr(
        verdict, "load_config", lambda name: short if name == "verdict" else load(name)
    )
    seen: list[list[str]] = []
    write = verdict.write_manifest

    def note(path: Path, rows: list[tuple[Path, str, str, str]]) -> None:
        seen.append(sorted({f"{part} {group}" for *_, part, group in rows}))
        write(path, rows)

    monkeypatch.setattr(verdict, "write_manifest", note)
    out = tmp_path / "verdict.csv"
    with pytest.raises(SystemExit, match="run --parts rates first"):
        verdict.verdict(tmp_path / "data", base, parts=("main",), out=out)
    verdict.verdict(tmp_path / "data", base, parts=("rates", "main"), out=out)
    rows = list(csv.DictReader(out.open()))
    assert Counter(row["part"] for row in rows) == {"rates": 4, "main": 6}
    assert seen[0] == ["test ben", "train cat"]
    assert seen[4] == ["test ann", "train ben", "train cat"]
    assert {row["test_clips"] for row in rows} == {"4"}
    best = max((r for r in rows[1:4]), key=lambda r: (float(r["accuracy"]), -float(r["rate"])))
    assert {r["rate"] for r in rows[4:] if r["method"] == "linear"} == {best["rate"]}
    verdict.verdict(tmp_path / "data", base, parts=("rates", "main"), out=out)
    assert len(seen) == 10 and list(csv.DictReader(out.open())) == rows


@pytest.mark.slow
def test_adapt_is_run_with_each_speaker_held_out(
    verdict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = importlib.import_module("benchmarks.adapt_sets")
    write_speakers(tmp_path / "data/fsdd/recordings", ("ann", "ben"), takes=5)
    task = verdict.Task("fsdd", 64, lambda group, fold: group, takes=1)
    monkeypatch.setattr(sets, "TASKS", {"digits": task})
    base, out = str(write_base(tmp_path / "base.safetensors")), tmp_path / "adapt.csv"
    rows: list[dict[str, str]] = []
    for _ in range(2):
        sets.adapt(tmp_path / "data", ("digits",), base, out)
        rows = list(csv.DictReader(out.open()))
        asked = [(row["fold"], row["asked"]) for row in rows]
        assert asked == [(f, a) for f in ("ann", "ben") for a in ("", "ridge")]
    assert {row["method"] for row in rows} == {"soft_moa", "ridge"}  # five clips a class
    assert all(0 <= float(row["left_out"]) <= 1 for row in rows)
    monkeypatch.setattr(importlib.import_module("benchmarks.tables"), "FIGURES", tmp_path)
    table = importlib.import_module("benchmarks.tables").make_adapt()
    trained = sum(row["epochs"] != "0" for row in rows)
    assert f"| {trained} of 2 |" in table


def test_backbones_are_averaged_and_folds_are_the_units_of_the_test(
    verdict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = importlib.import_module("benchmarks.tables")
    rng = np.random.default_rng(0)
    scores = {m: rng.uniform(0.4, 0.9, (2, 2, 4)) for m in ("ridge", "lora", "full")}
    columns = ("part", "backbone", "task", "fold", "method", "shots", "trainable")
    with (tmp_path / "verdict.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*columns, "accuracy", "cpu_s"))
        for method, score in scores.items():
            for (b, t, f), value in np.ndenumerate(score):
                backbone, task = ("embedded", "speech")[b], ("esc10", "digits")[t]
                writer.writerow(("main", backbone, task, f, method, 0, 1234, value, 2.0))
    monkeypatch.setattr(tables, "FIGURES", tmp_path)
    lines = tables.make_verdict().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:5]}
    assert cells["ridge"][2] == f"{scores['ridge'][0].mean():.3f}"
    p = {}
    for method in ("lora", "full"):
        change = (scores[method] - scores["ridge"]).mean(axis=0).ravel()
        test: Any = stats.ttest_1samp(change, 0.0)
        low, high = test.confidence_interval()
        assert cells[method][4] == f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        p[method] = test.pvalue
    least, most = sorted(p, key=lambda name: p[name])
    corrected = {least: min(1.0, 2 * p[least])}
    corrected[most] = max(corrected[least], p[most])
    assert {name: cells[name][5] for name in p} == {n: f"{v:.3f}" for n, v in corrected.items()}
