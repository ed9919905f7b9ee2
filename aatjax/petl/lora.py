"""LoRA: low-rank changes of the attention's projections, which can be merged into them."""

import dataclasses
from typing import ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method, zero_positions
from aatjax.petl.bottleneck import Init, up_init
from aatjax.petl.sites import block_paths, bottleneck_width
from aatjax.surgery import Trainable

SITES = {"q": "q", "k": "k", "v": "v", "o": "out"}


class LowRank(nnx.Module):
    """W x + b + scale * B(A x): `[b, n, d] -> [b, n, d]`, A d to r, B r to d, no biases.

    A starts as a normal of standard deviation 0.02, B as zero (or like A with init="normal").
    """

    def __init__(self, base: nnx.Linear, width: int, scale: float, *, init: Init, rngs: nnx.Rngs):
        self.base = base
        self.scale = scale
        inputs, outputs = base.kernel.shape
        self.lora_a = Trainable(normal(0.02)(rngs.params(), (inputs, width)))
        self.lora_b = Trainable(up_init(init)(rngs.params(), (width, outputs)))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = self.base(x)
        a, b = self.lora_a[...].astype(y.dtype), self.lora_b[...].astype(y.dtype)
        with jax.named_scope("adapter"):
            return y + self.scale * ((x.astype(y.dtype) @ a) @ b)

    def merged(self) -> nnx.Linear:
        """The same map as one linear layer: W + scale * B A, computed in float32."""
        change = jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")
        kernel = self.base.kernel
        self.base.kernel = type(kernel)(kernel[...] + (self.scale * change).astype(kernel.dtype))
        return self.base


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of attention projections (Hu et al. 2022, eq. 3; arXiv 2312.03694).

    Every chosen projection becomes W x + b + s B(A x). The scale s is alpha / rank, as in LoRA's
    paper, or alpha / reduction, as the published AST code has it: with its reduction 128 and alpha
    16 that is 0.125 in place of 2.67. Trained besides: the head and the last LayerNorm before it.
    Identity at init; `aatjax.merge` folds it into the backbone. Adds 2Dr a projection.

    as_published=True: zero positions, both factors drawn from normal(0.02), scale
    alpha / reduction.

    Attributes:
        targets: which of the projections q, k, v and o (output), as one word.
        reduction: token width over rank; 128 gives rank 6 for AST-base.
        alpha: numerator of the scale.
        scale: `alpha/rank` or `alpha/reduction`.
        as_published: see above.
        last_blocks: adapt only the last so many blocks; None adapts all.
    """

    name: ClassVar[str] = "lora"

    targets: str = "qv"
    reduction: float = 128
    alpha: float = 16
    scale: Literal["alpha/rank", "alpha/reduction"] = "alpha/rank"
    as_published: bool = False
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        wrong = sorted(set(self.targets) - set(SITES))
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise UsageError(
                f"LoRA targets={self.targets!r} is not a set of the letters q, k, v, o, such as qv"
            )
        if not self.reduction > 0:
            raise UsageError(f"LoRA reduction={self.reduction} must be above 0")
        if not self.alpha > 0:
            raise UsageError(f"LoRA alpha={self.alpha} must be above 0")
        if self.scale not in ("alpha/rank", "alpha/reduction"):
            raise UsageError(f"LoRA scale={self.scale!r} is neither alpha/rank nor alpha/reduction")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/attn/q`, `k`, `v`, `out` as chosen."""
        width = bottleneck_width(model.config.dim, self.reduction)
        published = self.as_published or self.scale == "alpha/reduction"
        scale = self.alpha / (self.reduction if published else width)
        init: Init = "normal" if self.as_published else "identity"
        for letter in self.targets:
            for where in block_paths("LoRA", model.config.depth, self.last_blocks):
                surgery.wrap(
                    model,
                    f"{where}/attn/{SITES[letter]}",
                    # The projection itself, not what prefixes or others put around it.
                    lambda _, base: LowRank(
                        cast(nnx.Linear, base), width, scale, init=init, rngs=rngs
                    ),
                    innermost=True,
                )
        if self.as_published:
            zero_positions(model)
