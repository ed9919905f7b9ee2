"""Metadata of an adapter file: one digest, one schema, and nothing followed that it names."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import CLASSES, rewrite, save, trained, write_base
from json_attacks import DEEP, WRONG, list_places, put
from safetensors.numpy import load_file, save_file

import aatjax
from aatjax import load_adapter, petl
from aatjax.convert import known_weights
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.export import verify
from aatjax.inference.classifier import Classifier
from aatjax.inference.server.adapters import AdapterStore
from aatjax.io.digest import hash_arrays
from aatjax.train import adapter_base
from aatjax.train.adapter_file import encode_adapter, read_info, read_metadata
from aatjax.train.adapter_metadata import AdapterMetadata

METHOD = petl.SoftMoA(num_experts=3, slots=2, reduction=4.0)
DECISIONS = {
    "temperature": 1.5,
    "thresholds": [0.5, 0.25, 0.75],
    "quantile": 0.5,
    "coverage": 0.9,
    "clips": 20,
}
FIGURE = {"metric": "mAP", "value": 0.5, "low": 0.25, "high": 0.75, "clips": 12}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter file with every field that a run writes."""
    folder = tmp_path_factory.mktemp("written")
    model = trained(write_base(folder / "base.safetensors"), METHOD)
    return save(
        folder / "adapter.safetensors",
        model,
        decisions=DECISIONS,
        test=FIGURE,
        valid={**FIGURE, "low": None, "high": None},
        weights="best",
        data="0" * 64,
        about={"benchmark": "ESC-50", "whole": True, "shots": 4},
        config={"data": {"path": "/sounds"}, "petl": METHOD.to_json()},
    )


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "a.safetensors"))


def read(path: Path) -> dict[str, Any]:
    info = read_info(path)
    assert info is not None
    return info


# The digest.


EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda info: info["classes"].reverse(),
    lambda info: info["decisions"].update(temperature=3.0),
    lambda info: info["test"].update(value=0.99),
    lambda info: info["frontend"].update(mean=0.0),
    lambda info: info["method"].update(num_experts=4),
    lambda info: info["base"].update(source="elsewhere.safetensors"),
    lambda info: info["config"]["data"].update(path="/other"),
    lambda info: info["golden"].update(label=CLASSES[2]),
    lambda info: info.update(note="mine"),
    lambda info: info.pop("weights"),
]


@pytest.mark.parametrize("edit", EDITS, ids=range(len(EDITS)))
def test_a_field_that_was_edited_is_noticed(
    edit: Callable[[dict[str, Any]], object], path: Path
) -> None:
    info = read(path)
    edit(info)
    save_file(load_file(path), path, {"aatjax": json.dumps(info)})
    for check in (load_adapter, verify):
        with pytest.raises(DataError, match=r"a\.safetensors: damaged or changed: the checksum"):
            check(path)


def test_a_file_without_a_checksum_is_refused(path: Path) -> None:
    info = read(path)
    del info["sha256"]
    for number in (2, 1):
        info["format"] = number
        save_file(load_file(path), path, {"aatjax": json.dumps(info)})
        with pytest.raises(DataError, match="has no checksum"):
            load_adapter(path)


def test_class_names_in_another_order_are_refused_by_the_golden_sample_too(path: Path) -> None:
    """Also where the checksum was made again."""
    rewrite(path, lambda info: info["classes"].insert(0, info["classes"].pop()))
    with pytest.raises(DataError, match=r"golden\.label='.*' is not the most probable class"):
        load_adapter(path)


def test_a_file_of_the_first_format_loads_with_a_warning_and_is_written_again(
    path: Path, tmp_path: Path
) -> None:
    info, tensors = read(path), load_file(path)
    del info["sha256"], info["golden"]["label"], info["golden"]["probabilities"]
    info["format"] = 1
    save_file(tensors, path, {"aatjax": json.dumps(info), "sha256": hash_arrays(tensors)})
    with pytest.warns(UserWarning, match="does not cover class names, calibration and figures"):
        old = load_adapter(path)
    new = aatjax.save_adapter(
        tmp_path / "new.safetensors",
        old.model,
        classes=old.classes,
        multi_label=old.multi_label,
        frontend=old.frontend,
        extra=old.info,
    )
    assert (read(new)["format"], read(new)["decisions"]) == (2, DECISIONS)
    load_adapter(new)
    save_file(tensors, path, {"aatjax": json.dumps(info), "sha256": "0" * 64})
    with pytest.raises(DataError, match="checksum of its tensors does not match"):
        load_adapter(path)


