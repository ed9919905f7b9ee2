"""`adapter.safetensors`: what was trained comes back, on the right backbone, or is refused."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import CLASSES, FRONTEND, TINY, inputs, rewrite, save, trained, write_base
from flax import nnx
from safetensors.numpy import load_file

from aatjax import load, load_adapter, petl, surgery
from aatjax.convert import known_weights, write_native
from aatjax.convert import load as loading
from aatjax.convert.load import reset_weights
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.models.ast import AST
from aatjax.train.adapter_file import FORMAT, read_info
from aatjax.train.forward import bind_forward

MIXTURE = petl.SoftMoA(num_experts=3, slots=2, reduction=4.0, location="both", train_norm=False)
METHODS = [petl.Linear(), petl.AAT(), MIXTURE, petl.Full()]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.safetensors")


def logits(model: AST, frames: int = 39) -> np.ndarray:
    return np.asarray(bind_forward(model, None)(inputs(frames), np.full(2, frames)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_what_was_saved_is_loaded(method: petl.Method, base: Path, tmp_path: Path) -> None:
    model = trained(base, method)
    path = save(tmp_path / "deep" / "er" / "adapter.safetensors", model, note={"a": [1, None]})
    found = load_adapter(path)
    np.testing.assert_array_equal(logits(found.model), logits(model))
    plain = load(base, num_classes=3)
    assert np.abs(np.asarray(logits(plain) - logits(model))).max() > 1e-3
    assert found.classes == CLASSES
    assert found.multi_label is True
    assert found.frontend == FRONTEND
    assert found.model.method == method
    assert dataclasses.asdict(found.model.method) == dataclasses.asdict(method)
    assert found.model.origin == model.origin
    assert found.info["note"] == {"a": [1, None]}
    assert found.info["format"] == FORMAT
    assert set(found.info["versions"]) >= {"aatjax", "jax", "flax"}
    # What is trainable is so again, and a second round changes nothing.
    assert set(surgery.arrays(found.model, nnx.Param)) == set(surgery.arrays(model, nnx.Param))
    again = load_adapter(save(tmp_path / "again.safetensors", found.model))
    np.testing.assert_array_equal(logits(again.model), logits(model))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_file_holds_what_was_trained_and_no_more(
    method: petl.Method, base: Path, tmp_path: Path
) -> None:
    model = trained(base, method)
    path = save(tmp_path / "a.safetensors", model)
    tensors = load_file(path)
    expected = surgery.arrays(model, nnx.Param)
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
    numbers = sum(value.size for value in expected.values())
    assert path.stat().st_size < 4 * numbers + 8000
    if method != petl.Full():
        assert path.stat().st_size < base.stat().st_size / 2


def test_full_fine_tuning_does_not_need_its_base(base: Path, tmp_path: Path) -> None:
    model = trained(base, petl.Full())
    path = save(tmp_path / "a.safetensors", model)
    base.unlink()
    np.testing.assert_array_equal(logits(load_adapter(path).model), logits(model))


@pytest.mark.parametrize("method", METHODS[1:2], ids=lambda m: m.name)
def test_another_base_is_refused_with_both_fingerprints(
    method: petl.Method, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_weights, "find_user_cache", lambda: tmp_path)  # of this test alone
    path = save(tmp_path / "a.safetensors", trained(base, method))
    info = read_info(path)
    assert info is not None
    other = write_base(tmp_path / "other.safetensors", seed=1)
    stranger = load(other, num_classes=3)
    assert stranger.origin is not None
    for given in (other, stranger):
        with pytest.raises(DataError) as caught:
            load_adapter(path, base=given)
        message = str(caught.value)
        assert info["base"]["fingerprint"][:12] in message
        assert stranger.origin.fingerprint[:12] in message
        assert str(path) in message and str(base) in message and "\n" not in message
    # The same when the file of the base was exchanged behind our back.
    other.replace(base)
    with pytest.raises(DataError, match="fingerprint"):
        load_adapter(path)


@pytest.mark.parametrize("change", [{"pool": "mean_all"}, {"positions": "zeros"}])
def test_a_loaded_base_that_is_used_otherwise_is_refused(
    change: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Its weights are the right ones, its logits would not be."""
    path = save(tmp_path / "a.safetensors", trained(base, petl.LoRA(), **change))
    (name,) = change
    with pytest.raises(DataError, match=f"not used as in training: {name}="):
        load_adapter(path, base=load(base, num_classes=3))
    same = load_adapter(path, base=load(base, num_classes=3, **change))
    np.testing.assert_array_equal(logits(same.model), logits(load_adapter(path).model))


