"""Files that aatjax writes: what transformers loads, atomically, or a reason why not."""

import dataclasses
import errno
import json

import numpy as np
import pytest
import torch
from ast_oracle import file_tensors, random_hf_ast, write_layout
from safetensors.numpy import load_file

import aatjax
from aatjax.convert import read_checkpoint, write_hf, write_native, write_orbax
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.io import atomic

LABELS = ("dog", "rain", "bell", "sägen", "train")


@pytest.fixture(scope="module")
def model():
    return random_hf_ast(layer_norm_eps=1e-7, num_attention_heads=4)


@pytest.fixture
def source(model, tmp_path):
    return read_checkpoint(write_layout(model, "hf", tmp_path / "source"))


def test_transformers_loads_what_is_written(model, source, tmp_path):
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    notes = write_hf(tmp_path / "out", source.params, source.config, LABELS, mean=-6.8, std=5.5)
    assert notes == ()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    loaded, info = ASTForAudioClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    x = torch.randn(2, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x).logits, model(x).logits, rtol=0, atol=1e-6)
    assert loaded.config.layer_norm_eps == 1e-7 and loaded.config.num_attention_heads == 4
    assert [loaded.config.id2label[i] for i in range(5)] == list(LABELS)
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.mean, extractor.std, extractor.max_length) == (-6.8, 5.5, 128)
    again = read_checkpoint(tmp_path / "out")
    assert again.config == source.config and again.labels == LABELS


def test_file_names_are_those_of_every_version_of_transformers(model, source, tmp_path):
    """Older versions read only these names, so they are compared with files as published."""
    write_hf(tmp_path / "out", source.params, source.config)
    got = load_file(tmp_path / "out/model.safetensors")
    want = file_tensors(model)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value.numpy())
    headless = {n: v for n, v in source.params.items() if not n.startswith("head/")}
    write_hf(tmp_path / "bare", headless, source.config)
    assert json.loads((tmp_path / "bare/config.json").read_text())["architectures"] == ["ASTModel"]
    from transformers import ASTModel

    _, info = ASTModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(("patch", "stride"), [((32, 8), (32, 8)), ((128, 4), (128, 2))])
def test_patches_that_are_higher_than_wide_are_written_as_square_ones(patch, stride, tmp_path):
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    model = aatjax.load(
        f"random:d32x2,patch={patch[0]}x{patch[1]},stride={stride[0]}x{stride[1]},frames=99",
        num_classes=3,
    )
    notes = write_hf(tmp_path / "out", aatjax.surgery.arrays(model), model.config)
    assert any("zeros" in note for note in notes)
    theirs = ASTForAudioClassification.from_pretrained(tmp_path / "out").eval()
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    extract = ASTFeatureExtractor.from_pretrained(tmp_path / "out")
    x = extract(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
    assert x.shape[1] == 99 + patch[0] - patch[1]
    with torch.no_grad():
        theirs_of_x = theirs(x).logits.numpy()
        theirs_of_more = theirs(torch.cat([x[:, :99], 7 + 0 * x[:, 99:]], 1)).logits.numpy()
    np.testing.assert_allclose(theirs_of_x, model(x[:, :99].numpy()), atol=2e-6)
    np.testing.assert_array_equal(theirs_of_x, theirs_of_more)
    again = aatjax.load(tmp_path / "out")
    np.testing.assert_allclose(theirs_of_x, again(x.numpy()), atol=2e-6)


def test_two_epsilons_are_noted(source, tmp_path):
    config = dataclasses.replace(source.config, eps=1e-6, head_eps=1e-5)
    (note,) = write_hf(tmp_path / "out", source.params, config)
    assert "1e-06" in note and "1e-05" in note
    assert read_checkpoint(tmp_path / "out").config.eps == 1e-6


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"distilled": False}, "no distillation token"),
        ({"pool": "mean_all"}, "pools mean_all"),
        ({"head_norm": False}, "head has no LayerNorm"),
        ({"patch": (16, 32)}, "square"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(source, changes, reason, tmp_path):
    config = dataclasses.replace(source.config, **changes)
    with pytest.raises(UsageError, match=reason):
        write_hf(tmp_path / "out", source.params, config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_native, write_orbax, write_hf])
def test_parameters_must_fit_the_config(source, write, tmp_path):
    path = tmp_path / "out"
    wrong = dict(source.params)
    wrong["norm/scale"] = np.zeros(3, np.float32)
    wrong["extra"] = wrong.pop("norm/bias")
    with pytest.raises(DataError, match=r"norm/bias is missing, norm/scale is .* extra is unknown"):
        write(path, wrong, source.config)
    with pytest.raises(UsageError, match="2 labels for 5 classes"):
        write(path, source.params, source.config, ["a", "b"])
    assert not path.exists()


def test_float16_must_hold_the_numbers(source, tmp_path):
    large = {**source.params, "head/linear/bias": np.full(5, 1e6, np.float32)}
    with pytest.raises(DataError, match="head/linear/bias exceeds"):
        write_native(tmp_path / "a.safetensors", large, source.config, dtype="float16")
    write_native(tmp_path / "a.safetensors", source.params, source.config, dtype="float16")
    half = (tmp_path / "a.safetensors").stat().st_size
    write_native(tmp_path / "a.safetensors", source.params, source.config)
    assert 1.9 < (tmp_path / "a.safetensors").stat().st_size / half < 2.1


@pytest.mark.parametrize("write", [write_native, write_orbax, write_hf])
def test_a_failed_write_leaves_nothing(source, write, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "folder"
    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(WriteError, match="No space left") as caught:
        write(folder / "out", source.params, source.config)
    assert caught.value.exit_code == 74 and "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_failed_write_keeps_the_older_file(source, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_native(path, source.params, source.config)
    before = path.read_bytes()

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic.os, "replace", broken)
    with pytest.raises(WriteError):
        write_native(path, source.params, source.config, LABELS)
    assert (
        path.read_bytes() == before and [p.name for p in tmp_path.iterdir()].count(path.name) == 1
    )
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_folders_are_not_written_over(source, tmp_path):
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", source.params, source.config)
    for write in (write_hf, write_orbax):
        with pytest.raises(WriteError, match="not an empty folder"):
            write(tmp_path / "out", source.params, source.config)
    assert read_checkpoint(tmp_path / "out").has_head


def test_unwritable_place(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        write_native(tmp_path / "file/a.safetensors", source.params, source.config)


def test_the_extractor_statistics_beside_hugging_face_weights_come_along(tmp_path):
    model = random_hf_ast(**{"num_labels": 5})
    folder = write_layout(model, "hf", tmp_path / "hf")
    assert read_checkpoint(folder).statistics is None
    (folder / "preprocessor_config.json").write_text('{"mean": -6.845978, "std": 5.5654526}')
    checkpoint = read_checkpoint(folder)
    assert checkpoint.statistics == (-6.845978, 5.5654526)
    path = tmp_path / "native.safetensors"
    write_native(path, checkpoint.params, checkpoint.config, statistics=checkpoint.statistics)
    assert read_checkpoint(path).statistics == checkpoint.statistics
    (folder / "preprocessor_config.json").write_text('{"mean": -6.8, "std": 0}')
    with pytest.raises(DataError, match="statistics"):
        read_checkpoint(folder)