def test_the_golden_sample_holds_the_decision_that_a_user_gets(written: Path) -> None:
    golden = read(written)["golden"]
    adapter = load_adapter(written)
    classifier = Classifier.from_adapter(adapter)
    probabilities, _ = classifier.calibrate(np.asarray(golden["logits"])[None])
    np.testing.assert_allclose(golden["probabilities"], probabilities[0], atol=1e-6)
    assert golden["label"] == CLASSES[int(probabilities[0].argmax())]


# Equal bytes.

SAVE = """
import sys
import numpy as np
from aatjax.train.adapter_file import encode_adapter
tensors = {f"blocks/{i}/w": np.full((i + 1, 2), i, np.float32) for i in range(20)}
info = {f"field {i}": i for i in range(20)}
sys.stdout.buffer.write(encode_adapter(info, dict(reversed(tensors.items()))))
"""


@pytest.mark.slow
def test_equal_adapters_have_equal_bytes_in_every_process(written: Path, tmp_path: Path) -> None:
    again = [save(tmp_path / f"{i}.safetensors", load_adapter(written).model) for i in range(2)]
    assert again[0].read_bytes() == again[1].read_bytes()
    tensors = {f"blocks/{i}/w": np.full((i + 1, 2), i, np.float32) for i in range(20)}
    here = encode_adapter({f"field {i}": i for i in range(20)}, tensors)
    command = [sys.executable, "-c", SAVE]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == here


def test_the_order_in_which_metadata_were_put_together_does_not_matter(written: Path) -> None:
    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turn(value[key]) for key in reversed(list(value))}
        return value

    info, tensors = read(written), load_file(written)
    turned = {name: tensors[name] for name in reversed(list(tensors))}
    assert encode_adapter(turn(info), turned) == encode_adapter(info, tensors)
    assert encode_adapter(info, tensors) == written.read_bytes()


# The schema.


FREE = ("about", "config", "versions", "data", "weights")
"""Nothing is made of these but text."""


