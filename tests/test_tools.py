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


NAMES = ("linear", "bottleneck", "lora", "aat", "soft_moa", "dense_moa", "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_model_in_pytorch_has_the_same_logits(epochs, name):
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
    with torch.no_grad():
        found = theirs(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(found, model(x), rtol=1e-4, atol=1e-4)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == aatjax.summary(model).trainable


@pytest.mark.slow
def test_a_row_of_the_comparison(epochs, tmp_path, monkeypatch, capsys):
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


def test_the_methods_are_those_of_the_papers(epochs):
    assert tuple(epochs.METHODS) == NAMES
    assert isinstance(epochs.METHODS["aat"], petl.AAT)


def test_tables_of_the_documents_are_those_of_the_figures(tables):
    filled = []
    for name in tables.DOCUMENTS:
        text = (tables.ROOT / name).read_text()
        assert tables.fill(text) == text, "python tools/bench.py tables"
        filled += [found[2] for found in tables.PLACE.finditer(text)]
    assert sorted(filled) == sorted(tables.TABLES)


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
