"""Weights in memory: a transformers model, a state dictionary, dictionaries of arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ast_oracle import file_tensors, memory_tensors, original_tensors, random_hf_ast

import aatjax
from aatjax import petl
from aatjax.convert.write import write_hf
from aatjax.errors import DataError, UsageError
from aatjax.train.adapter_file import save_adapter


@pytest.fixture(scope="module")
def hf():
    return random_hf_ast(id2label={i: f"sound {i}" for i in range(5)})


def clip(frames: int = 128) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, frames, 128)).astype(np.float32)


def test_a_transformers_model_loads_with_its_labels_and_logits(hf):
    model = aatjax.load(hf)
    with torch.no_grad():
        expected = hf(torch.from_numpy(clip())).logits.numpy()
    np.testing.assert_allclose(model(clip()), expected, atol=2e-4)
    assert model.labels == tuple(f"sound {i}" for i in range(5))
    assert model.config.eps == hf.config.layer_norm_eps
    assert aatjax.load(hf, num_classes=3).config.num_classes == 3
    assert aatjax.load(hf, num_classes=3, frames=96)(clip(96)).shape == (2, 3)


@pytest.mark.parametrize("form", ["state", "file", "numpy", "jax", "half", "original"])
def test_dictionaries_of_tensors_load(form, hf):
    expected = np.asarray(aatjax.load(hf)(clip()))
    tensors = memory_tensors(hf) if form == "state" else file_tensors(hf)
    if form == "numpy":
        tensors = {name: value.numpy() for name, value in tensors.items()}
    if form == "jax":
        tensors = {name: jnp.asarray(value.numpy()) for name, value in tensors.items()}
    if form == "half":
        tensors = {name: value.bfloat16() for name, value in tensors.items()}
    if form == "original":
        tensors = original_tensors(hf)
    found = aatjax.load(tensors)(clip())
    np.testing.assert_allclose(found, expected, atol=0.2 if form == "half" else 2e-4)


def test_an_adapter_on_weights_in_memory_comes_back_with_them(hf, tmp_path):
    base = aatjax.load(hf, num_classes=2)
    path = save_adapter(
        tmp_path / "a.safetensors",
        aatjax.adapt(base, petl.AAT()),
        classes=("a", "b"),
        multi_label=False,
        frontend=aatjax.FrontEnd(frames=128),
    )
    found = aatjax.load_adapter(path, base=base)
    np.testing.assert_array_equal(found.model(clip()), base(clip()))
    with pytest.raises(DataError, match=r"given in memory: give them again.* base="):
        aatjax.load_adapter(path)
    from aatjax.convert.read import read_checkpoint

    read = read_checkpoint(hf)
    write_hf(tmp_path / "hf", read.params, read.config)
    with pytest.raises(DataError, match="fingerprint"):
        aatjax.load_adapter(path, base=random_base(tmp_path))
    assert aatjax.load_adapter(path, base=tmp_path / "hf").classes == ("a", "b")


def random_base(folder):
    other = random_hf_ast(seed=1)
    other.save_pretrained(folder / "other")
    return folder / "other"


@pytest.mark.parametrize("given", [3, {}, ["x"], {"x": "y"}, {"x": np.ones(2)}])
def test_what_is_no_weights_is_refused(given):
    with pytest.raises((UsageError, DataError)) as info:
        aatjax.load(given)
    assert "\n" not in str(info.value)


def test_arrays_by_our_own_paths_say_how_they_are_loaded(hf):
    from aatjax import surgery

    with pytest.raises(DataError, match="write_native"):
        aatjax.load(surgery.fetch_arrays(aatjax.load(hf)))


def test_other_architectures_are_named(hf):
    with pytest.raises(DataError, match="weights in memory: not AST weights"):
        aatjax.load(torch.nn.Linear(3, 4))