def test_no_value_of_a_field_is_another_error_than_one_that_is_explained(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field, each with values of every kind; no model is made of any of them."""
    info = read(written)
    places = [place for place in list_places(info) if place[0] not in ("sha256", *FREE)]
    assert len(places) > 60
    refused = 0
    for place in places:
        for value in WRONG:
            try:
                found = AdapterMetadata.from_json(put(info, place, value))
            except AatjaxError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600, str(error)[:900]
            else:
                assert found.model.mels <= 4096 and found.model.depth <= 64
    assert refused > 0.8 * len(places) * len(WRONG)
    for place in places:
        if len(place) == 1 and place[0] in ("classes", "model", "method", "base", "frontend"):
            gone = {name: value for name, value in info.items() if name != place[0]}
            with pytest.raises(AatjaxError, match=f"metadata.{place[0]} is missing"):
                AdapterMetadata.from_json(gone)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "mels"), 10**7, "model.mels=10000000 must be at most 4096"),
        (("frontend", "mels"), 10**7, "front end.mels=10000000 must be at most 4096"),
        (("model", "depth"), 20_000, "model.depth=20000 must be at most 64"),
        (("model", "dim"), 1.5, "model.dim=1.5 is not of type int"),
        (("model", "heads"), True, "model.heads=True is not of type int"),
        (("model", "stride"), [10], r"model.stride=\[10\] is not of type"),
        (("frontend", "std"), -1, "front end: std=-1 must be above 0"),
        (("method", "num_experts"), 10**9, "petl.num_experts=1000000000 must be at most"),
        (("method", "slots"), "2", "petl.slots='2' is not of type"),
        (("classes",), [], "class names must differ"),
        (("classes",), ["a", "a", "b"], "class names must differ"),
        (("classes",), ["a", "b"], "2 classes, the model's head 3"),
        (("decisions", "thresholds"), [0.5], "1 thresholds for 3 classes"),
        (("decisions", "temperature"), 0, "temperature=0 must be above 0"),
        (("decisions", "clips"), -1, "clips=-1 must be at least 0"),
        (("golden", "seconds"), 1e9, r"golden\.seconds=1000000000.0 must be above 0 and at most"),
        (("golden", "sound"), "horse", r"golden\.sound='horse'"),
        (("test", "value"), float("nan"), "metadata.test.value=nan is not a finite number"),
        (("test", "clips"), 0.5, r"test\.clips=0.5 is not of type int"),
        (("base", "seed"), 2**70, r"metadata\.base\.seed=\d+ is not a finite number, or too"),
        (("base", "fingerprint"), 7, r"base\.fingerprint=7 is not of type str"),
        (("multi_label",), 1, r"metadata\.multi_label=1 is not of type bool"),
        (("format",), 1.5, r"metadata\.format=1.5 is no version"),
        (("config",), [], r"metadata\.config=\[\] is not of type dict"),
        (("about",), {"a": DEEP}, "more than 24 levels"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_before_anything_is_made(
    place: tuple[Any, ...], value: Any, message: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("aatjax.train.adapter_file.make_shape", lambda *args: made.append(args))
    path.write_bytes(encode_adapter(put(read(path), place, value), load_file(path)))
    for check in (
        load_adapter,
        read_metadata,
        Classifier.load,
        lambda path: AdapterStore().load("a", path),
    ):
        with pytest.raises(DataError, match=message) as caught:
            check(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not made


def test_metadata_that_are_nested_very_deeply_are_no_adapter(path: Path) -> None:
    deep = '{"kind": "adapter", "a": ' + "[" * 10**5 + "]" * 10**5 + "}"
    for text in (deep, '{"kind": "adapter", "kind": "adapter"}', "[]", "NaN", "{"):
        save_file(load_file(path), path, {"aatjax": text})
        with pytest.raises(DataError, match="not an adapter file that aatjax wrote, or damaged"):
            load_adapter(path)


def test_nothing_larger_than_the_file_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that would need more is refused before its backbone is read."""
    monkeypatch.setattr(adapter_base, "load_model", lambda *args: pytest.fail("was loaded"))
    rewrite(path, lambda info: info["method"].update(num_experts=60_000))
    with pytest.raises(DataError, match="does not fit the model"):
        load_adapter(path)


def test_what_would_not_be_read_is_not_saved(written: Path, tmp_path: Path) -> None:
    model = load_adapter(written).model
    for extra in ({"note": float("nan")}, {"note": {1, 2}}, {"decisions": 3}, {"test": "good"}):
        with pytest.raises((UsageError, DataError), match=r"(note|decisions|test)|cannot be saved"):
            save(tmp_path / "a.safetensors", model, **extra)
    assert not (tmp_path / "a.safetensors").exists()


# What a file names.


NOT_FILES = ["//host/share/w.st", "\\\\host\\share", "http://host/w", "pipe", "/dev/zero", "a\0b"]


@pytest.mark.parametrize("source", [*NOT_FILES, "w.st", "below/w", "~nobody-of-this-name/w.st"])
def test_a_path_that_a_file_names_is_opened_only_in_the_folder_of_its_run(
    source: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "below").mkdir()
    for name in ("w.st", "below/w"):
        (tmp_path / name).write_bytes(b"no weights")
    opened: list[Any] = []

    def load_model(given: str, *_: Any, **options: Any) -> None:
        opened.append(given)
        raise DataError("no weights")

    monkeypatch.setattr(adapter_base, "load_model", load_model)
    rewrite(path, lambda info: info["base"].update(source=source, fingerprint="0" * 64))
    stated = read(path)["config"]
    for text in (None, "{}", json.dumps({**stated, "name": "another"})):  # alone, beside another
        if text is not None:
            (path.parent / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"path in a file is followed only in .*with base="):
            load_adapter(path)
        with pytest.raises(DataError, match="with base="):
            AdapterStore().load("x", path)
    assert not opened
    (path.parent / "config.json").write_text(json.dumps(stated))
    wrong = "is not opened because a file names it" if source in NOT_FILES else "no weights"
    with pytest.raises(DataError, match=f"{wrong}.*with base="):
        load_adapter(path)
    assert bool(opened) == (source not in NOT_FILES)
    with pytest.raises(DataError, match="no weights"):
        load_adapter(path, base="given")
    assert opened[-1] == "given"


def test_a_fingerprint_in_a_file_is_no_path_into_the_index(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "planted").write_text(str(path))
    monkeypatch.setattr(known_weights, "find_user_cache", lambda: tmp_path)
    assert known_weights.find_weights("../planted") is None
    known_weights.remember_weights("0" * 64, path)
    assert known_weights.find_weights("0" * 64) == path
    copy = tmp_path / "copy"  # such as an export, while it is written
    copy.write_bytes(b"")
    known_weights.remember_weights("0" * 64, copy)
    assert known_weights.find_weights("0" * 64) == copy
    copy.unlink()
    assert known_weights.find_weights("0" * 64) == path
    path.unlink()
    assert known_weights.find_weights("0" * 64) is None
    monkeypatch.setattr(known_weights, "MOST", 3)
    for number in range(6):
        known_weights.remember_weights(f"{number:064}", tmp_path)
    assert len(list((tmp_path / "weights").iterdir())) == 3


def test_an_adapter_knows_its_file_and_an_average_has_none(written: Path) -> None:
    adapter = load_adapter(written)
    assert adapter.path == written
    assert aatjax.average([adapter, adapter]).path is None
