"""Pfeiffer and Houlsby adapters in every placement (arXiv 2312.03694)."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import Mask, Tokens, call_masked
from aatjax.petl.base import After, Method, Parallel, Wrapper
from aatjax.petl.published_start import start_as_petl
from aatjax.petl.sites import BlockShape, Expert, Location, list_blocks, list_sites
from aatjax.petl.sizes import find_widths


class Before(Wrapper):
    """base(x + adapter(x))."""

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        return call_masked(self.base, x + self.apply_adapter(x, mask), mask)


class BeforeAlone(Wrapper):
    """base(a) + a with a = adapter(x): the published form, in which x itself is lost."""

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        a = self.apply_adapter(x, mask)
        return call_masked(self.base, a, mask) + a


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    """One adapter block parallel to or after a sub-layer of every block (arXiv 2312.03694).

    With u the LayerNorm output that the sub-layer S reads, and A the block (sec. 2-3):

        parallel, before      S(u) + A(u)           the paper's default
        parallel, after       S(u) + A(S(u))        the same as sequential, after
        sequential, before    S(u + A(u))
        sequential, after     S(u) + A(S(u))        the paper's sequential form

    "Pfeiffer" is one site (`location` ffn in the published code, mhsa in the paper's text),
    "Houlsby" is `both`. Also trained: the LayerNorm of the site, the head and the last LayerNorm
    before it. Identity at initialisation. Adds the block's parameters per site, and 2D for the
    LayerNorm; a bottleneck has 2Dr + r + D.

    The skip follows from the order: a parallel adapter has none (it would add u itself to the
    tokens), a sequential one needs it (without, S(u) is lost).

    as_published=True computes what the repository's code computes: zero positions and a uniform
    head (`start_as_petl`); projections drawn from normal(0.02), those of a conformer like PyTorch's
    convolutions, so no identity at initialisation; the conformer's LayerNorm counted but not used;
    convpass without its convolution; sequential, before as S(A(u)) + A(u).

    Attributes:
        block: `bottleneck`, `conformer` or `convpass`.
        location: `ffn`, `mhsa` or `both`.
        order: `parallel` or `sequential`.
        position: `before` or `after` the sub-layer; None is before if parallel, else after.
        width: bottleneck width r, or one for each adapted block.
        reduction: or D / r, rounded; 64 if neither is given (96 for the paper's conformers), and
            then 8 wide at least on models narrower than AST-base.
        kernel: tokens of a conformer's convolution; in the paper 8 for sounds, 31 for speech.
        inner_norm: whether a conformer starts with a LayerNorm of its own.
        residual: may only confirm the skip that follows from the order.
        train_norm: train the LayerNorm in front of the site.
        as_published: see above.
        blocks: which blocks are adapted, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "adapter"

    block: Expert = "bottleneck"
    location: Location = "ffn"
    order: Literal["parallel", "sequential"] = "parallel"
    position: Literal["before", "after"] | None = None
    width: Annotated[int | tuple[int, ...], Range(1)] | None = None
    reduction: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    kernel: Annotated[int, Range(1)] = 8
    inner_norm: bool = True
    residual: bool | None = None
    train_norm: bool = True
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual is not None and self.residual is (self.order == "parallel"):
            effect = {
                "parallel": "would add the LayerNorm output itself to the tokens",
                "sequential": "would lose the output of the frozen sub-layer",
            }[self.order]
            raise UsageError(
                f"Adapter order={self.order!r} with residual={self.residual} {effect}: omit "
                "residual, it follows from the order"
            )

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/attn` and/or `blocks/*/mlp`."""
        config, wrapper = model.config, self._choose_wrapper()
        blocks = list_blocks(self, config.depth)
        widths = find_widths(self, config.dim, len(blocks))
        for sublayer, norm in list_sites(self.location):
            for block, width in zip(blocks, widths, strict=True):
                shape = BlockShape(
                    self.block,
                    config.dim,
                    width,
                    jnp.dtype(config.dtype),
                    kernel=self.kernel,
                    norm=self.inner_norm,
                    as_published=self.as_published,
                )

                def add_adapter(_: str, base: nnx.Module, shape: BlockShape = shape) -> nnx.Module:
                    return wrapper(base, self.label("adapter"), shape.make(rngs))

                surgery.wrap(model, f"blocks/{block}/{sublayer}", add_adapter)
                if self.train_norm:
                    surgery.unfreeze(model, f"blocks/{block}/{norm}/*")
        if self.as_published:
            start_as_petl(model, rngs=rngs)

    def _choose_wrapper(self) -> type[Wrapper]:
        parallel = self.order == "parallel"
        if (self.position or ("before" if parallel else "after")) == "after":
            return After
        return Parallel if parallel else BeforeAlone if self.as_published else Before
