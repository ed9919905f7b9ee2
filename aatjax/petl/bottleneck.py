"""The bottleneck adapter block that several methods place: down, GELU, up."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, zeros
from jaxtyping import Array, Float

from aatjax.surgery import Trainable

Init = Literal["identity", "normal"]
DOWN = normal(0.02)


def up_init(init: Init) -> Initializer:
    """Of the last projection of an adapter: zero, so that it adds nothing, or normal(0.02).

    The published parameter-efficient code means to start at zero, but its checkpoint loader
    draws every new linear layer anew from a normal of standard deviation 0.02.
    """
    return normal(0.02) if init == "normal" else zeros


class Bottleneck(nnx.Module):
    """A(z) = W_up GELU(W_down z + b_down) + b_up: `[b, n, d] -> [b, n, d]`.

    Exact (erf) GELU, no skip, no scale, no dropout. W_down starts as a normal of standard
    deviation 0.02, everything else as zero, so A is zero at first (AAT, arXiv 2401.10544, sec. 2;
    the same block in arXiv 2312.03694). With init="normal" W_up is drawn like W_down.

    Args:
        dim: token width d.
        width: bottleneck width r.
        dtype: compute type; the parameters are float32.
        rngs: source of the initial weights.
        init: `identity` or `normal`.
        down: how W_down starts.
    """

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
        self.w_down = Trainable(down(rngs.params(), (dim, width)))
        self.b_down = Trainable(zeros(rngs.params(), (width,)))
        self.w_up = Trainable(up_init(init)(rngs.params(), (width, dim)))
        self.b_up = Trainable(zeros(rngs.params(), (dim,)))

    def __call__(self, x: Float[Array, "b n d"], mask: object = None) -> Float[Array, "b n d"]:
        return self.up(jax.nn.gelu(self.down(x), approximate=False))

    def down(self, x: Float[Array, "b n d"]) -> Float[Array, "b n r"]:
        """W_down x + b_down in the compute type."""
        dtype = self.dtype
        return x.astype(dtype) @ self.w_down[...].astype(dtype) + self.b_down[None, None].astype(
            dtype
        )

    def up(self, hidden: Float[Array, "b n r"]) -> Float[Array, "b n d"]:
        """W_up hidden + b_up in the compute type."""
        dtype = self.dtype
        return hidden @ self.w_up[...].astype(dtype) + self.b_up[None, None].astype(dtype)
