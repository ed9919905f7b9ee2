"""The soft mixture op against float64 numpy written from its equations, and its invariants."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from slow_cases import mark_slow

from aatjax import ops
from aatjax.errors import UsageError
from aatjax_kernels.soft_moe import reference, soft_moe

NAMES = ("x", "phi", "w_down", "b_down", "w_up", "b_up")
Inputs = dict[str, np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def soft_moe_numpy(x, phi, w_down, b_down, w_up, b_up) -> np.ndarray:
    """Loops over clips, experts, slots and tokens in float64: nothing batched, nothing shared."""
    x, phi, w_down, b_down, w_up, b_up = (
        np.asarray(a, np.float64) for a in (x, phi, w_down, b_down, w_up, b_up)
    )
    experts, slots = phi.shape[1:]
    out = np.zeros_like(x)
    for clip in range(x.shape[0]):
        tokens = x[clip]
        answers, scores = [], []
        for e in range(experts):
            for p in range(slots):
                score = tokens @ phi[:, e, p]
                slot = softmax(score) @ tokens
                answers.append(gelu(slot @ w_down[e] + b_down[e]) @ w_up[e] + b_up[e])
                scores.append(score)
        for token in range(tokens.shape[0]):
            out[clip, token] = softmax(np.array(scores)[:, token]) @ np.array(answers)
    return out


def inputs(b=2, n=7, d=6, e=3, p=2, r=4, seed=0) -> Inputs:
    rng = np.random.default_rng(seed)
    shapes = dict(x=(b, n, d), phi=(d, e, p), w_down=(e, d, r), b_down=(e, r))
    shapes |= dict(w_up=(e, r, d), b_up=(e, d))
    return {name: rng.normal(size=shapes[name]).astype(np.float32) for name in NAMES}


@jax.jit
def run(*arrays: jax.Array) -> jax.Array:
    return ops.soft_moe(*arrays)


def op(values: Inputs) -> np.ndarray:
    return np.asarray(run(*(jnp.asarray(values[name]) for name in NAMES)))


def finite_differences(f, values: Inputs, step: float = 1e-5) -> Inputs:
    """Central differences of the scalar function f of float64 arrays, entry by entry."""
    values = {name: np.asarray(value, np.float64) for name, value in values.items()}
    slopes = {}
    for name, value in values.items():
        slope = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + step
            above = f(values)
            value[index] = kept - step
            below = f(values)
            value[index] = kept
            slope[index] = (above - below) / (2 * step)
        slopes[name] = slope
    return slopes


def test_values_are_those_of_the_equations():
    values = inputs()
    expected = soft_moe_numpy(*values.values())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(op(values), expected, rtol=1e-5, atol=1e-5)


def test_every_cotangent_is_that_of_finite_differences():
    values = inputs(b=2, n=4, d=5, e=2, p=2, r=3)
    seed = np.random.default_rng(9).normal(size=values["x"].shape)
    expected = finite_differences(lambda v: (soft_moe_numpy(*v.values()) * seed).sum(), values)
    _, pull = jax.vjp(ops.soft_moe, *(jnp.asarray(values[name]) for name in NAMES))
    for name, gradient in zip(NAMES, pull(jnp.asarray(seed, jnp.float32)), strict=True):
        scale = np.abs(expected[name]).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(gradient, expected[name], atol=2e-5 * scale, err_msg=name)


def test_dispatch_sums_to_one_over_tokens_and_combine_over_all_slots():
    values = inputs()
    dispatch, combine = reference.routing(jnp.asarray(values["x"]), jnp.asarray(values["phi"]))
    assert dispatch.shape == combine.shape == (2, 7, 3, 2)
    np.testing.assert_allclose(dispatch.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(combine.sum(axis=(2, 3)), 1, atol=1e-6)
    assert float(dispatch.std()) > 0.01
    assert float(combine.std()) > 0.01


def test_without_phi_every_token_gets_the_mean_of_the_experts_of_the_mean_token():
    values = inputs()
    values["phi"] *= 0
    mean = values["x"].astype(np.float64).mean(axis=1)
    answers = [
        gelu(mean @ values["w_down"][e] + values["b_down"][e]) @ values["w_up"][e]
        + values["b_up"][e]
        for e in range(3)
    ]
    expected = np.broadcast_to(np.mean(answers, axis=0)[:, None], values["x"].shape)
    np.testing.assert_allclose(op(values), expected, rtol=1e-5, atol=1e-5)


def test_one_expert_with_one_slot_gives_every_token_the_same_vector():
    values = inputs(e=1, p=1)
    _, combine = reference.routing(jnp.asarray(values["x"]), jnp.asarray(values["phi"]))
    np.testing.assert_array_equal(combine, 1)
    out = op(values)
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))


def test_permuted_tokens_permute_the_output():
    values = inputs()
    order = np.random.default_rng(3).permutation(7)
    permuted = op({**values, "x": values["x"][:, order]})
    np.testing.assert_allclose(permuted, op(values)[:, order], rtol=1e-5, atol=1e-6)
    assert np.abs(permuted - op(values)).max() > 0.1


def test_the_order_of_experts_with_their_phi_does_not_matter():
    values = inputs()
    order = [2, 0, 1]
    alone = {**values, "phi": values["phi"][:, order]}
    permuted = alone | {name: values[name][order] for name in NAMES[2:]}
    np.testing.assert_allclose(op(permuted), op(values), rtol=1e-5, atol=1e-6)
    assert np.abs(op(alone) - op(values)).max() > 0.1, "phi alone permuted must matter"


def test_a_zero_up_projection_gives_zero():
    values = inputs()
    values["w_up"] *= 0
    values["b_up"] *= 0
    np.testing.assert_array_equal(op(values), 0)


def test_clips_are_independent():
    values = inputs()
    alone = op({**values, "x": values["x"][:1]})
    np.testing.assert_allclose(op(values)[:1], alone, rtol=1e-6, atol=1e-6)


def test_large_scores_stay_finite():
    values = inputs()
    values["phi"] *= 1e4
    assert np.isfinite(op(values)).all()
    np.testing.assert_allclose(op(values), soft_moe_numpy(*values.values()), rtol=1e-4, atol=1e-4)


def test_bfloat16_tokens_stay_close_and_keep_their_type():
    values = inputs(n=40, d=32, r=8)
    values["phi"] *= 0.1
    x = jnp.asarray(values["x"], jnp.bfloat16)
    out = ops.soft_moe(x, *(jnp.asarray(values[name]) for name in NAMES[1:]))
    assert out.dtype == jnp.bfloat16
    exact = soft_moe_numpy(*values.values())
    relative = np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact)
    assert 1e-5 < relative < 0.02


@pytest.mark.wrong_types
def test_an_unknown_implementation_is_refused_and_xla_is_the_default():
    values = [jnp.asarray(value) for value in inputs().values()]
    with pytest.raises(UsageError, match="no implementation 'cuda'"):
        ops.soft_moe(*values, implementation="cuda")  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        ops.soft_moe(*values, implementation="xla"), ops.soft_moe(*values)
    )
    with pytest.raises(ValueError, match="use 'xla', 'tpu', 'gpu', 'reference' or None"):
        inspect.unwrap(soft_moe)(*values, implementation="cuda")


# ------------------------------------------- every implementation, its backward pass included


def masked_numpy(values: Inputs, mask: np.ndarray | None, normalize: bool) -> np.ndarray:
    """The equations on the tokens inside the mask, clip by clip; scores by unit tokens if asked."""
    x = np.asarray(values["x"], np.float64)
    out = np.zeros_like(x)
    rest = [np.asarray(values[name], np.float64) for name in NAMES[2:]]
    phi = np.asarray(values["phi"], np.float64)
    for clip, tokens in enumerate(x):
        here = np.flatnonzero(np.ones(len(tokens), bool) if mask is None else mask[clip])
        if not len(here):
            continue
        valid = tokens[here]
        unit = valid / np.sqrt((valid**2).sum(-1, keepdims=True) + 1e-6) if normalize else valid
        scores = np.einsum("nd,dep->nep", unit, phi)
        down, b_down, up, b_up = rest
        dispatch = np.exp(scores - scores.max(axis=0))
        slots = np.einsum("nep,nd->epd", dispatch / dispatch.sum(axis=0), valid)
        hidden = gelu(np.einsum("epd,edr->epr", slots, down) + b_down[:, None])
        answers = np.einsum("epr,erd->epd", hidden, up) + b_up[:, None]
        flat = scores.reshape(len(here), -1)
        read = np.exp(flat - flat.max(axis=1, keepdims=True))
        out[clip, here] = read / read.sum(1, keepdims=True) @ answers.reshape(-1, x.shape[-1])
    return out


def masks(kind: str) -> np.ndarray | None:
    if kind == "all":
        return None
    mask = (np.random.default_rng(5).random((2, 5)) < 0.6) | (np.arange(5) == 2)
    if kind == "one clip empty":
        mask[1] = False
    return mask


KINDS = itertools.product(["all", "some", "one clip empty"], [False, True])


@pytest.mark.parametrize(
    ("kind", "normalize"), mark_slow(KINDS, lambda kind, normalize: normalize == (kind == "some"))
)
def test_values_and_cotangents_of_every_implementation(kind, normalize):
    values = inputs(b=2, n=5, d=4, e=2, p=2, r=3)
    mask = masks(kind)
    seed = np.random.default_rng(9).normal(size=values["x"].shape)
    out = masked_numpy(values, mask, normalize)
    slopes = finite_differences(
        lambda v: float((masked_numpy(v, mask, normalize) * seed).sum()), values
    )
    for implementation in ("reference", "xla"):

        @jax.jit
        def both(*arrays: jax.Array, name=implementation) -> tuple:
            valid = None if mask is None else jnp.asarray(mask)
            more = dict(mask=valid, normalize=normalize, implementation=name)
            found, pull = jax.vjp(lambda *a: ops.soft_moe(*a, **more), *arrays)
            return found, pull(jnp.asarray(seed, jnp.float32))

        found, gradients = both(*(jnp.asarray(values[name]) for name in NAMES))
        np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-5)
        for name, gradient in zip(NAMES, gradients, strict=True):
            scale = np.abs(slopes[name]).max()
            assert scale > 1e-3, name
            message = f"{implementation}: {name}"
            np.testing.assert_allclose(gradient, slopes[name], atol=2e-5 * scale, err_msg=message)


def gradients(implementation: str, values: Inputs, dtype: str = "float32", **more) -> list:
    x = jnp.asarray(values["x"], dtype)
    seed = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def loss(x, *rest):
        out = ops.soft_moe(x, *rest, implementation=implementation, **more)
        return (out.astype(jnp.float32) * seed).sum()

    rest = [jnp.asarray(values[name]) for name in NAMES[1:]]
    return list(jax.jit(jax.grad(loss, argnums=tuple(range(6))))(x, *rest))


def relative(one, other) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([1, 2, 7, 13, 110, 146]),
    d=st.sampled_from([8, 64, 192]),
    e=st.integers(1, 8),
    p=st.integers(1, 4),
    r=st.integers(1, 12),
    normalize=st.booleans(),
)
def test_the_backward_pass_is_that_of_autodiff(n, d, e, p, r, normalize):
    values = inputs(2, n, d, e, p, r, seed=n + d)
    values["phi"] *= 0.3
    values |= {name: values[name] * d**-0.5 for name in ("w_down", "w_up")}
    truth = gradients("reference", values, normalize=normalize)
    for name, found, expected in zip(
        NAMES, gradients("xla", values, normalize=normalize), truth, strict=True
    ):
        # Where a softmax is saturated, its small gradient is what two rounded sums leave.
        rounding = 1e-6 * max(float(jnp.linalg.norm(t)) for t in truth)
        error = float(jnp.linalg.norm(found - expected))
        assert error < 2e-5 * float(jnp.linalg.norm(expected)) + rounding, name


def test_bfloat16_gradients_stay_close():
    values = inputs(2, 110, 64, 7, 1, 6)
    values["phi"] *= 0.1
    values |= {name: values[name] * 0.1 for name in ("w_down", "w_up")}
    truth = gradients("reference", values)
    for name, found, expected in zip(
        NAMES, gradients("xla", values, "bfloat16"), truth, strict=True
    ):
        assert 0 < relative(found, expected) < 2e-2, name


def test_scores_of_ten_thousand_give_finite_gradients():
    values = inputs(n=20)
    values["phi"] *= 1e4
    assert all(bool(jnp.isfinite(g).all()) for g in gradients("xla", values))


def test_vmap_remat_and_scan():
    values = [jnp.asarray(value) for value in inputs().values()]
    x, rest = values[0], values[1:]
    plain = ops.soft_moe(x, *rest)
    mapped = jax.vmap(lambda row: ops.soft_moe(row[None], *rest)[0])(x)
    np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-6)

    def loss(body):
        return jax.grad(lambda x: (body(x) ** 2).sum())(x)

    straight = loss(lambda x: ops.soft_moe(ops.soft_moe(x, *rest), *rest))
    again = jax.checkpoint(lambda x: ops.soft_moe(x, *rest))
    np.testing.assert_allclose(loss(lambda x: again(again(x))), straight, rtol=1e-4, atol=1e-4)
    scanned = loss(lambda x: jax.lax.scan(lambda c, _: (again(c), None), x, None, length=2)[0])
    np.testing.assert_allclose(scanned, straight, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_nothing_of_the_size_of_tokens_times_experts():
    """No array of the compiled gradient has b * n * e * d numbers."""
    values = inputs(2, 64, 32, 6, 1, 4)

    def loss(*arrays):
        return (ops.soft_moe(*arrays, implementation="xla") ** 2).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(6))))(*values.values()))
    sizes = [
        int(np.prod([int(part) for part in found.split(",")]))
        for found in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
    ]
    assert max(sizes) < 2 * 64 * 32 * 6
    assert max(sizes) >= 2 * 64 * 32


sizes = st.integers(1, 6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(b=st.integers(1, 3), n=st.integers(1, 9), d=sizes, e=sizes, p=st.integers(1, 3), r=sizes)
def test_any_shape_agrees_with_the_equations(b, n, d, e, p, r):
    values = inputs(b, n, d, e, p, r, seed=b + n + d)
    out = op(values)
    assert out.shape == (b, n, d)
    np.testing.assert_allclose(out, soft_moe_numpy(*values.values()), rtol=1e-4, atol=2e-5)
