"""What all mixtures of adapters share: experts, sites, a parameter budget, the published form."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Bool, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import call_masked
from aatjax.petl.base import Method, Monitor, Parallel, zero_positions
from aatjax.petl.bottleneck import Init, up_init
from aatjax.petl.routing_weights import make_monitor
from aatjax.petl.sites import Expert, Location, block_paths, bottleneck_width, make_block, sites
from aatjax.surgery import Recorded, Trainable


@dataclasses.dataclass(frozen=True)
class MixtureShape:
    """What a mixture at one site is made of."""

    dim: int
    experts: int
    width: int
    expert: Expert
    kernel: int
    dtype: jnp.dtype
    init: Init
    as_published: bool


class ExpertBank(nnx.Module):
    """N adapter blocks of one kind and size.

    Bottlenecks are stacked, `w_down` [e, d, r], `b_down` [e, r], `w_up` [e, r, d] and `b_up`
    [e, d], so that they run as one product; other blocks stand side by side in `blocks`.
    """

    def __init__(self, shape: MixtureShape, rngs: nnx.Rngs):
        self.dtype = shape.dtype
        self.stacked = shape.expert == "bottleneck"
        size, dim, width = shape.experts, shape.dim, shape.width
        if self.stacked:
            self.w_down = Trainable(normal(0.02)(rngs.params(), (size, dim, width)))
            self.b_down = Trainable(zeros(rngs.params(), (size, width)))
            self.w_up = Trainable(up_init(shape.init)(rngs.params(), (size, width, dim)))
            self.b_up = Trainable(zeros(rngs.params(), (size, dim)))
        else:
            self.blocks = nnx.List(
                make_block(
                    shape.expert,
                    dim,
                    width,
                    kernel=shape.kernel,
                    norm=True,
                    dtype=shape.dtype,
                    init=shape.init,
                    as_published=shape.as_published,
                    rngs=rngs,
                )
                for _ in range(size)
            )

    def on_slots(self, slots: Float[Array, "b e p d"]) -> Float[Array, "b e p d"]:
        """Expert i on its own slots (blocks that are not bottlenecks)."""
        outputs = [block(slots[:, i].astype(self.dtype)) for i, block in enumerate(self.blocks)]
        return jnp.stack(outputs, axis=1)

    def weighted(
        self, x: Float[Array, "b n d"], gates: Float[Array, "b n e"], mask: Any
    ) -> Float[Array, "b n d"]:
        """sum_i gates_i * A_i(x), every expert on every token.

        Bottlenecks as two products over all experts at once, the gates folded in between them:
        nothing of size [b, n, e, d] is made.
        """
        if not self.stacked:
            outputs = jnp.stack([call_masked(block, x, mask) for block in self.blocks], axis=-1)
            return jnp.einsum("bnde,bne->bnd", outputs, gates.astype(self.dtype))
        dtype = self.dtype
        size, dim, width = self.w_down.shape
        gates = gates.astype(dtype)
        w_down = jnp.swapaxes(self.w_down[...], 0, 1).reshape(dim, size * width).astype(dtype)
        w_up = self.w_up[...].reshape(size * width, dim).astype(dtype)
        b_down = self.b_down[...].reshape(1, 1, -1).astype(dtype)
        with jax.named_scope("experts"):
            hidden = jax.nn.gelu(x.astype(dtype) @ w_down + b_down, approximate=False)
            hidden = hidden * jnp.repeat(gates, width, axis=-1)
            outputs = hidden @ w_up
        with jax.named_scope("combine"):
            return outputs + gates @ self.b_up[...].astype(dtype)


class TwiceBlock(nnx.Module):
    """The published block with a mixture m at the attention, which is added again after the MLP.

    h = x + Attn(u) + m(u) with u = LN1 x; y = h + MLP(LN2 h) + m(u).
    """

    def __init__(self, base: nnx.Module, name: str, mixture: nnx.Module):
        self.base = base
        self.name = name
        setattr(self, name, mixture)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        base: Any = self.base
        u = base.ln1(x).astype(x.dtype)
        with jax.named_scope("adapter"):
            mixed = call_masked(getattr(self, self.name), u, mask)
        h = x + call_masked(base.attn, u, mask) + mixed
        return h + call_masked(base.mlp, base.ln2(h).astype(h.dtype), mask) + mixed


@dataclasses.dataclass(frozen=True)
class Mixture(Method):
    """The fields that mixtures of adapters share; see `SoftMoA`, `DenseMoA` and `TopKMoA`.

    Attributes:
        num_experts: N.
        reduction: token width over bottleneck width.
        budget: parameters of all mixtures of a model, LayerNorms and head not counted; the
            bottleneck width is then the one that comes nearest, and `reduction` does not matter.
        location: parallel to the attention (`mhsa`, the published default), to the MLP (`ffn`),
            or to both (`both`, "Houlsby").
        expert: the experts' block: `bottleneck`, `conformer` or `convpass`.
        kernel: tokens (or slots) that conformer experts see.
        train_norm: train the LayerNorm in front of the site.
        as_published: run what the repository's code ran.
        last_blocks: adapt only the last so many blocks; None adapts all.
    """

    num_experts: int = 7
    reduction: float = 128
    budget: int | None = None
    location: Location = "mhsa"
    expert: str | tuple[str, ...] = "bottleneck"
    kernel: int = 8
    train_norm: bool = True
    as_published: bool = False
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.num_experts < 1:
            raise UsageError(f"{name} num_experts={self.num_experts} must be at least 1")
        if not self.reduction > 0:
            raise UsageError(f"{name} reduction={self.reduction} must be above 0")
        if self.location not in get_args(Location):
            raise UsageError(
                f"{name} location={self.location!r} is not one of {', '.join(get_args(Location))}"
            )
        if not isinstance(self.expert, str):
            raise UsageError(
                f"{name} expert={self.expert!r}: the experts of a mixture are of one kind and "
                "size, since they run as one batched product and a budget is shared evenly: name "
                "one; petl.Combined puts different adapters side by side"
            )
        if self.expert not in get_args(Expert):
            raise UsageError(
                f"{name} expert={self.expert!r} is not one of {', '.join(get_args(Expert))}"
            )
        if self.kernel < 1:
            raise UsageError(f"{name} kernel={self.kernel} must be at least 1")

    def mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """The module at one site, `[b, n, d] -> [b, n, d]`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement mixture")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/attn` and/or `blocks/*/mlp`, or as published `blocks/*`."""
        config = model.config
        expert: Expert = self.expert  # pyright: ignore[reportAssignmentType]
        shape = MixtureShape(
            config.dim,
            self.num_experts,
            bottleneck_width(config.dim, self.reduction),
            expert,
            self.kernel,
            jnp.dtype(config.dtype),
            "normal" if self.as_published else "identity",
            self.as_published,
        )
        if self.budget is not None:
            count = len(sites(self.location)) * (self.last_blocks or config.depth)
            shape = dataclasses.replace(shape, width=self.width_of_budget(shape, count))
        for submodule, norm in sites(self.location):
            # Published: a mixture at the attention alone is added twice.
            twice = self.as_published and self.location == "mhsa"
            wrapper = TwiceBlock if twice else Parallel
            for where in block_paths(type(self).__name__, config.depth, self.last_blocks):
                surgery.wrap(
                    model,
                    where if twice else f"{where}/{submodule}",
                    lambda _, base, wrapper=wrapper: wrapper(
                        base, self.name, self.mixture(shape, rngs)
                    ),
                )
                if self.train_norm:
                    surgery.retag(model, f"{where}/{norm}/*")
        if self.as_published:
            zero_positions(model)

    def monitor(self, model: AST) -> Monitor | None:
        """Entropy, use and likeness of the experts: `petl.routing_weights.summarize_routing`."""
        return make_monitor(model)

    def width_of_budget(self, shape: MixtureShape, count: int) -> int:
        """The bottleneck width r whose `count` mixtures come nearest to the budget.

        Raises:
            UsageError: even r = 1 is nearer to twice the budget than to it.
        """
        assert self.budget is not None

        def size(width: int) -> int:
            wanted = dataclasses.replace(shape, width=width)
            made = nnx.eval_shape(lambda: self.mixture(wanted, nnx.Rngs(0)))
            values = surgery.variables(made).values()
            return count * sum(math.prod(v.shape) for v in values if isinstance(v, nnx.Param))

        one, two = size(1), size(2)
        if one > 1.5 * self.budget:
            raise UsageError(
                f"{type(self).__name__} budget={self.budget:,} is not enough for "
                f"{self.num_experts} experts at {count} sites: with one hidden unit each they "
                f"have {one:,} parameters; give more, or fewer experts"
            )
        guess = max(1, round(1 + (self.budget - one) / (two - one)))
        near = range(max(1, guess - 2), guess + 3)
        return min(near, key=lambda width: abs(size(width) - (self.budget or 0)))


def record_routing(module: nnx.Module, **arrays: Array | None) -> None:
    """Leaves arrays behind in a mixture whose `watched` is set."""
    if getattr(module, "watched", False):
        for name, value in arrays.items():
            if value is not None:
                setattr(module, f"recorded_{name}", Recorded(value))
