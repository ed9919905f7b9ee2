"""Look-aside adapters: convolutions along time and along frequency (arXiv 2412.05951)."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import zeros
from jaxtyping import Array, Float

from aatjax import ops, surgery
from aatjax.errors import Range
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.tokens import Mask, Tokens
from aatjax.petl.base import Method, Parallel
from aatjax.petl.bottleneck import DOWN
from aatjax.petl.sites import Location, list_blocks, list_sites
from aatjax.petl.sizes import find_widths


class LookAside(nnx.Module):
    """W_up * GELU(W_down * z + b_down) + b_up, both products convolutions: `[b, n, d] -> same`.

    On the grid of patches, W_down [k, d, r] convolves k neighbours in time and W_up [k, r, d] k
    neighbours in frequency, with zeros outside; tokens that are no patches have no neighbours.
    W_down starts as normal(0.02), everything else as zero. Parameters: 2kDr + r + D.

    Args:
        config: the model's, for its grid of patches, width and compute type.
        width: bottleneck width r.
        kernel: neighbours k, a patch itself included.
        rngs: source of the initial weights.
    """

    along_tokens = True  # an output depends on where a row of patches ends

    def __init__(self, config: ASTConfig, width: int, kernel: int, *, rngs: nnx.Rngs):
        self.dtype: jnp.dtype = jnp.dtype(config.dtype)
        self.grid: tuple[int, int] = config.grid
        dim = config.dim
        self.w_down: nnx.Param[Array] = nnx.Param(DOWN(rngs.params(), (kernel, dim, width)))
        self.b_down: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (width,)))
        self.w_up: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (kernel, width, dim)))
        self.b_up: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (dim,)))

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        dtype = self.dtype
        w_down, w_up = (w[...].astype(dtype) for w in (self.w_down, self.w_up))
        if mask is not None:
            x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
        # One product of all taps; the narrow results are shifted before the sum, and before W_up.
        taps = jnp.einsum("bnd,kdr->kbnr", x.astype(dtype), w_down)
        hidden = self._shift(taps, axis=2).sum(axis=0) + self.b_down[None, None].astype(dtype)
        hidden = ops.gelu(hidden)
        around = self._shift(jnp.broadcast_to(hidden, (len(w_up), *hidden.shape)), axis=1)
        up = jnp.einsum("kbnr,krd->bnd", around, w_up)
        return up + self.b_up[None, None].astype(dtype)

    def _shift(self, taps: Float[Array, "k b n r"], axis: int) -> Float[Array, "k b n r"]:
        """Return tap j of the patch j - (k - 1) // 2 places further along an axis of the grid."""
        rows, columns = self.grid
        count, tokens = taps.shape[0], taps.shape[2]
        columns = min(columns, tokens // rows)  # inputs may be cut where the rest is padding
        first, before = tokens - rows * columns, (count - 1) // 2
        shifted = []
        for j, tap in enumerate(taps):
            patches = tap[:, first:].reshape(-1, rows, columns, tap.shape[-1])
            edges = [(0, 0)] * 4
            edges[axis] = (max(0, before - j), max(0, j - before))
            start = max(0, j - before)
            moved = jnp.pad(patches, edges)
            moved = jax.lax.slice_in_dim(moved, start, start + patches.shape[axis], axis=axis)
            others = tap[:, :first] if j == before else jnp.zeros_like(tap[:, :first])
            shifted.append(jnp.concatenate([others, moved.reshape(tap[:, first:].shape)], axis=1))
        return jnp.stack(shifted)


@dataclasses.dataclass(frozen=True)
class LoAA(Method):
    """Look-aside adapters, parallel to a sub-layer of every block (arXiv 2412.05951).

    A parallel adapter whose projections are one-dimensional convolutions over the grid of patches:
    along time, then along frequency. The sizes that the paper ran are not reproduced here. Also
    trained: the LayerNorm of the site, the head and the last LayerNorm before it. Identity at
    initialisation. Adds 2kDr + r + D parameters per site, and 2D for the LayerNorm.

    Attributes:
        location: `mhsa`, `ffn`, or `both`.
        kernel: neighbours k of a patch along each axis, itself included.
        width: bottleneck width r, or one for each adapted block.
        reduction: or D / r, rounded; 64 if neither is given, and then 8 wide at least on models
            narrower than AST-base.
        train_norm: train the LayerNorm in front of the site.
        blocks: which blocks are adapted, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "loaa"

    location: Location = "ffn"
    kernel: Annotated[int, Range(1)] = 3
    width: Annotated[int | tuple[int, ...], Range(1)] | None = None
    reduction: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    train_norm: bool = True
    blocks: str | tuple[int, ...] | None = None

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/mlp` and/or `blocks/*/attn`."""
        config = model.config
        blocks = list_blocks(self, config.depth)
        widths = find_widths(self, config.dim, len(blocks))
        for sublayer, norm in list_sites(self.location):
            for block, width in zip(blocks, widths, strict=True):

                def add_adapter(_: str, base: nnx.Module, width: int = width) -> nnx.Module:
                    adapter = LookAside(config, width, self.kernel, rngs=rngs)
                    return Parallel(base, self.label("loaa"), adapter)

                surgery.wrap(model, f"blocks/{block}/{sublayer}", add_adapter)
                if self.train_norm:
                    surgery.unfreeze(model, f"blocks/{block}/{norm}/*")