def test_a_base_of_reset_weights_is_made_again(base: Path, tmp_path: Path) -> None:
    model = load(base, num_classes=3, seed=5)
    reset_weights(model, 5)
    adapted = petl.adapt(model, petl.LoRA())
    path = save(tmp_path / "a.safetensors", adapted)
    for given in (None, base):
        found = load_adapter(path, base=given)
        np.testing.assert_array_equal(logits(found.model), logits(adapted))
        assert found.model.origin == model.origin


def test_revision_and_colour_rule_travel_with_the_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch_weights(name: str, *, revision: str | None) -> Path:
        asked.append(revision)
        return base

    monkeypatch.setattr(loading, "fetch_weights", fetch_weights)
    model = load("some/where", num_classes=3, revision="abc123", rgb="mean")
    assert model.origin is not None
    assert (model.origin.revision, model.origin.rgb) == ("abc123", "mean")
    path = save(tmp_path / "a.safetensors", petl.adapt(model, petl.LoRA()))
    assert load_adapter(path).model.origin == model.origin
    assert asked == ["abc123", "abc123"]


def test_one_changed_number_of_the_base_is_noticed(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    arrays = surgery.arrays(AST(TINY, rngs=nnx.Rngs(0)))
    arrays["blocks/0/mlp/up/bias"] = arrays["blocks/0/mlp/up/bias"].at[7].add(1e-6)
    write_native(base, arrays, TINY)
    with pytest.raises(DataError, match="fingerprint"):
        load_adapter(path)


def test_a_base_that_moved_is_explained_and_can_be_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_weights, "find_user_cache", lambda: tmp_path)  # of this test alone
    model = trained(base, petl.SoftMoA(reduction=8.0))
    path = save(tmp_path / "a.safetensors", model)
    moved = tmp_path / "elsewhere" / "weights.safetensors"
    moved.parent.mkdir()
    base.rename(moved)
    with pytest.raises(DataError) as caught:
        load_adapter(path)
    message = str(caught.value)
    assert "base=" in message and str(base) in message and "\n" not in message
    # Weights that were loaded from their new place are found by their fingerprint.
    for given in (moved, str(moved), load(moved, num_classes=3), None):
        found = load_adapter(path, base=given)
        np.testing.assert_array_equal(logits(found.model), logits(model))
    with pytest.raises(DataError, match="nowhere"):
        load_adapter(path, base=tmp_path / "nowhere.safetensors")


def test_the_model_given_as_base_is_left_alone(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    given = load(base, num_classes=3)
    before = logits(given)
    load_adapter(path, base=given)
    assert not surgery.arrays(given, nnx.Param)
    np.testing.assert_array_equal(logits(given), before)


def test_length_pooling_and_head_travel_with_the_adapter(base: Path, tmp_path: Path) -> None:
    model = trained(base, petl.AAT(), frames=55, pool="mean_all", head_norm=False, scan=True)
    path = save(tmp_path / "a.safetensors", model)
    found = load_adapter(path)
    config = found.model.config
    assert (config.frames, config.pool, config.head_norm) == (55, "mean_all", False)
    assert not config.scan
    np.testing.assert_allclose(logits(found.model, 55), logits(model, 55), atol=1e-5)


@pytest.mark.slow
def test_random_weights_are_a_base_too(tmp_path: Path, shallow_tiny: None) -> None:
    options: dict[str, Any] = {"frames": 39, "num_classes": 3}
    model = petl.adapt(load("random:tiny", seed=5, **options), petl.Linear())
    path = save(tmp_path / "a.safetensors", model)
    np.testing.assert_array_equal(logits(load_adapter(path).model), logits(model))


# Files that are something else, or no longer whole.


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"\x00" * 64, b"{}" * 9, os.urandom(3000)], ids=range(5)
)
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert read_info(path) is None
    with pytest.raises(DataError, match=r"a\.safetensors: not an adapter file"):
        load_adapter(path)


def test_weights_and_folders_are_no_adapters(base: Path, tmp_path: Path) -> None:
    for path, why in ((base, "not an adapter file"), (tmp_path, "has no adapter.safetensors")):
        with pytest.raises(DataError, match=why):
            load_adapter(path)


