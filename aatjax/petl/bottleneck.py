"""The bottleneck adapter block that several methods place: down, GELU, up."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, zeros
from jaxtyping import Array, Float

from aatjax import ops
from aatjax.models.tokens import Mask, Tokens

Init = Literal["identity", "normal"]
DOWN = normal(0.02)


def make_up_init(init: Init) -> Initializer:
    """Return the initialiser of an adapter's last projection: zero, or normal(0.02).

    Zero makes the adapter add nothing at first. The published parameter-efficient code intends
    that too, but its checkpoint loader draws every new linear layer from a normal of standard
    deviation 0.02.
    """
    return DOWN if init == "normal" else zeros


def make_uniform(fan_in: int) -> Initializer:
    """Return the initialiser of PyTorch's linear layers and convolutions, weights and biases.

    U(-v, v) with v = 1 / sqrt(fan in).
    """
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init  # pyright: ignore[reportReturnType]


class Bottleneck(nnx.Module):
    """A(z) = W_up GELU(W_down z + b_down) + b_up: `[b, n, d] -> [b, n, d]`.

    Exact (erf) GELU; no skip, scale or dropout. W_down starts as normal(0.02), everything else as
    zero, so that A is zero at first (AAT, arXiv 2401.10544, sec. 2; the same block in
    arXiv 2312.03694). With init="normal" W_up starts like W_down.

    Args:
        dim: token width d.
        width: bottleneck width r.
        dtype: compute type; the parameters are float32.
        rngs: source of the initial weights.
        init: `identity` or `normal`.
        down: initialiser of W_down.
    """

    per_token = True

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Init = "identity",
        down: Initializer = DOWN,
    ):
        self.dtype = dtype
        self.w_down: nnx.Param[Array] = nnx.Param(down(rngs.params(), (dim, width)))
        self.b_down: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (width,)))
        self.w_up: nnx.Param[Array] = nnx.Param(make_up_init(init)(rngs.params(), (width, dim)))
        self.b_up: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (dim,)))

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        return self.up(ops.gelu(self.down(x)))

    def down(self, x: Tokens) -> Float[Array, "b n r"]:
        """Return W_down x + b_down in the compute type."""
        return project(x.astype(self.dtype), self.w_down, self.b_down)

    def up(self, hidden: Float[Array, "b n r"]) -> Tokens:
        """Return W_up hidden + b_up in the compute type."""
        return project(hidden, self.w_up, self.b_up)


def project(
    x: Float[Array, "b n i"], w: nnx.Variable[Array], b: nnx.Variable[Array]
) -> Float[Array, "b n o"]:
    """Return x W + b in the type of x."""
    return x @ w[...].astype(x.dtype) + b[None, None].astype(x.dtype)
