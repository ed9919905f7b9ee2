"""Soft-MoA: a soft mixture of many tiny adapters in each block (arXiv 2402.00828)."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from aatjax import ops
from aatjax.errors import Range, UsageError
from aatjax.models.tokens import Mask, Tokens
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.moa import ExpertBank, Mixture, MixtureShape, record_routing


class SoftMixture(ExpertBank):
    """N experts with p slots each: `[b, n, d] -> [b, n, d]` (arXiv 2402.00828).

    `phi` [d, e, p] starts as a normal of variance 2 / ((N + d) p), W_down of each expert as
    normal(0.02), the rest as zero, so that the mixture is zero at first.

    Args:
        shape: number N, kind and size of the experts.
        slots: slots p per expert.
        normalize: tokens and phi of unit length in the scores, times a learned scale.
        shared: one more bottleneck, which reads every token itself.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        shape: MixtureShape,
        slots: int,
        *,
        normalize: bool = False,
        shared: bool = False,
        rngs: nnx.Rngs,
    ):
        size, dim = shape.experts, shape.block.dim
        spread = math.sqrt(2 / ((size + dim) * slots))
        self.normalize: bool = normalize
        self.watched: bool = False
        self.phi: nnx.Param[Array] = nnx.Param(
            jax.random.normal(rngs.params(), (dim, size, slots)) * spread
        )
        self.scale: nnx.Param[Array] | None = nnx.Param(jnp.ones(())) if normalize else None
        super().__init__(shape, rngs)
        block = shape.block
        self.shared: Bottleneck | None = (
            Bottleneck(dim, block.width, dtype=block.dtype, init=block.init, rngs=rngs)
            if shared
            else None
        )

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        mixed = self.mix(x, mask)
        return mixed if self.shared is None else mixed + self.shared(x)

    def mix(self, x: Tokens, mask: Mask | None) -> Tokens:
        """Return what the tokens read back of the slots."""
        phi, normalize = self.phi[...], self.normalize
        if self.scale is not None:
            square = jnp.sum(jnp.square(phi), axis=0, keepdims=True)
            phi = phi * jax.lax.rsqrt(square + 1e-6) * self.scale[...]
        if self.watched or not self.stacked:
            dispatch, combine = ops.soft_routing(x, phi, mask=mask, normalize=normalize)
            slots = ops.soft_dispatch(x, dispatch)
            record_routing(self, dispatch=dispatch, combine=combine, slots=slots)
            if not self.stacked:
                return ops.soft_combine(self.run_on_slots(slots), combine, x.dtype)
        weights = (self.w_down[...], self.b_down[...], self.w_up[...], self.b_up[...])
        return ops.soft_moe(x, phi, *weights, mask=mask, normalize=normalize)


@dataclasses.dataclass(frozen=True)
class SoftMoA(Mixture):
    """Soft mixture of adapters, parallel to a sub-layer of every block (arXiv 2402.00828).

    Each expert works on `slots` convex combinations of all tokens; each token receives a convex
    combination of all slot outputs. The mixture reads the LayerNorm output that its sub-layer
    reads, and is added once. Also trained: that LayerNorm, the head and the last LayerNorm before
    it. Identity at initialisation.
    Adds N(2Dr + r + D) + DNp parameters per site, and 2D for the LayerNorm; a shared expert is one
    more in N, without slots.

    as_published=True: zero positions and a uniform head (`start_as_petl`), all projections drawn
    from normal(0.02), and at the attention site (`mhsa`) the mixture is added a second time after
    the MLP. The published
    `normalize` is not reproduced: it divides phi by its norm over the experts instead of over D,
    and no run of the paper used it.

    Attributes:
        slots: p, slots per expert. Conformer and convpass experts convolve over their p slots,
            which have no order, so they make sense for mixtures over tokens only (`DenseMoA`).
        normalize: scores as in Soft MoE (arXiv 2308.00951, sec. 2.3): tokens and phi of unit
            length, times a learned scale; the slots combine the tokens as they are.
        shared: one more expert, a bottleneck of the same width applied to every token itself and
            added (the shared expert of DeepSeekMoE, arXiv 2401.06066).
    """

    name: ClassVar[str] = "soft_moa"

    slots: Annotated[int, Range(1)] = 1
    normalize: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize and self.as_published:
            raise UsageError(
                "SoftMoA normalize=True with as_published=True: no published run normalised; "
                "omit one of them"
            )
        if self.shared and self.as_published:
            raise UsageError("SoftMoA shared=True with as_published=True: no published run had it")

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """Return the soft mixture of one site."""
        return SoftMixture(
            shape, self.slots, normalize=self.normalize, shared=self.shared, rngs=rngs
        )
