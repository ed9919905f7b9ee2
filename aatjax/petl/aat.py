"""AAT: MLP and spatial adapters on a frozen AST (arXiv 2401.10544)."""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
from flax import nnx

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import After, Method, Parallel
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.sites import list_blocks
from aatjax.petl.sizes import find_width


@dataclasses.dataclass(frozen=True)
class AAT(Method):
    """Adapter of the Audio Spectrogram Transformer (arXiv 2401.10544, sec. 2).

    MLP adapter, parallel, on the same LN2 output: x + MLP(LN2 x) + A_m(LN2 x). Spatial adapter,
    after the attention and its output projection, with a skip: z = Attn(LN1 x), x + z + A_s(z).
    Identity at initialisation. All LayerNorms of the body stay frozen; the head's own is trained.
    Adds 2Dr + r + D parameters per site.

    Attributes:
        mlp: add the MLP adapters (AAT^M).
        spatial: add the spatial adapters; with `mlp`, AAT^MS, the best in the paper.
        width: bottleneck width r.
        ratio: or r / D, rounded down; 0.25 if neither is given.
        last_blocks: adapt only this many blocks, from the last; None adapts all.
    """

    name: ClassVar[str] = "aat"
    default_size: ClassVar[tuple[str, float]] = ("ratio", 0.25)

    mlp: bool = True
    spatial: bool = True
    width: Annotated[int, Range(1)] | None = None
    ratio: Annotated[float, Range(above=0)] | None = None
    last_blocks: Annotated[int, Range(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mlp or self.spatial):
            raise UsageError("AAT with mlp=False and spatial=False adds nothing: use petl.Linear()")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/mlp` and `blocks/*/attn`."""
        config = model.config
        dim, width, dtype = config.dim, find_width(self, config.dim), jnp.dtype(config.dtype)

        def add_mlp_adapter(_: str, base: nnx.Module) -> nnx.Module:
            return Parallel(base, "mlp_adapter", Bottleneck(dim, width, dtype=dtype, rngs=rngs))

        def add_spatial_adapter(_: str, base: nnx.Module) -> nnx.Module:
            return After(base, "spatial_adapter", Bottleneck(dim, width, dtype=dtype, rngs=rngs))

        blocks = list_blocks(self, config.depth)
        for block in blocks if self.mlp else ():
            surgery.wrap(model, f"{block}/mlp", add_mlp_adapter)
        for block in blocks if self.spatial else ():
            surgery.wrap(model, f"{block}/attn", add_spatial_adapter)
