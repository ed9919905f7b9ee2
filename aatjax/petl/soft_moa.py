"""Soft-MoA: a soft mixture of many tiny adapters in each block (arXiv 2402.00828)."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float

from aatjax import ops, surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method, Parallel
from aatjax.surgery import Trainable


class SoftMixture(nnx.Module):
    """N bottleneck experts behind p slots each: `[b, n, d] -> [b, n, d]` (arXiv 2402.00828).

    `phi` starts as a normal of variance 2 / ((N + d) p), W_down of each expert as a normal of
    standard deviation 0.02, the rest as zero, so that the mixture is zero at first.

    Args:
        dim: token width d.
        experts: number of experts N.
        slots: slots p an expert.
        width: bottleneck width r of an expert.
        rngs: source of the initial weights.
    """

    def __init__(self, dim: int, experts: int, slots: int, width: int, *, rngs: nnx.Rngs):
        spread = math.sqrt(2 / ((experts + dim) * slots))
        self.phi = Trainable(jax.random.normal(rngs.params(), (dim, experts, slots)) * spread)
        self.w_down = Trainable(normal(0.02)(rngs.params(), (experts, dim, width)))
        self.b_down = Trainable(zeros(rngs.params(), (experts, width)))
        self.w_up = Trainable(zeros(rngs.params(), (experts, width, dim)))
        self.b_up = Trainable(zeros(rngs.params(), (experts, dim)))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return ops.soft_moe(
            x,
            self.phi[...],
            self.w_down[...],
            self.b_down[...],
            self.w_up[...],
            self.b_up[...],
        )


@dataclasses.dataclass(frozen=True)
class SoftMoA(Method):
    """Soft mixture of adapters, parallel to a sub-layer of every block (arXiv 2402.00828).

    Every expert works on `slots` convex combinations of all tokens; the tokens read the slot
    outputs back by another convex combination. The mixture reads the LayerNorm output that its
    sub-layer reads, and is added once. Trained besides: that LayerNorm, the head and the last
    LayerNorm before it. Identity at init. The published code adds the mixture twice at the
    attention site and starts all projections at random; this is the paper's form.
    Adds N(2Dr + r + D) + DNp parameters a site, r = round(D / reduction), and 2D for LayerNorm.

    Attributes:
        num_experts: N.
        slots: p, slots an expert.
        reduction: token width over bottleneck width.
        location: parallel to the attention (`mhsa`, the published default), to the MLP (`ffn`),
            or to both (`both`, "Houlsby").
        train_norm: train the LayerNorm in front of the site.
    """

    name: ClassVar[str] = "soft_moa"

    num_experts: int = 7
    slots: int = 1
    reduction: float = 128
    location: Literal["mhsa", "ffn", "both"] = "mhsa"
    train_norm: bool = True

    def __post_init__(self) -> None:
        for field in ("num_experts", "slots"):
            if getattr(self, field) < 1:
                raise UsageError(f"SoftMoA {field}={getattr(self, field)} must be at least 1")
        if not self.reduction > 0:
            raise UsageError(f"SoftMoA reduction={self.reduction} must be above 0")
        if self.location not in ("mhsa", "ffn", "both"):
            raise UsageError(f"SoftMoA location={self.location!r} is not one of mhsa, ffn, both")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/attn` and/or `blocks/*/mlp`."""
        dim = model.config.dim
        width = max(1, round(dim / self.reduction))
        sites = {"mhsa": ("attn", "ln1"), "ffn": ("mlp", "ln2")}
        chosen = sites.values() if self.location == "both" else [sites[self.location]]
        for submodule, norm in chosen:
            surgery.wrap(
                model,
                f"blocks/*/{submodule}",
                lambda _, base: Parallel(
                    base,
                    "soft_moa",
                    SoftMixture(dim, self.num_experts, self.slots, width, rngs=rngs),
                ),
            )
            if self.train_norm:
                surgery.retag(model, f"blocks/*/{norm}/*")
