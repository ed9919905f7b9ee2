"""Derivatives of a whole model: reverse mode, and with plain operations every other kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from petl_cases import make_clips, make_model, randomize
from slow_cases import mark_slow

import aatjax
from aatjax import petl, surgery

CLIPS = make_clips()
METHODS = [
    petl.SoftMoA(width=3),
    petl.AAT(),
    petl.Adapter(block="conformer"),
    petl.LoRA(),
    petl.Prefix(tokens=2),
    petl.DenseMoA(width=3),
]
FAST = {(METHODS[0],), (METHODS[3],)}


def split(method, implementation, **changes):
    """The loss of a model as a function of its trainable numbers, and those."""
    base = make_model(implementation=implementation, **changes)
    parts = surgery.split(randomize(aatjax.adapt(base, method)))
    flat, unravel = ravel_pytree(parts.trainable)

    def compute_loss(flat, x=CLIPS):
        model = surgery.join(parts.graphdef, unravel(flat), parts.stats, parts.frozen)
        return jnp.square(model(x)).mean()

    return compute_loss, flat


@pytest.mark.parametrize(
    "method", mark_slow([(m,) for m in METHODS], FAST), ids=lambda method: method.name
)
def test_the_reference_has_forward_mode_and_second_derivatives(method):
    compute_loss, flat = split(method, "reference")
    fastest, same = split(method, "fastest")
    np.testing.assert_array_equal(flat, same)
    along = jnp.asarray(np.random.default_rng(0).normal(size=flat.shape), jnp.float32)
    find_gradient = jax.jit(jax.grad(compute_loss))
    gradient = find_gradient(flat)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(fastest))(flat), atol=2e-5, rtol=2e-4)
    slope = jax.jit(lambda f: jax.jvp(compute_loss, (f,), (along,))[1])(flat)
    np.testing.assert_allclose(slope, gradient @ along, rtol=1e-3)
    curved = jax.jit(lambda f: jax.jvp(jax.grad(compute_loss), (f,), (along,))[1])(flat)
    step = 1e-3
    moved = [find_gradient(flat + sign * step * along) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * step)
    error = jnp.linalg.norm(curved - expected) / jnp.linalg.norm(expected)
    assert jnp.linalg.norm(expected) > 1e-3 and error < 0.03


@pytest.mark.slow
def test_a_loaded_model_has_a_slope_along_its_input(shallow_tiny):
    options = dict(num_classes=3, frames=98)
    model = aatjax.load("random:tiny", implementation="reference", **options)
    x = jnp.ones((1, 98, 128))
    slope = jax.jvp(model, (x,), (x,))[1]
    plain = aatjax.load("random:tiny", **options)
    np.testing.assert_allclose(model(x), plain(x), atol=1e-5)
    expected = (model(1.01 * x) - model(0.99 * x)) / 0.02
    np.testing.assert_allclose(slope, expected, atol=1e-3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(plain, (x,), (x,))


@pytest.mark.parametrize("implementation", ["fastest", "reference"])
@pytest.mark.parametrize("scan", [False, True])
def test_gradients_of_each_clip_by_vmap_add_up_to_that_of_the_batch(implementation, scan):
    compute_loss, flat = split(petl.SoftMoA(width=3), implementation, scan=scan)
    find = jax.grad(compute_loss)
    each = jax.jit(jax.vmap(lambda x: find(flat, x[None])))(make_clips())
    assert each.shape == (2, flat.size)
    np.testing.assert_allclose(each.mean(axis=0), jax.jit(find)(flat), atol=1e-5, rtol=1e-4)
