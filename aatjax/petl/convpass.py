"""The convpass adapter block: a convolution of three tokens inside a bottleneck."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import glorot_uniform, zeros
from jaxtyping import Array, Float

from aatjax.models.tokens import Mask, Tokens
from aatjax.petl.bottleneck import DOWN, Bottleneck, Init

SIZE = 3


class Convpass(Bottleneck):
    """W_up q(conv(q(W_down z + b_down))) + b_up: `[b, n, d] -> [b, n, d]`.

    q(x) = x sigmoid(1.702 x). The convolution mixes all r channels of three neighbouring tokens.
    Parameters: dr + r, 3rr + r, rd + d. The published code (of arXiv 2402.00828) discards the
    result of the convolution and applies q twice to the down-projection: `uses_conv=False`. Its
    dropout of 0.1 on the hidden values in training is not reproduced.

    Args:
        dim: token width d.
        width: bottleneck width r.
        dtype: compute type; the parameters are float32.
        rngs: source of the initial weights.
        init: `identity` or `normal`.
        uses_conv: whether the result of the convolution is used.
    """

    along_tokens = True  # an output depends on where a row of patches ends

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Init = "identity",
        uses_conv: bool = True,
    ):
        down = DOWN if init == "normal" else glorot_uniform()
        super().__init__(dim, width, dtype=dtype, rngs=rngs, init=init, down=down)
        self.uses_conv = uses_conv
        self.w_conv: nnx.Param[Array] = nnx.Param(
            glorot_uniform()(rngs.params(), (SIZE, width, width))
        )
        self.b_conv: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (width,)))

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        dtype = self.dtype
        hidden = _quick_gelu(self.down(x))
        if self.uses_conv:
            tokens = x.shape[1]
            padded = jnp.pad(hidden, ((0, 0), (1, 1), (0, 0)))
            weights = self.w_conv[...].astype(dtype)
            hidden = sum(padded[:, j : j + tokens] @ weights[j] for j in range(SIZE))
            hidden = hidden + self.b_conv[None, None].astype(dtype)
        return self.up(_quick_gelu(hidden))


def _quick_gelu(x: Float[Array, "b n r"]) -> Float[Array, "b n r"]:
    return x * jax.nn.sigmoid(1.702 * x)
