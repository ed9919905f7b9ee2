"""Logits against transformers' ASTForAudioClassification, through every file layout."""

import dataclasses

import ast_oracle
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import aatjax
from aatjax import surgery
from aatjax.models.pool import Pool

TINY = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def oracle_logits(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).logits.numpy()


def check(model: aatjax.AST, oracle: torch.nn.Module, frames: int, tolerance: float = 1e-4) -> None:
    x = np.random.default_rng(1).normal(size=(2, frames, 128)).astype(np.float32)
    expected = oracle_logits(oracle, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, atol=tolerance)


@pytest.fixture(scope="module")
def tiny():
    return ast_oracle.random_hf_ast(**TINY, max_length=128, num_labels=7)


@pytest.mark.parametrize("layout", ast_oracle.LAYOUTS)
def test_logits_are_those_of_transformers_through_every_layout(tiny, layout, tmp_path):
    path = ast_oracle.write_layout(tiny, layout, tmp_path)
    headless = layout in ast_oracle.HEADLESS
    model = aatjax.load(
        path, num_classes=7 if headless else None, frames=128, mels=128, pool="cls_dist"
    )
    if headless:
        head = {
            "head/norm/scale": tiny.classifier.layernorm.weight,
            "head/norm/bias": tiny.classifier.layernorm.bias,
            "head/linear/kernel": tiny.classifier.dense.weight.T,
            "head/linear/bias": tiny.classifier.dense.bias,
        }
        values = {name: value.detach().numpy() for name, value in head.items()}
        surgery.assign(model, values, what="the test")
    half = {"original_half": 0.05, "original_bfloat16": 0.5}
    check(model, tiny, 128, half.get(layout, 1e-4))


@pytest.mark.parametrize("changes", [dict(scan=True, remat=True)])
def test_scanned_and_rematerialised_blocks_give_the_same_logits(tiny, changes, tmp_path):
    path = ast_oracle.write_layout(tiny, "hf", tmp_path)
    check(aatjax.load(path, **changes), tiny, 128)


def cut(oracle: torch.nn.Module, frames: int) -> torch.nn.Module:
    """The oracle at another length: the centre columns of its 12 x 101 position grid."""
    columns = (frames - 16) // 10 + 1
    start = 50 - columns // 2
    embeddings = oracle.audio_spectrogram_transformer.embeddings
    pos = embeddings.position_embeddings.detach()
    grid = pos[:, 2:].reshape(1, 12, 101, -1)[:, :, start : start + columns]
    embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([pos[:, :2], grid.reshape(1, 12 * columns, -1)], dim=1)
    )
    return oracle


@pytest.mark.parametrize("frames", [pytest.param(1024, marks=pytest.mark.slow), 500])
def test_tiny_at_the_published_lengths(frames, tmp_path):
    oracle = ast_oracle.random_hf_ast(**TINY, max_length=1024, num_labels=7)
    path = ast_oracle.write_layout(oracle, "original", tmp_path)
    check(
        aatjax.load(path, frames=frames), oracle if frames == 1024 else cut(oracle, frames), frames
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("frames", [1024, 500])
def test_base_at_the_published_lengths(frames, layout, tmp_path):
    oracle = ast_oracle.random_hf_ast(**BASE, max_length=1024, num_labels=527)
    with torch.no_grad():
        for value in oracle.parameters():
            if value.ndim == 2:
                value.mul_(0.4)  # products of the size that pretrained weights give
    path = ast_oracle.write_layout(oracle, layout, tmp_path)
    check(
        aatjax.load(path, frames=frames), oracle if frames == 1024 else cut(oracle, frames), frames
    )


def test_bfloat16_stays_close_and_gives_float32_logits(tiny, tmp_path):
    path = ast_oracle.write_layout(tiny, "hf", tmp_path)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 128, 128)), jnp.float32)
    exact, rounded = (aatjax.load(path, dtype=d)(x) for d in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.float32
    relative = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-6 < relative < 0.03


def test_pooling_is_the_mean_of_the_tokens_it_names(tiny, tmp_path):
    path = ast_oracle.write_layout(tiny, "hf", tmp_path)
    x = np.random.default_rng(1).normal(size=(2, 128, 128)).astype(np.float32)
    with torch.no_grad():
        tokens = tiny.audio_spectrogram_transformer(torch.from_numpy(x)).last_hidden_state.numpy()
    rows = {"cls_dist": [0, 1], "cls": [0], "mean_patches": range(2, 146), "mean_all": range(146)}
    model = aatjax.load(path, pool="mean_all")
    found = model.tokens(jnp.asarray(x))
    for pool, chosen in rows.items():
        module = Pool(dataclasses.replace(model.config, pool=pool))
        expected = tokens[:, list(chosen)].mean(axis=1)
        np.testing.assert_allclose(module(found), expected, atol=1e-4, err_msg=pool)