def test_every_cut_is_refused(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    content = path.read_bytes()
    for size in (1, 8, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="damaged"):
            load_adapter(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DataError, match="damaged"):
        load_adapter(path)


def test_a_flipped_byte_of_the_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x01
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        load_adapter(path)


def test_a_newer_format_is_refused(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))

    def newer(info: dict[str, Any]) -> None:
        info["format"] = FORMAT + 1
        info["versions"]["aatjax"] = "9.8.7"
        info["method"] = {"name": "not yet thought of"}

    rewrite(path, newer)
    with pytest.raises(DataError, match=f"format {FORMAT + 1} is newer.*aatjax 9.8.7"):
        load_adapter(path)


@pytest.mark.parametrize(
    "field", ["format", "classes", "multi_label", "frontend", "model", "method", "base"]
)
def test_broken_metadata_is_refused(field: str, base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.Linear()))
    rewrite(path, lambda info: info.pop(field))
    with pytest.raises(DataError, match=r"a\.safetensors"):
        load_adapter(path)
    rewrite(path, lambda info: info.update({field: None}))
    with pytest.raises(DataError, match=r"a\.safetensors"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("part", "key"), [("method", "depth"), ("model", "depht"), ("frontend", "meen")]
)
def test_fields_of_another_version_are_refused(
    part: str, key: str, base: Path, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    rewrite(path, lambda info: info[part].update({key: 1}))
    with pytest.raises(DataError, match=key):
        load_adapter(path)


def test_a_missing_or_foreign_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    tensors = load_file(path)
    gone = next(name for name in tensors if "w_up" in name)
    rewrite(path, tensors={name: v for name, v in tensors.items() if name != gone})
    with pytest.raises(DataError, match=gone):
        load_adapter(path)
    rewrite(path, tensors={**tensors, "blocks/9/mlp/x": np.zeros(3, np.float32)})
    with pytest.raises(DataError, match="blocks/9/mlp/x is not in the model"):
        load_adapter(path)
    rewrite(path, tensors={**tensors, gone: np.zeros((1, 2), np.float32)})
    with pytest.raises(DataError, match=f"{gone} has shape"):
        load_adapter(path)


# Writing.


def test_a_write_that_fails_leaves_what_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5."""
    model = trained(base, petl.AAT())
    path = save(tmp_path / "out" / "a.safetensors", model)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(WriteError, match=f"{name}.*No space left on device") as caught:
            save(tmp_path / "out" / name, model)
        assert caught.value.exit_code == 74
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_folder_that_is_a_file_is_a_write_error(base: Path, tmp_path: Path) -> None:
    model = trained(base, petl.Linear())
    with pytest.raises(WriteError, match=r"base\.safetensors"):
        save(base / "a.safetensors", model)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="folder"):
        save(tmp_path / "folder", model)
    assert not list((tmp_path / "folder").iterdir())


def test_a_model_from_elsewhere_cannot_be_saved(base: Path, tmp_path: Path) -> None:
    for model in (load(base, num_classes=3), petl.adapt(AST(TINY, rngs=nnx.Rngs(0)), petl.AAT())):
        with pytest.raises((DataError, UsageError), match=r"aatjax\.load and aatjax\.adapt"):
            save(tmp_path / "a.safetensors", model)
    assert not (tmp_path / "a.safetensors").exists()


def test_initial_values_that_a_file_replaces_are_not_computed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base, petl.LoRA())
    path = save(tmp_path / "a.safetensors", model)
    monkeypatch.setattr(nnx, "Rngs", None)
    found = load_adapter(path)
    monkeypatch.undo()
    np.testing.assert_array_equal(logits(found.model), logits(model))
    assert found.model.first_trained == model.first_trained
    assert found.model.loaded is not None
    arrays = surgery.fetch_arrays(found.model, surgery.Frozen)
    assert not found.model.loaded.find_changed(arrays)


def test_frozen_arrays_that_a_method_makes_are_made_again(base: Path, tmp_path: Path) -> None:
    """As published, positions are zero: the file does not hold them."""
    model = trained(base, petl.Adapter(as_published=True))
    path = save(tmp_path / "a.safetensors", model)
    assert "embed/pos" not in load_file(path)
    found = load_adapter(path).model
    assert not np.asarray(surgery.variables(found)["embed/pos"][...]).any()
    np.testing.assert_array_equal(logits(found), logits(model))
