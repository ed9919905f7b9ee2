"""AAT: MLP and spatial adapters on a frozen AST (arXiv 2401.10544)."""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
from flax import nnx

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import After, Method, Parallel, Wrapper
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.published_start import start_as_aat
from aatjax.petl.sites import list_blocks
from aatjax.petl.sizes import find_widths


@dataclasses.dataclass(frozen=True)
class AAT(Method):
    """Adapter of the Audio Spectrogram Transformer (arXiv 2401.10544, sec. 2).

    MLP adapter, parallel, on the same LN2 output: x + MLP(LN2 x) + A_m(LN2 x). Spatial adapter,
    after the attention and its output projection, with a skip: z = Attn(LN1 x), x + z + A_s(z).
    Identity at initialisation. All LayerNorms of the body stay frozen; the head's own is trained.
    Adds 2Dr + r + D parameters per site.

    as_published=True: the head starts as in AAT's code (`start_as_aat`); the adapters, and what
    they compute, are the same.

    Attributes:
        mlp: add the MLP adapters (AAT^M).
        spatial: add the spatial adapters; with `mlp`, AAT^MS, the best in the paper.
        width: bottleneck width r, or one for each adapted block.
        ratio: or r / D, rounded down; 0.25 if neither is given.
        as_published: see above.
        blocks: which blocks are adapted, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "aat"
    rates: ClassVar[tuple[float, float]] = (1e-4, 1e-3)  # arXiv 2401.10544
    default_size: ClassVar[tuple[str, float]] = ("ratio", 0.25)

    mlp: bool = True
    spatial: bool = True
    width: Annotated[int | tuple[int, ...], Range(1)] | None = None
    ratio: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mlp or self.spatial):
            raise UsageError("AAT with mlp=False and spatial=False adds nothing: use petl.Linear()")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/mlp` and `blocks/*/attn`."""
        config = model.config
        blocks = list_blocks(self, config.depth)
        widths = find_widths(self, config.dim, len(blocks))

        def add(sublayer: str, wrapper: type[Wrapper], name: str) -> None:
            for block, width in zip(blocks, widths, strict=True):

                def build(_: str, base: nnx.Module, width: int = width) -> nnx.Module:
                    dtype = jnp.dtype(config.dtype)
                    adapter = Bottleneck(config.dim, width, dtype=dtype, rngs=rngs)
                    return wrapper(base, self.label(name), adapter)

                surgery.wrap(model, f"blocks/{block}/{sublayer}", build)

        if self.mlp:
            add("mlp", Parallel, "mlp_adapter")
        if self.spatial:
            add("attn", After, "spatial_adapter")
        if self.as_published:
            start_as_aat(model, rngs=rngs)
