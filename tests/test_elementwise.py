"""GELU and LayerNorm against float64 PyTorch, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aatjax_kernels.elementwise import gelu, layer_norm

EPS = 1e-6


def gap(mine: jax.Array, theirs: torch.Tensor) -> float:
    wanted = theirs.detach().numpy()
    found = np.asarray(mine.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gelu(dtype, bound):
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.concatenate([rng.normal(size=300) * 4, [0.0, -30.0, 30.0]]), dtype)
    dout = jnp.asarray(rng.normal(size=303), dtype)
    wide = torch.tensor(np.asarray(x.astype(jnp.float32), np.float64), requires_grad=True)
    out = torch.nn.functional.gelu(wide)
    (grad,) = torch.autograd.grad(out, wide, torch.tensor(np.asarray(dout, np.float64)))
    mine, pull = jax.vjp(gelu, x)
    assert mine.dtype == pull(dout)[0].dtype == x.dtype
    assert gap(mine, out) < bound
    assert gap(pull(dout)[0], grad) < bound


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_layer_norm(dtype, bound, offset):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 24)) + offset, dtype)
    scale, bias = (jnp.asarray(rng.normal(size=24), jnp.float32) for _ in range(2))
    dout = jnp.asarray(rng.normal(size=(2, 5, 24)), jnp.float32)
    given = [
        torch.tensor(np.asarray(v.astype(jnp.float32), np.float64), requires_grad=True)
        for v in (x, scale, bias)
    ]
    out = torch.nn.functional.layer_norm(given[0], (24,), *given[1:], eps=EPS)
    grads = torch.autograd.grad(out, given, torch.tensor(np.asarray(dout, np.float64)))
    mine, pull = jax.vjp(lambda *values: layer_norm(*values, EPS), x, scale, bias)
    assert mine.dtype == jnp.float32
    slack = 20 if offset else 1  # a mean of 50 takes digits of every deviation
    for one, other in zip((mine, *pull(dout)), (out, *grads), strict=True):
        assert gap(one, other) < bound * slack
    assert pull(dout)[0].dtype == x.dtype


def test_only_the_input_is_kept():
    x = jnp.ones((3, 7, 16), jnp.bfloat16)
    row = jnp.ones(16)
    _, pull = jax.vjp(gelu, x)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [x.shape]
    _, pull = jax.vjp(lambda *values: layer_norm(*values, EPS), x, row, row)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim == 3]
    assert len(kept) == 1 and kept[0].dtype == jnp.bfloat16
