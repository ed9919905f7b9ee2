"""AAT: MLP and spatial adapters on a frozen AST (arXiv 2401.10544)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import After, Method, Parallel
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.sites import block_paths


@dataclasses.dataclass(frozen=True)
class AAT(Method):
    """Adapter of the Audio Spectrogram Transformer (arXiv 2401.10544, sec. 2).

    MLP adapter, parallel, on the same LN2 output: x + MLP(LN2 x) + A_m(LN2 x). Spatial adapter,
    after the attention and its output projection, with a skip: z = Attn(LN1 x), x + z + A_s(z).
    Identity at init. All LayerNorms of the body stay frozen; the head's own is trained.
    Adds 2Dr + r + D parameters a site, r = int(ratio * D).

    Attributes:
        mlp: add the MLP adapters (AAT^M).
        spatial: add the spatial adapters; with `mlp`, AAT^MS, the paper's best.
        ratio: bottleneck width over token width.
        last_blocks: adapt only the last so many blocks; None adapts all.
    """

    name: ClassVar[str] = "aat"

    mlp: bool = True
    spatial: bool = True
    ratio: float = 0.25
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        if not (self.mlp or self.spatial):
            raise UsageError("AAT with mlp=False and spatial=False adds nothing: use petl.Linear()")
        if not self.ratio > 0:
            raise UsageError(f"AAT ratio={self.ratio} must be above 0 (0.25 in the paper)")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/mlp` and `blocks/*/attn`."""
        config = model.config
        width = max(1, int(self.ratio * config.dim))
        dtype = jnp.dtype(config.dtype)

        def adapter() -> Bottleneck:
            return Bottleneck(config.dim, width, dtype=dtype, rngs=rngs)

        for where in block_paths("AAT", config.depth, self.last_blocks):
            if self.mlp:
                surgery.wrap(
                    model, f"{where}/mlp", lambda _, base: Parallel(base, "mlp_adapter", adapter())
                )
        for where in block_paths("AAT", config.depth, self.last_blocks):
            if self.spatial:
                surgery.wrap(
                    model,
                    f"{where}/attn",
                    lambda _, base: After(base, "spatial_adapter", adapter()),
                )
