"""The kernels as a package of their own: wrong arguments are one sentence, help says the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from aatjax_kernels.attention import attention, weights
from aatjax_kernels.elementwise import gelu, layer_norm
from aatjax_kernels.matmul import matmul
from aatjax_kernels.soft_moe import combine, dispatch, routing, soft_moe

SHAPES = {
    "x": (2, 5, 8),
    "phi": (8, 3, 2),
    "w_down": (3, 8, 4),
    "b_down": (3, 4),
    "w_up": (3, 4, 8),
    "b_up": (3, 8),
}
X = jnp.ones((2, 5, 2, 4))


def call(**changes):
    given = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    return soft_moe(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((2, 5, 8), int)}, r"x is int32 \[2, 5, 8\], not float \[b, n, d\]"),
        ({"x": jnp.ones((5, 8))}, r"x is float32 \[5, 8\], not float \[b, n, d\]"),
        ({"x": jnp.ones((2, 5, 9))}, "phi is .*: d is 8 there and 9 in x"),
        ({"x": jnp.ones((2, 0, 8))}, "x is .*: n is 0"),
        ({"x": [[1.0]]}, "x is a list, not an array"),
        ({"phi": jnp.ones((3, 8, 2))}, "phi is .*: d is 3 there and 8 in x"),
        ({"phi": jnp.ones((8, 6))}, r"phi is float32 \[8, 6\], not float \[d, e, p\]"),
        ({"w_down": jnp.ones((8, 4))}, r"w_down is float32 \[8, 4\], not float \[e, d, r\]"),
        ({"b_down": jnp.ones((3, 5))}, "b_down is .*: r is 5 there and 4 in w_down"),
        ({"w_up": jnp.ones((3, 8, 4))}, "w_up is .*: r is 8 there and 4 in w_down"),
        ({"b_up": jnp.ones(8)}, r"b_up is float32 \[8\]"),
        ({"mask": jnp.ones((2, 5))}, r"mask is float32 \[2, 5\], not bool \[b, n\]"),
        ({"mask": jnp.ones((2, 6), bool)}, "mask is .*: n is 6 there and 5 in x"),
        ({"implementation": "cuda"}, "no implementation 'cuda': use 'xla', 'tpu', 'gpu'"),
    ],
)
@pytest.mark.wrong_types
def test_soft_moe_says_what_was_expected_and_what_came(changes, message):
    with pytest.raises(ValueError, match=message) as info:
        call(**changes)
    assert str(info.value).startswith("soft_moe") and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X, X), r"query is float32 \[5, 2, 4\], not float \[b, n, h, k\]"),
        ((X, X.astype(int), X), r"key is int32"),
        ((X, X[..., :3], X), "key is .*: k is 3 there and 4 in query"),
        ((X, X[:, :4], X), "value is .*: m is 5 there and 4 in key"),
        ((X[:, :0], X, X), "query is .*: n is 0"),
        ((X, X[:, :, :1], X), "key is .*: h is 1 there and 2 in query"),
    ],
)
@pytest.mark.wrong_types
def test_attention_says_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights(X[0], X), r"weights: query is float32 \[5, 2, 4\], not float"),
        (lambda: routing(X, jnp.ones((4, 3, 1))), r"routing: x is .*, not float \[b, n, d\]"),
        (lambda: routing(None, jnp.ones((4, 3, 1))), "routing: x is None, not an array"),
        (
            lambda: dispatch(jnp.ones((2, 5, 4)), jnp.ones((2, 6, 3, 1))),
            "weights is .* n is 6",
        ),
        (lambda: combine(X, jnp.ones((2, 5)), X.dtype), "combine: weights is"),
        (lambda: gelu(jnp.arange(3)), r"gelu: x is int32 \[3\], not float \[\*\]"),
        (lambda: gelu([1.0]), "gelu: x is a list, not an array"),
        (
            lambda: layer_norm(X, jnp.ones(3), jnp.ones(3), 1e-5),
            "norm: scale .* d is 3",
        ),
        (lambda: layer_norm(X.astype(int), jnp.ones(4), jnp.ones(4), 1e-5), "layer_norm: x is int"),
        (lambda: matmul(X, jnp.ones((3, 2))), r"matmul: kernel is .*: i is 3 there and 4 in x"),
        (lambda: matmul(X.astype(int), jnp.ones((4, 2))), r"matmul: x is int32"),
    ],
)
@pytest.mark.wrong_types
def test_the_smaller_ops_say_so_too(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_fits_is_computed_also_for_no_clips_and_from_numpy():
    assert call().shape == (2, 5, 8)
    assert call(x=np.ones((2, 5, 8), np.float32)).dtype == jnp.float32
    assert call(x=jnp.ones((0, 5, 8))).shape == (0, 5, 8)
    assert attention(X, X[:, :3], X[:, :3]).shape == X.shape


def test_help_names_activation_rounding_and_every_argument():
    for op, words in (
        (soft_moe, ("GELU by erf", "rounded", "float32", *SHAPES, "mask", "implementation")),
        (attention, ("float32 softmax", "query", "key", "value", "mask", "implementation")),
    ):
        assert op.__doc__ is not None
        assert all(word in op.__doc__ for word in words)
