"""The comparison with PyTorch: the same model and the same training in both."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import aatjax
from aatjax import petl, surgery
from aatjax.data.source import Clip
from aatjax.train.metrics.estimates import estimate_ranking

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def epochs(tools):
    pytest.importorskip("torch")
    return importlib.import_module("benchmarks.epochs")


@pytest.fixture(scope="module")
def tables(tools):
    return importlib.import_module("benchmarks.tables")


NAMES = (
    *("linear", "bitfit", "layer_norm", "partial", "prompt_shallow", "prompt_deep", "prefix"),
    *("lora", "aat_m", "aat_s", "aat_ms", "bottleneck", "bottleneck_both", "conformer"),
    *("conformer_both", "loaa", "dense_moa", "top_k_moa", "soft_moa", "full"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_model_in_pytorch_has_the_same_logits(epochs, name, shallow_tiny):
    import torch

    model = aatjax.adapt(aatjax.load("random:tiny", num_classes=3, frames=64), epochs.METHODS[name])
    rng = np.random.default_rng(0)
    moved = {
        path: value + 0.1 * rng.normal(size=value.shape).astype(np.float32)
        for path, value in surgery.arrays(model, nnx.Param).items()
    }
    surgery.assign(model, moved, what="the test")
    x = rng.normal(size=(2, 64, 128)).astype(np.float32)
    theirs = epochs.make_torch_model(model)
    if "conformer" in name:
        theirs.eval()  # BatchNorm by its statistics
    with torch.no_grad():
        found = theirs(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(found, model(x), rtol=1e-4, atol=1e-4)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == aatjax.summary(model).trainable


@pytest.mark.slow
def test_a_row_of_the_comparison(epochs, shallow_tiny, tmp_path, monkeypatch, capsys):
    tiny = aatjax.load("random:tiny", num_classes=10, frames=64)
    monkeypatch.setattr(epochs, "load", lambda *_, **__: tiny)
    table = tmp_path / "epochs.csv"
    for name in ("soft_moa", "linear"):
        epochs.epochs(methods=(name,), clips=2, batch=4, epochs=2, rounds=1, out=table)
    rows = list(csv.DictReader(table.open()))
    assert [row["method"] for row in rows] == ["soft_moa", "linear"]
    assert all(float(row["loss_difference"]) < 1e-5 and float(row["ratio"]) > 0 for row in rows)
    assert rows[0]["cpu"] in capsys.readouterr().out
    with pytest.raises(SystemExit, match="20 clips are not a multiple of 7"):
        epochs.epochs(clips=2, batch=7)


def test_the_methods_are_those_of_the_comparison(epochs):
    compared = importlib.import_module("benchmarks.compare").METHODS
    assert tuple(epochs.METHODS) == NAMES
    assert set(compared) - set(NAMES) == {"ridge", "scratch"}  # no epochs; the same as full
    assert isinstance(epochs.METHODS["aat_ms"], petl.AAT)


def test_tables_of_the_documents_are_those_of_the_figures(tables):
    filled = []
    for name in tables.DOCUMENTS:
        text = (tables.ROOT / name).read_text()
        assert tables.fill(text) == text, "python tools/bench.py tables"
        filled += [found[2] for found in tables.PLACE.finditer(text)]
    run = (tables.FIGURES / "verdict.csv").exists()
    named = [name for name in tables.TABLES if run or not name.startswith("verdict")]
    assert sorted(filled) == sorted(named)


def test_a_table_takes_rows_of_its_own_columns_only(tools, tmp_path):
    append_row = importlib.import_module("benchmarks").append_row
    table = tmp_path / "new/table.csv"
    for number in (1, 2):
        append_row(table, {"a": number, "b": "x, y"})
    assert table.read_text() == 'a,b\n1,"x, y"\n2,"x, y"\n'
    with pytest.raises(SystemExit, match="has the columns a, b: give another file"):
        append_row(table, {"a": 3})
    append_row(None, {"a": 3})
    assert len(table.read_text().splitlines()) == 3


def test_intervals_contain_the_truth_as_often_as_they_promise(tools):
    simulation = importlib.import_module("benchmarks.intervals")
    rng = np.random.default_rng(0)
    for clips, speakers in ((80, None), (80, 10)):
        groups = simulation.assign_speakers(clips, speakers)
        found = [simulation.draw_single(clips, groups, 0.5, rng) for _ in range(200)]
        for name in ("accuracy", "macro_f1"):
            assert float(simulation.count_covered(name, found, 0.5, speakers).share) > 0.9
        found = [simulation.draw_multi(clips, groups, 3.0, rng) for _ in range(100)]
        truth = simulation.compute_ap(3.0 / (1 + 0.25 * bool(speakers)) ** 0.5)
        assert float(simulation.count_covered("mean_ap", found, truth, speakers).share) > 0.88
    found = [
        simulation.draw_single(400, simulation.assign_speakers(400, 5), 0.5, rng)
        for _ in range(100)
    ]
    ignored = simulation.count_ignoring(found, 0.5, 5)
    assert float(ignored.share) < 0.75  # the test can fail: clips of a speaker are not independent


def test_tests_of_equal_methods_are_rarely_significant(tools):
    simulation = importlib.import_module("benchmarks.intervals")
    rng = np.random.default_rng(1)
    folds = [(0, str(k)) for k in range(2)]
    seeds = [(k, None) for k in range(2)]
    for design, keys, speakers in (
        ("one run each", [(0, None)], 10),
        ("2 folds", folds, None),
        ("2 seeds", seeds, None),
    ):
        alarms = simulation.count_rejected(design, 80, speakers, 0.0, keys, 200, rng)
        assert float(alarms.share) <= 0.09, design  # 5 % and three standard errors
    power = simulation.count_rejected("one run each", 400, None, 0.1, [(0, None)], 50, rng)
    assert float(power.share) > 0.8


def test_the_true_average_precision_is_that_of_many_clips(tools):
    simulation = importlib.import_module("benchmarks.intervals")
    rng = np.random.default_rng(2)
    positive = rng.random(200_000) < simulation.PREVALENCE
    scores = rng.normal(size=200_000) + 1.5 * positive
    known = np.ones(200_000, bool)
    found, _ = estimate_ranking(scores, positive, known)
    assert simulation.compute_ap(1.5) == pytest.approx(found.value, abs=0.005)


@pytest.mark.slow
def test_the_measurement_of_a_start_writes_a_row_for_each_step(tools, tmp_path, capsys):
    scale = importlib.import_module("benchmarks.scale")
    scale.scale(rows=80, classes=(4,), clips=500, out=tmp_path / "scale.csv")
    rows = list(csv.DictReader((tmp_path / "scale.csv").open()))
    assert [row["rows"] for row in rows] == ["80"] * 9 + ["500"] * 2
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_a_long_tail_falls_from_one_to_the_ratio(tools):
    module = importlib.import_module("benchmarks.long_tail")
    clips = [
        Clip(f"{fold}-{label}-{i}", (label,), None, fold=str(fold))
        for fold in range(4)
        for label in range(5)
        for i in range(16)
    ]
    kept = module.cut(clips, "2", 16.0, np.random.default_rng(0))
    assert [clip.fold for clip, part in kept if part == "test"] == ["2"] * 80
    train = [clip for clip, part in kept if part == "train"]
    assert len(set(train)) == len(train) and "2" not in {clip.fold for clip in train}
    counts = np.bincount([clip.label[0] for clip in train])
    assert sorted(counts) == [3, 6, 12, 24, 48]
    assert list(counts) != sorted(counts)  # the order is drawn
