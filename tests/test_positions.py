"""Position embeddings for other input lengths: cut windows, interpolation, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aatjax.errors import DataError, UsageError
from aatjax.models.positions import resize_positions


def table(source, prefix=2, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, prefix + source[0] * source[1], dim)).astype(np.float32)


def by_torch(pos, source, target, prefix):
    """The published procedure with torch: cut or interpolate time, then frequency."""
    grid = torch.from_numpy(pos[0, prefix:]).reshape(*source, -1).permute(2, 0, 1)[None]
    (f0, t0), (f, t) = source, target

    def bilinear(x, size):
        return torch.nn.functional.interpolate(x, size=size, mode="bilinear")

    if t < t0:
        left = int(t0 / 2) - int(t / 2)
        grid = grid[:, :, :, left : left + t]
    elif t > t0:
        grid = bilinear(grid, (f0, t))
    if f < f0:
        low = int(f0 / 2) - int(f / 2)
        grid = grid[:, :, low : low + f, :]
    elif f > f0:
        grid = bilinear(grid, (f, t))
    patches = grid[0].permute(1, 2, 0).reshape(1, f * t, -1).numpy()
    return np.concatenate([pos[:, :prefix], patches], axis=1)


@pytest.mark.parametrize(
    "source, target, start, stop",
    [
        (101, 9, 46, 55),
        (101, 12, 44, 56),
        (101, 39, 31, 70),
        (101, 49, 26, 75),
        (101, 50, 25, 75),
        (101, 79, 11, 90),
        (101, 99, 1, 100),
        (64, 12, 26, 38),
        (64, 39, 13, 52),
        (64, 50, 7, 57),
        (24, 12, 6, 18),
        (512, 511, 1, 512),
    ],
)
def test_published_windows(source, target, start, stop):
    pos = np.arange(source, dtype=np.float32).reshape(1, source, 1)
    cut = resize_positions(pos, (1, source), (1, target), prefix=0, rule="audioset")
    np.testing.assert_array_equal(cut[0, :, 0], np.arange(start, stop))


@pytest.mark.parametrize(
    "rule, source, target",
    [
        ("audioset", (12, 101), (12, 50)),
        ("audioset", (12, 101), (12, 299)),
        ("audioset", (12, 101), (8, 64)),
        ("audioset", (12, 101), (25, 120)),
        ("imagenet", (24, 24), (12, 101)),
        ("imagenet", (14, 14), (12, 9)),
        ("imagenet", (14, 14), (20, 20)),
        ("ssast", (8, 64), (12, 50)),
        ("ssast", (8, 64), (12, 101)),
        ("ssast", (8, 64), (4, 30)),
        ("ssast", (1, 512), (1, 1023)),
        ("ssast", (1, 512), (1, 127)),
    ],
)
def test_agrees_with_torch(rule, source, target):
    pos = table(source)
    got = resize_positions(pos, source, target, prefix=2, rule=rule)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_allclose(got, by_torch(pos, source, target, 2), atol=5e-6)
    np.testing.assert_array_equal(got[:, :2], pos[:, :2])


def test_the_hard_coded_eight_rows_of_ssast_change_nothing_for_frame_models():
    pos = table((1, 6), prefix=0)
    grid = torch.from_numpy(pos).reshape(1, 1, 6, 3).permute(0, 3, 1, 2)
    up = torch.nn.functional.interpolate(grid, size=(8, 11), mode="bilinear")
    back = torch.nn.functional.interpolate(up, size=(1, 11), mode="bilinear")
    got = resize_positions(pos, (1, 6), (1, 11), prefix=0, rule="ssast")
    np.testing.assert_allclose(got[0], back[0, :, 0].T.numpy(), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 2),
)
def test_any_grid_agrees_with_torch_and_stays_in_range(source, target, prefix):
    pos = table(source, prefix)
    got = resize_positions(pos, source, target, prefix=prefix, rule="ssast")
    np.testing.assert_allclose(got, by_torch(pos, source, target, prefix), atol=5e-6)
    patches = pos[:, prefix:]
    assert got[:, prefix:].max() <= patches.max() + 1e-5
    assert got[:, prefix:].min() >= patches.min() - 1e-5


def test_jax_in_jax_out_and_half_precision_kept():
    pos = table((3, 4))
    numpy_result = resize_positions(pos, (3, 4), (5, 3), prefix=2, rule="audioset")
    jax_result = resize_positions(jnp.asarray(pos), (3, 4), (5, 3), prefix=2, rule="audioset")
    assert isinstance(jax_result, jnp.ndarray)
    np.testing.assert_array_equal(np.asarray(jax_result), numpy_result)
    half = pos.astype(np.float16)
    assert resize_positions(half, (3, 4), (5, 3), prefix=2, rule="audioset").dtype == np.float16


def test_same_grid_is_untouched():
    pos = table((12, 101))
    assert resize_positions(pos, (12, 101), (12, 101), prefix=2, rule="audioset") is pos


def test_refusals():
    pos = table((3, 4))
    with pytest.raises(DataError, match=r"14 positions .* 3 x 5"):
        resize_positions(pos, (3, 5), (3, 3), prefix=2, rule="audioset")
    with pytest.raises(UsageError, match="square"):
        resize_positions(pos, (3, 4), (3, 3), prefix=2, rule="imagenet")
    with pytest.raises(UsageError, match="grids"):
        resize_positions(pos, (3, 4), (0, 3), prefix=2, rule="audioset")
