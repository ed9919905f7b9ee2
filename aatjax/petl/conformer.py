"""The conformer adapter block: a depthwise convolution over the tokens (arXiv 2312.03694)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import zeros
from jaxtyping import Array, Float

from aatjax.models.tokens import Mask, Tokens
from aatjax.petl.bottleneck import Init, make_uniform, project


class Conformer(nnx.Module):
    """Pointwise, GLU, depthwise convolution, BatchNorm, SiLU, pointwise: `[b, n, d] -> [b, n, d]`.

    LN(z) -> W_1, d to 2r -> first half * sigmoid(second half) -> depthwise convolution of `kernel`
    tokens ("same": (kernel - 1) // 2 before) -> BatchNorm over clips and tokens (eps 1e-5, momentum
    0.9) -> SiLU -> W_2, r to d. The sequence is CLS, DIST, then the patches one row of equal
    frequency after the other, so the convolution crosses the ends of rows. Parameters:
    d(2r) + 2r + r kernel + r + 2r + rd + d, and 2d for LN.

    Projections start like PyTorch's convolutions, U(-1/sqrt(fan in), 1/sqrt(fan in)); W_2 and its
    bias as zero with init="identity". The running variance is the biased one (PyTorch keeps the
    unbiased one). The published AST code computes LN(z) and continues from z, so that LN is counted
    as trained but never gets a gradient: `uses_norm=False`.

    Args:
        dim: token width d.
        width: bottleneck width r.
        kernel: tokens of the convolution; in the paper 8 for sounds, 31 for speech.
        dtype: compute type; parameters, LN and BatchNorm are float32.
        rngs: source of the initial weights.
        init: `identity`, or `normal` (here PyTorch's).
        norm: whether there is an LN.
        uses_norm: whether its output is used.
    """

    along_tokens = True  # an output depends on where a row of patches ends

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        kernel: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Init = "identity",
        norm: bool = True,
        uses_norm: bool = True,
    ):
        self.dtype: jnp.dtype = dtype
        self.kernel: int = kernel
        self.uses_norm: bool = uses_norm
        self.norm: nnx.LayerNorm | None = (
            nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs) if norm else None
        )
        last = make_uniform(width) if init == "normal" else zeros
        self.w_in: nnx.Param[Array] = nnx.Param(make_uniform(dim)(rngs.params(), (dim, 2 * width)))
        self.b_in: nnx.Param[Array] = nnx.Param(make_uniform(dim)(rngs.params(), (2 * width,)))
        self.w_conv: nnx.Param[Array] = nnx.Param(
            make_uniform(kernel)(rngs.params(), (kernel, width))
        )
        self.b_conv: nnx.Param[Array] = nnx.Param(make_uniform(kernel)(rngs.params(), (width,)))
        self.batch_norm: nnx.BatchNorm = nnx.BatchNorm(
            width, momentum=0.9, epsilon=1e-5, use_running_average=True, rngs=rngs
        )
        self.w_out: nnx.Param[Array] = nnx.Param(last(rngs.params(), (width, dim)))
        self.b_out: nnx.Param[Array] = nnx.Param(last(rngs.params(), (dim,)))

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        dtype = self.dtype
        if self.norm is not None and self.uses_norm:
            x = self.norm(x.astype(jnp.float32))
        value, gate = jnp.split(project(x.astype(dtype), self.w_in, self.b_in), 2, axis=-1)
        hidden = convolve_depthwise(value * jax.nn.sigmoid(gate), self.w_conv[...].astype(dtype))
        hidden = hidden + self.b_conv[None, None].astype(dtype)
        keep = None if mask is None else mask[..., None]
        hidden = self.batch_norm(hidden.astype(jnp.float32), mask=keep).astype(dtype)
        return project(jax.nn.silu(hidden), self.w_out, self.b_out)


def convolve_depthwise(
    x: Float[Array, "b n r"], kernel: Float[Array, "k r"]
) -> Float[Array, "b n r"]:
    """Convolve each channel: y_i = sum_j kernel_j x_(i + j - (k - 1) // 2), with zeros outside.

    A sum of k shifted copies, which XLA fuses into one pass; its grouped convolution takes four
    to six times as long on CPU, forward and backward (602 tokens, 8 channels, k = 31 and 8).
    """
    size, tokens = kernel.shape[0], x.shape[1]
    before = (size - 1) // 2
    padded = jnp.pad(x, ((0, 0), (before, size - 1 - before), (0, 0)))
    out = jnp.zeros_like(x)
    for j in range(size):
        out = out + padded[:, j : j + tokens] * kernel[None, None, j]
    return out
