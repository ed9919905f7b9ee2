"""LoRA: low-rank updates of a block's linear layers, which can be merged into them."""

import dataclasses
import re
from typing import Annotated, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method
from aatjax.petl.bottleneck import Init, make_up_init
from aatjax.petl.published_start import start_as_petl
from aatjax.petl.sites import list_blocks
from aatjax.petl.sizes import find_widths

LAYERS = {
    **{"q": "attn/q", "k": "attn/k", "v": "attn/v", "o": "attn/out"},
    **{"up": "mlp/up", "down": "mlp/down"},
}
"""Linear layers of a block by the words of `targets`."""


class LowRank(nnx.Module):
    """W x + b + scale * B(A x): `[b, n, i] -> [b, n, o]`, A i to r, B r to o, no biases.

    A starts as normal(0.02), B as zero (or like A with init="normal").
    """

    def __init__(
        self,
        base: nnx.Linear,
        rank: int,
        scale: float,
        *,
        init: Init,
        names: tuple[str, str],
        rngs: nnx.Rngs,
    ):
        self.base = base
        self.scale: float = scale
        self.names: tuple[str, str] = names
        inputs, outputs = base.kernel.shape
        setattr(self, names[0], nnx.Param(normal(0.02)(rngs.params(), (inputs, rank))))
        setattr(self, names[1], nnx.Param(make_up_init(init)(rngs.params(), (rank, outputs))))

    @property
    def factors(self) -> tuple[Array, Array]:
        """A and B."""
        a, b = (getattr(self, name)[...] for name in self.names)
        return a, b

    def __call__(self, x: Float[Array, "b n i"]) -> Float[Array, "b n o"]:
        y = self.base(x)
        a, b = (factor.astype(y.dtype) for factor in self.factors)
        with jax.named_scope("adapter"):
            return y + self.scale * ((x.astype(y.dtype) @ a) @ b)

    def merge_into_base(self) -> nnx.Linear:
        """Return the same map as one linear layer: W + scale * B A, computed in float32."""
        change = jnp.matmul(*self.factors, precision="highest")
        kernel = self.base.kernel
        self.base.kernel = type(kernel)(kernel[...] + (self.scale * change).astype(kernel.dtype))
        return self.base


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers (Hu et al. 2022, eq. 3; arXiv 2312.03694).

    Every target becomes W x + b + s B(A x). The scale s is alpha / rank, as in LoRA's paper, or
    alpha / reduction, as in the published AST code: 0.125 instead of 2.67 with its reduction of 128
    and alpha of 16. Also trained: the head and the last LayerNorm before it. Identity at
    initialisation; `aatjax.merge` folds it into the backbone. Adds 2D rank per target, of the MLP's
    layers with M hidden units (D + M) rank.

    as_published=True: zero positions and a uniform head (`start_as_petl`), both factors drawn from
    normal(0.02), scale alpha / reduction.

    Attributes:
        rank: inner width r of the update, or one for each adapted block.
        alpha: numerator of the scale.
        targets: layers to adapt, of the attention's q, k, v and o (output) and the MLP's up and
            down; on the command line also as one word, `qv`, `qvupdown`.
        reduction: or D / rank, rounded; 128 if neither is given, rank 6 for AST-base and 8 at least
            for narrower models.
        scale: `alpha/rank` or `alpha/reduction`.
        as_published: see above.
        blocks: which blocks are adapted, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "lora"
    default_size: ClassVar[tuple[str, float]] = ("reduction", 128)

    rank: Annotated[int | tuple[int, ...], Range(1)] | None = None
    alpha: Annotated[float, Range(above=0)] = 16
    targets: tuple[str, ...] = ("q", "v")
    reduction: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    scale: Literal["alpha/rank", "alpha/reduction"] = "alpha/rank"
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        word = "".join(self.targets)
        targets = tuple(re.findall("up|down|[qkvo]", word))
        if not targets or "".join(targets) != word or len(set(targets)) < len(targets):
            raise UsageError(
                f"LoRA targets={self.targets!r} is not a set of q, k, v, o, up and down, such as "
                "('q', 'v')"
            )
        object.__setattr__(self, "targets", targets)

    def _find_divisor(self, dim: int, rank: int, index: int) -> float:
        """Return what alpha is divided by, in the adapted block of a number."""
        if not self.as_published and self.scale == "alpha/rank":
            return rank
        if self.rank is not None:
            return dim / rank
        given = self.reduction
        return (given[index] if isinstance(given, tuple) else given) or self.default_size[1]

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap the targets in `blocks/*/attn` and `blocks/*/mlp`."""
        dim, blocks = model.config.dim, list_blocks(self, model.config.depth)
        init: Init = "normal" if self.as_published else "identity"
        ranks = find_widths(self, dim, len(blocks))
        for target in self.targets:
            for index, (block, rank) in enumerate(zip(blocks, ranks, strict=True)):
                scale = self.alpha / self._find_divisor(dim, rank, index)

                def add_update(
                    _: str, base: nnx.Module, rank: int = rank, scale: float = scale
                ) -> nnx.Module:
                    projection, names = cast(nnx.Linear, base), ("lora_a", "lora_b")
                    labels = self.label(names[0]), self.label(names[1])
                    return LowRank(projection, rank, scale, init=init, names=labels, rngs=rngs)

                # Innermost: the projection itself, not a prefix or another wrapper around it.
                path = f"blocks/{block}/{LAYERS[target]}"
                surgery.wrap(model, path, add_update, innermost=True)
        if self.as_published:
            start_as_petl(model, rngs=rngs)
