"""LoRA: low-rank updates of the attention's projections, which can be merged into them."""

import dataclasses
from typing import Annotated, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import Tokens
from aatjax.petl.base import Method, zero_positions
from aatjax.petl.bottleneck import Init, make_up_init
from aatjax.petl.sites import list_blocks
from aatjax.petl.sizes import find_width

PROJECTIONS = {"q": "q", "k": "k", "v": "v", "o": "out"}


class LowRank(nnx.Module):
    """W x + b + scale * B(A x): `[b, n, d] -> [b, n, d]`, A d to r, B r to d, no biases.

    A starts as normal(0.02), B as zero (or like A with init="normal").
    """

    def __init__(self, base: nnx.Linear, rank: int, scale: float, *, init: Init, rngs: nnx.Rngs):
        self.base = base
        self.scale = scale
        inputs, outputs = base.kernel.shape
        self.lora_a = nnx.Param(normal(0.02)(rngs.params(), (inputs, rank)))
        self.lora_b = nnx.Param(make_up_init(init)(rngs.params(), (rank, outputs)))

    def __call__(self, x: Tokens) -> Tokens:
        y = self.base(x)
        a, b = self.lora_a[...].astype(y.dtype), self.lora_b[...].astype(y.dtype)
        with jax.named_scope("adapter"):
            return y + self.scale * ((x.astype(y.dtype) @ a) @ b)

    def merge_into_base(self) -> nnx.Linear:
        """Return the same map as one linear layer: W + scale * B A, computed in float32."""
        change = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        kernel = self.base.kernel
        self.base.kernel = type(kernel)(kernel[...] + (self.scale * change).astype(kernel.dtype))
        return self.base


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of attention projections (Hu et al. 2022, eq. 3; arXiv 2312.03694).

    Every target becomes W x + b + s B(A x). The scale s is alpha / rank, as in LoRA's paper, or
    alpha / reduction, as in the published AST code: 0.125 instead of 2.67 with its reduction of 128
    and alpha of 16. Also trained: the head and the last LayerNorm before it. Identity at
    initialisation; `aatjax.merge` folds it into the backbone. Adds 2D rank per target.

    as_published=True: zero positions, both factors drawn from normal(0.02), scale
    alpha / reduction.

    Attributes:
        rank: inner width r of the update.
        alpha: numerator of the scale.
        targets: projections to adapt, of q, k, v and o (output); on the command line also as one
            word, `qv`.
        reduction: or D / rank, rounded; 128 if neither is given, rank 6 for AST-base.
        scale: `alpha/rank` or `alpha/reduction`.
        as_published: see above.
        last_blocks: adapt only this many blocks, from the last; None adapts all.
    """

    name: ClassVar[str] = "lora"
    default_size: ClassVar[tuple[str, float]] = ("reduction", 128)

    rank: Annotated[int, Range(1)] | None = None
    alpha: Annotated[float, Range(above=0)] = 16
    targets: tuple[str, ...] = ("q", "v")
    reduction: Annotated[float, Range(above=0)] | None = None
    scale: Literal["alpha/rank", "alpha/reduction"] = "alpha/rank"
    as_published: bool = False
    last_blocks: Annotated[int, Range(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = tuple("".join(self.targets))
        if not targets or set(targets) - set(PROJECTIONS) or len(set(targets)) < len(targets):
            raise UsageError(
                f"LoRA targets={self.targets!r} is not a set of q, k, v and o, such as ('q', 'v')"
            )
        object.__setattr__(self, "targets", targets)

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap the targets among `blocks/*/attn/q`, `k`, `v`, `out`."""
        dim = model.config.dim
        divisor = rank = find_width(self, dim)
        if self.as_published or self.scale == "alpha/reduction":
            default = dim / rank if self.rank else self.default_size[1]
            divisor = self.reduction or default
        init: Init = "normal" if self.as_published else "identity"

        def add_update(_: str, base: nnx.Module) -> nnx.Module:
            projection = cast(nnx.Linear, base)
            return LowRank(projection, rank, self.alpha / divisor, init=init, rngs=rngs)

        for target in self.targets:
            for block in list_blocks(self, model.config.depth):
                path = f"{block}/attn/{PROJECTIONS[target]}"
                # Innermost: the projection itself, not a prefix or another wrapper around it.
                surgery.wrap(model, path, add_update, innermost=True)
        if self.as_published:
            zero_positions(model)
