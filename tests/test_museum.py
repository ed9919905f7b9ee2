"""Files of this and older versions, in `museum`: opened, used, and continued by this one."""

import functools
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aatjax
from aatjax.cli import main
from aatjax.config import Config
from aatjax.export import export, verify
from aatjax.export.manifest import read_bundle
from aatjax.reports.html.collect import collect_report
from aatjax.train.adapter_file import TrainedAdapter, load_adapter, read_info, save_adapter
from aatjax.train.adapter_metadata import AdapterMetadata
from aatjax.train.golden import GOLDEN, compute_golden_logits

MUSEUM = Path(__file__).parent / "museum"
ENTRIES = sorted(path.name for path in MUSEUM.iterdir() if path.is_dir())
EXPECTED = {entry: json.loads((MUSEUM / entry / "expected.json").read_text()) for entry in ENTRIES}
ADAPTERS = [(entry, name) for entry in ENTRIES for name in EXPECTED[entry]]
EXPORTS = sorted(path.relative_to(MUSEUM).as_posix() for path in MUSEUM.glob("*/exports/*"))

TOLERANCE = 1e-4
"""Of a logit, in units of the largest or of 1, on another CPU and with other versions; the files
were written on a CPU in float32."""

RENAMED = {"last_blocks": "blocks", "training.crop": "data.windows"}
"""Endings of fields that older versions wrote, and of those where their values are now."""

MADE_AGAIN = ("format", "versions", "golden", "sha256")
"""What a file states of itself as a file: saving it makes it again."""

RESPELT = ("targets", "blocks")
"""Values that were written otherwise: LoRA's targets as one word, blocks as a number."""

SIZES = ("reduction", "ratio", "width", "rank")
"""Sizes of a method, of which older files name the default: the shapes of the tensors pin them."""


@pytest.fixture(scope="module")
def clip() -> Iterator[np.ndarray]:
    tools = str(Path(__file__).parents[1] / "tools")
    sys.path.insert(0, tools)
    yield importlib.import_module("museum").make_clip()
    sys.path.remove(tools)


@functools.cache
def open_adapter(entry: str, name: str) -> TrainedAdapter:
    path = MUSEUM / entry / name
    info = read_info(path)
    assert info is not None
    moved = info["base"]["source"] != "embedded"
    return load_adapter(path, base=MUSEUM / entry / "base.safetensors" if moved else None)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested objects, and objects in lists, by path."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {path.removeprefix("."): value}
    parts = (flatten(item, f"{path}.{name}") for name, item in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def test_the_museum_is_small_and_described() -> None:
    files = [path for path in MUSEUM.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 800_000
    readme = (MUSEUM / "README.md").read_text()
    assert ENTRIES and all(f"`{entry}`" in readme for entry in ENTRIES)


@pytest.mark.filterwarnings("ignore:.*of format 1")
@pytest.mark.parametrize(("entry", "name"), ADAPTERS)
def test_an_adapter_computes_what_it_did(entry: str, name: str, clip: np.ndarray) -> None:
    adapter, expected = open_adapter(entry, name), EXPECTED[entry][name]
    logits = compute_golden_logits(adapter.model, adapter.frontend, **GOLDEN)
    limit = TOLERANCE * max(1.0, np.abs(expected["logits"]).max())
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=limit)
    found = aatjax.Classifier.from_adapter(adapter).predict_waveform(clip)
    np.testing.assert_allclose(found.probabilities, expected["probabilities"], rtol=0, atol=limit)


@pytest.mark.filterwarnings("ignore:.*of format 1")
@pytest.mark.parametrize(("entry", "name"), ADAPTERS)
def test_no_field_of_an_adapter_is_lost(entry: str, name: str, tmp_path: Path) -> None:
    adapter = open_adapter(entry, name)
    known = {field.name for field in fields(AdapterMetadata)}
    assert set(adapter.info) - known <= {"note"}, "a field that no version reads any more"
    path = save_adapter(
        tmp_path / "again.safetensors",
        adapter.model,
        classes=adapter.classes,
        multi_label=adapter.multi_label,
        frontend=adapter.frontend,
        scoring=adapter.scoring,
        extra=adapter.info,
    )
    before, after = flatten(adapter.info), flatten(read_info(path))
    check_kept(before, after)


def check_kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every field is there, with its value but for those that are stated above."""

    def rename(name: str) -> str:
        ending = next((old for old in RENAMED if name.endswith(old)), None)
        return name if ending is None else name.removesuffix(ending) + RENAMED[ending]

    assert not {name for name in before if rename(name) not in after and name not in after}
    free = tuple(f".{name}" for name in (*RESPELT, *SIZES))
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert not {n for n in changed if not n.startswith(MADE_AGAIN) and not n.endswith(free)}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("run", ["finished", "interrupted"])
def test_no_field_of_a_config_is_lost(entry: str, run: str) -> None:
    stored = json.loads((MUSEUM / entry / run / "config.json").read_text())
    again = json.loads(json.dumps(Config.from_json(stored).to_json()))
    check_kept(flatten({"config": stored}), flatten({"config": again}))


@pytest.mark.parametrize("folder", EXPORTS)
def test_an_export_is_read(folder: str) -> None:
    assert read_bundle(MUSEUM / folder)["classes"] == ["bell", "rain", "voice"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", EXPORTS)
def test_an_export_computes_what_it_did(folder: str) -> None:
    if folder.endswith("hf"):
        pytest.importorskip("transformers")
        pytest.importorskip("torch")
    assert verify(MUSEUM / folder).largest < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*of format 1")
@pytest.mark.parametrize("entry", ENTRIES)
def test_runs_go_on_and_are_evaluated(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MUSEUM / entry, tmp_path / entry)
    monkeypatch.chdir(tmp_path / entry)
    for run in ("interrupted", "finished"):
        assert main.run(["train", f"{run}/config.json", "--out", run, "--quiet"]) == 0
        adapter = load_adapter(f"{run}/adapter.safetensors")
        want = EXPECTED[entry]["finished/adapter.safetensors"]["logits"]
        logits = compute_golden_logits(adapter.model, adapter.frontend, **GOLDEN)
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-3)
    assert len(Path("interrupted/metrics.jsonl").read_text().splitlines()) == 2
    assert collect_report(Path("finished"))
    capsys.readouterr()
    assert main.run(["eval", "finished", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    export("lora.safetensors", "safetensors", "exported")
    assert verify("exported").largest < TOLERANCE
