"""Mixtures with a router per token: Dense-MoA (arXiv 2402.00828) and hard top-k routing."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array

from aatjax.errors import Range, UsageError
from aatjax.models.tokens import Mask, Tokens, is_per_token
from aatjax.petl.moa import ExpertBank, Mixture, MixtureShape, record_routing
from aatjax.surgery import Penalty


class DenseMixture(ExpertBank):
    """sum_i g_i A_i(z), g = softmax(W z + b) over the experts: `[b, n, d] -> [b, n, d]`.

    With `top`, each token keeps the gates of its `top` largest experts, rescaled to a sum of one,
    and a forward pass leaves the load-balance loss times `balance` in `penalty`:
    N sum_i f_i P_i, where f_i is the share of (token, choice) pairs that chose expert i and P_i
    its mean gate before the choice (Fedus et al. 2022, "Switch Transformers", eq. 4-6).
    All experts are computed in both cases: with a few hidden units each, omitting some would cost
    more than it saves.

    The router starts like a linear layer under the published loader: normal(0.02), bias zero.
    """

    def __init__(
        self, shape: MixtureShape, *, top: int | None = None, balance: float = 0.0, rngs: nnx.Rngs
    ):
        self.top: int | None = top
        self.balance: float = balance
        self.watched: bool = False
        self.deterministic = True  # set by `model.train()` and `model.eval()`
        self.w_router: nnx.Param[Array] = nnx.Param(
            normal(0.02)(rngs.params(), (shape.block.dim, shape.experts))
        )
        self.b_router: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (shape.experts,)))
        self.penalty: Penalty | None = None if top is None else Penalty(jnp.zeros(()))
        super().__init__(shape, rngs)

    @property
    def per_token(self) -> bool:
        """Whether no token depends on others: not with a loss or a record over all of them."""
        blocks = True if self.stacked else all(map(is_per_token, self.blocks))
        return blocks and (self.top is None or self.deterministic) and not self.watched

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        with jax.named_scope("router"):
            scores = jnp.einsum(
                "bnd,de->bne",
                x,
                self.w_router[...].astype(x.dtype),
                preferred_element_type=jnp.float32,
            )
        gates = jax.nn.softmax(scores + self.b_router[None, None], axis=-1)
        keep = None if mask is None else mask[..., None]
        if self.top is not None and self.penalty is not None:
            _, chosen = jax.lax.top_k(gates, self.top)
            hits = jax.nn.one_hot(chosen, gates.shape[-1], dtype=gates.dtype).sum(axis=-2)
            if not self.deterministic:
                share = hits.mean(axis=(0, 1), where=keep) / self.top
                mean = gates.mean(axis=(0, 1), where=keep)
                self.penalty[...] = self.balance * gates.shape[-1] * (share * mean).sum()
            gates = gates * hits
            gates = gates / gates.sum(axis=-1, keepdims=True)
        if keep is not None:
            gates = jnp.where(keep, gates, 0.0)
        record_routing(self, combine=gates)
        return self.run_gated(x, gates, mask).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DenseMoA(Mixture):
    """Dense mixture of adapters: every expert on every token (arXiv 2402.00828).

    y = sum_i softmax(W z + b)_i A_i(z), parallel to a sub-layer. Also trained: the LayerNorm in
    front, the head and the last LayerNorm before it. Identity at initialisation.
    Adds N(2Dr + r + D) + N(D + 1) parameters per site, and 2D for the LayerNorm.

    as_published=True: zero positions and a uniform head (`start_as_petl`), all projections drawn
    from normal(0.02), and at the attention site (`mhsa`) the mixture is added a second time after
    the MLP.
    """

    name: ClassVar[str] = "dense_moa"

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """Return the dense mixture of one site."""
        return DenseMixture(shape, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class TopKMoA(Mixture):
    """Hard routing: the `top` best experts of every token, with a load-balance loss.

    In neither paper; for comparison with the soft and the dense mixture, at the size of the latter.
    Identity at initialisation. as_published does not apply.

    Attributes:
        top: experts per token.
        balance: weight of the load-balance loss of each site in the training loss.
    """

    name: ClassVar[str] = "top_k_moa"

    top: Annotated[int, Range(1)] = 2
    balance: Annotated[float, Range(0)] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top > self.num_experts:
            raise UsageError(
                f"TopKMoA top={self.top} must be at most num_experts={self.num_experts}"
            )
        if self.as_published:
            raise UsageError("TopKMoA as_published=True: there is no published code to reproduce")

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """Return the routed mixture of one site."""
        return DenseMixture(shape, top=self.top, balance=self.balance, rngs=rngs)
