"""Mixtures that route every token: Dense-MoA (arXiv 2402.00828) and hard top-k routing."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Bool, Float

from aatjax.errors import UsageError
from aatjax.petl.moa import ExpertBank, Mixture, MixtureShape, record_routing
from aatjax.surgery import Penalty, Trainable


class DenseMixture(ExpertBank):
    """sum_i g_i A_i(z), g = softmax(W z + b) over the experts: `[b, n, d] -> [b, n, d]`.

    With `top` the gates of all but the `top` largest experts of a token are zero and the others
    sum to one, and a forward pass leaves behind `balance` times the load-balance loss
    N sum_i f_i P_i, where f_i is the share of (token, choice) pairs that chose expert i and P_i
    its mean gate before the choice (Fedus et al. 2022, "Switch Transformers", eq. 4-6).
    All experts are computed either way: for a few hidden units each, leaving some out would cost
    more than it saves.

    The router starts as PyTorch starts linear layers under the published loader: normal(0.02),
    bias zero.
    """

    def __init__(
        self, shape: MixtureShape, *, top: int | None = None, balance: float = 0.0, rngs: nnx.Rngs
    ):
        self.top, self.balance, self.watched = top, balance, False
        self.w_router = Trainable(normal(0.02)(rngs.params(), (shape.dim, shape.experts)))
        self.b_router = Trainable(zeros(rngs.params(), (shape.experts,)))
        self.penalty = None if top is None else Penalty(jnp.zeros(()))
        super().__init__(shape, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        with jax.named_scope("router"):
            scores = jnp.einsum(
                "bnd,de->bne",
                x,
                self.w_router[...].astype(x.dtype),
                preferred_element_type=jnp.float32,
            )
        gates = jax.nn.softmax(scores + self.b_router[None, None], axis=-1)
        if self.top is not None and self.penalty is not None:
            _, chosen = jax.lax.top_k(gates, self.top)
            kept = jax.nn.one_hot(chosen, gates.shape[-1]).sum(axis=-2)
            taking = None if mask is None else mask[..., None]
            share = kept.mean(axis=(0, 1), where=taking) / self.top
            mean = gates.mean(axis=(0, 1), where=taking)
            self.penalty[...] = self.balance * gates.shape[-1] * (share * mean).sum()
            gates = gates * kept
            gates = gates / gates.sum(axis=-1, keepdims=True)
        if mask is not None:
            gates = jnp.where(mask[..., None], gates, 0.0)
        record_routing(self, combine=gates)
        return self.weighted(x, gates, mask).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DenseMoA(Mixture):
    """Dense mixture of adapters: every expert on every token (arXiv 2402.00828).

    y = sum_i softmax(W z + b)_i A_i(z), parallel to a sub-layer. Trained besides: the LayerNorm in
    front, the head and the last LayerNorm before it. Identity at init.
    Adds N(2Dr + r + D) + N(D + 1) parameters a site, and 2D for LayerNorm.

    as_published=True: zero positions, all projections drawn from normal(0.02), and at the
    attention site (`mhsa`) the mixture added a second time after the MLP.
    """

    name: ClassVar[str] = "dense_moa"

    def mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """The dense mixture of one site."""
        return DenseMixture(shape, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class TopKMoA(Mixture):
    """Hard routing: every token is read by its `top` best experts, with a load-balance loss.

    Neither paper has it; it is here for comparison with the soft and the dense mixture, of whose
    size it is. Identity at init. as_published does not apply.

    Attributes:
        top: experts a token.
        balance: weight of the load-balance loss of each site in the training loss.
    """

    name: ClassVar[str] = "top_k_moa"

    top: int = 2
    balance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top <= self.num_experts:
            raise UsageError(f"TopKMoA top={self.top} must lie in 1..{self.num_experts}")
        if not self.balance >= 0:
            raise UsageError(f"TopKMoA balance={self.balance} must be 0 or more")
        if self.as_published:
            raise UsageError("TopKMoA as_published=True: no published code routes so")

    def mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """The routed mixture of one site."""
        return DenseMixture(shape, top=self.top, balance=self.balance, rngs=rngs)
