"""Pfeiffer and Houlsby adapters in every placement (arXiv 2312.03694)."""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import call_masked
from aatjax.petl.base import After, Method, Parallel, Wrapper, zero_positions
from aatjax.petl.bottleneck import Init
from aatjax.petl.sites import Expert, Location, block_paths, bottleneck_width, make_block, sites

Order = Literal["parallel", "sequential"]
Position = Literal["before", "after"]


class Before(Wrapper):
    """base(x + adapter(x)): the adapter changes what the wrapped submodule reads."""

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        return call_masked(self.base, x + self.adapted(x, mask), mask)


class BeforeAlone(Wrapper):
    """base(a) + a with a = adapter(x): the published form, in which x itself is lost."""

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        a = self.adapted(x, mask)
        return call_masked(self.base, a, mask) + a


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    """One adapter block beside or behind a sub-layer of every block (arXiv 2312.03694, sec. 2-3).

    With u the LayerNorm output that the sub-layer S reads, and A the block:

        parallel, before      S(u) + A(u)           the paper's default
        parallel, after       S(u) + A(S(u))        the same as sequential, after
        sequential, before    S(u + A(u))
        sequential, after     S(u) + A(S(u))        the paper's sequential form

    "Pfeiffer" is one site (`location` ffn in the published code, mhsa in the paper's text),
    "Houlsby" is `both`. Trained besides: the site's LayerNorm, the head and the last LayerNorm
    before it. Identity at init. Adds to each site the block's parameters and 2D for LayerNorm;
    a bottleneck has 2Dr + r + D, r = round(D / reduction).

    The skip follows from the order: a parallel adapter has none (it would add u itself to the
    tokens), a sequential one needs it (without, S(u) is lost); `residual` exists to say so.

    as_published=True runs what the repository's code ran: zero positions; projections drawn from
    normal(0.02), a conformer's as PyTorch draws convolutions, so no identity at init; the
    conformer's LayerNorm counted but not used; convpass without its convolution; sequential,
    before as S(A(u)) + A(u).

    Attributes:
        block: `bottleneck`, `conformer` or `convpass`.
        location: `ffn`, `mhsa` or `both`.
        order: `parallel` or `sequential`.
        position: `before` or `after` the sub-layer; None takes that of the order in the table.
        reduction: token width over bottleneck width (64 for bottlenecks, 96 for conformers).
        kernel: tokens that a conformer sees: 8 for sounds, 31 for speech.
        inner_norm: whether a conformer starts with a LayerNorm of its own.
        residual: None; True is refused with parallel, False with sequential.
        train_norm: train the LayerNorm in front of the site.
        as_published: see above.
        last_blocks: adapt only the last so many blocks; None adapts all.
    """

    name: ClassVar[str] = "adapter"

    block: Expert = "bottleneck"
    location: Location = "ffn"
    order: Order = "parallel"
    position: Position | None = None
    reduction: float = 64
    kernel: int = 8
    inner_norm: bool = True
    residual: bool | None = None
    train_norm: bool = True
    as_published: bool = False
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        options = {"block": Expert, "location": Location, "order": Order}
        for name, choice in options.items():
            if getattr(self, name) not in get_args(choice):
                raise UsageError(
                    f"Adapter {name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(get_args(choice))}"
                )
        if self.position not in (None, "before", "after"):
            raise UsageError(f"Adapter position={self.position!r} is neither before nor after")
        if not self.reduction > 0:
            raise UsageError(f"Adapter reduction={self.reduction} must be above 0")
        if self.kernel < 1:
            raise UsageError(f"Adapter kernel={self.kernel} must be at least 1 token")
        if self.order == "parallel" and self.residual is True:
            raise UsageError(
                "Adapter order='parallel' with residual=True would add the LayerNorm output itself "
                "to the tokens: leave residual out, it follows from the order"
            )
        if self.order == "sequential" and self.residual is False:
            raise UsageError(
                "Adapter order='sequential' with residual=False would lose the frozen sub-layer's "
                "output: leave residual out, it follows from the order"
            )

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/attn` and/or `blocks/*/mlp`."""
        dim = model.config.dim
        width = bottleneck_width(dim, self.reduction)
        init: Init = "normal" if self.as_published else "identity"
        wrapper = self._wrapper()

        def adapted(_: str, base: nnx.Module) -> nnx.Module:
            block = make_block(
                self.block,
                dim,
                width,
                kernel=self.kernel,
                norm=self.inner_norm,
                dtype=jnp.dtype(model.config.dtype),
                init=init,
                as_published=self.as_published,
                rngs=rngs,
            )
            return wrapper(base, "adapter", block)

        for submodule, norm in sites(self.location):
            for where in block_paths("Adapter", model.config.depth, self.last_blocks):
                surgery.wrap(model, f"{where}/{submodule}", adapted)
                if self.train_norm:
                    surgery.retag(model, f"{where}/{norm}/*")
        if self.as_published:
            zero_positions(model)

    def _wrapper(self) -> type[Wrapper]:
        position = self.position or ("before" if self.order == "parallel" else "after")
        if position == "after":
            return After
        if self.order == "parallel":
            return Parallel
        return BeforeAlone if self.as_published else Before
