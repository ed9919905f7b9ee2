"""The base of all mixtures of adapters: experts, sites, size, the published form."""

import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float

from aatjax import ops, surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.tokens import Mask, Tokens, call_masked
from aatjax.petl.base import Method, Monitor, Parallel
from aatjax.petl.bottleneck import make_up_init
from aatjax.petl.published_start import start_as_petl
from aatjax.petl.routing_weights import make_monitor
from aatjax.petl.sites import BlockShape, Expert, Location, list_blocks, list_sites
from aatjax.petl.sizes import find_widths


@dataclasses.dataclass(frozen=True)
class MixtureShape:
    """The mixture at one site: `experts` blocks of one shape."""

    block: BlockShape
    experts: int


class ExpertBank(nnx.Module):
    """N adapter blocks of one kind and size.

    Bottlenecks are stacked, `w_down` [e, d, r], `b_down` [e, r], `w_up` [e, r, d] and `b_up`
    [e, d], so that they run as one product; other blocks are the list `blocks`.
    """

    def __init__(self, shape: MixtureShape, rngs: nnx.Rngs):
        block = shape.block
        self.dtype: jnp.dtype = block.dtype
        self.stacked: bool = block.kind == "bottleneck"
        size, dim, width = shape.experts, block.dim, block.width
        if self.stacked:
            self.w_down: nnx.Param[Array] = nnx.Param(
                normal(0.02)(rngs.params(), (size, dim, width))
            )
            self.b_down: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (size, width)))
            self.w_up: nnx.Param[Array] = nnx.Param(
                make_up_init(block.init)(rngs.params(), (size, width, dim))
            )
            self.b_up: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (size, dim)))
        else:
            self.blocks: nnx.List[nnx.Module] = nnx.List(block.make(rngs) for _ in range(size))

    def run_on_slots(self, slots: Float[Array, "b e p d"]) -> Float[Array, "b e p d"]:
        """Apply each expert to its own slots; for blocks that are not bottlenecks."""
        outputs = [block(slots[:, i].astype(self.dtype)) for i, block in enumerate(self.blocks)]
        return jnp.stack(outputs, axis=1)

    def run_gated(self, x: Tokens, gates: Float[Array, "b n e"], mask: Mask | None) -> Tokens:
        """Return sum_i gates_i * A_i(x), with every expert on every token.

        Bottlenecks run as two products over all experts, with the gates applied in between, so
        that nothing of size [b, n, e, d] is stored.
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
            hidden = ops.gelu(x.astype(dtype) @ w_down + b_down)
            hidden = hidden * jnp.repeat(gates, width, axis=-1)
            outputs = hidden @ w_up
        with jax.named_scope("combine"):
            return outputs + gates @ self.b_up[...].astype(dtype)


class TwiceBlock(nnx.Module):
    """The published block, whose mixture m at the attention is added again after the MLP.

    h = x + Attn(u) + m(u) with u = LN1 x; y = h + MLP(LN2 h) + m(u).
    """

    def __init__(self, base: nnx.Module, name: str, mixture: nnx.Module):
        self.base = base
        self.name = name
        setattr(self, name, mixture)

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        base: Any = self.base
        u = base.ln1(x).astype(x.dtype)
        with jax.named_scope("adapter"):
            mixed = call_masked(getattr(self, self.name), u, mask)
        h = x + call_masked(base.attn, u, mask) + mixed
        return h + call_masked(base.mlp, base.ln2(h).astype(h.dtype), mask) + mixed


@dataclasses.dataclass(frozen=True)
class Mixture(Method):
    """The base of `SoftMoA`, `DenseMoA` and `TopKMoA`.

    Attributes:
        num_experts: N.
        width: bottleneck width r of each expert, or one for each adapted block.
        reduction: or D / r, rounded; 128 if no size is given, and then 8 wide at least on models
            narrower than AST-base.
        budget: or the number of parameters of all mixtures of the model together, without
            LayerNorms and head; r is the width that comes nearest.
        location: parallel to the attention (`mhsa`, the published default), to the MLP (`ffn`),
            or to both (`both`, "Houlsby").
        expert: block of the experts: `bottleneck`, `conformer` or `convpass`.
        kernel: tokens (or slots) of the convolution of conformer experts.
        train_norm: train the LayerNorm in front of the site.
        as_published: compute what the repository's code computes.
        blocks: which blocks are adapted, see `petl.sites.list_blocks`; None is all.
    """

    default_size: ClassVar[tuple[str, float]] = ("reduction", 128)

    num_experts: Annotated[int, Range(1)] = 7
    width: Annotated[int | tuple[int, ...], Range(1)] | None = None
    reduction: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    budget: Annotated[int, Range(1)] | None = None
    location: Location = "mhsa"
    expert: str | tuple[str, ...] = "bottleneck"
    kernel: Annotated[int, Range(1)] = 8
    train_norm: bool = True
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.expert, str):
            raise UsageError(
                f"{name} expert={self.expert!r}: the experts of a mixture are of one kind and "
                "size, since they run as one batched product and a budget is shared evenly: name "
                "one; petl.Combined adds several adapters to one model"
            )
        if self.expert not in get_args(Expert):
            raise UsageError(
                f"{name} expert={self.expert!r} is not one of {', '.join(get_args(Expert))}"
            )

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module of one site, `[b, n, d] -> [b, n, d]`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement make_mixture")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/attn` and/or `blocks/*/mlp`, or as published `blocks/*`."""
        config = model.config
        blocks = list_blocks(self, config.depth)
        count = functools.partial(self._count_parameters, config, len(blocks))
        widths = find_widths(self, config.dim, len(blocks), count)
        # Published: a mixture at the attention alone is added twice.
        twice = self.as_published and self.location == "mhsa"
        wrapper = TwiceBlock if twice else Parallel

        for sublayer, norm in list_sites(self.location):
            for block, width in zip(blocks, widths, strict=True):

                def add_mixture(_: str, base: nnx.Module, width: int = width) -> nnx.Module:
                    mixture = self.make_mixture(self._make_shape(config, width), rngs)
                    return wrapper(base, self.label(self.name), mixture)

                path = f"blocks/{block}"
                surgery.wrap(model, path if twice else f"{path}/{sublayer}", add_mixture)
                if self.train_norm:
                    surgery.unfreeze(model, f"{path}/{norm}/*")
        if self.as_published:
            start_as_petl(model, rngs=rngs)

    def monitor(self, model: AST) -> Monitor | None:
        """Return entropy, use and similarity of the experts: `summarize_routing`."""
        return make_monitor(model)

    def _make_shape(self, config: ASTConfig, width: int) -> MixtureShape:
        block = BlockShape(
            self.expert,  # pyright: ignore[reportArgumentType]
            config.dim,
            width,
            jnp.dtype(config.dtype),
            kernel=self.kernel,
            as_published=self.as_published,
        )
        return MixtureShape(block, self.num_experts)

    def _count_parameters(self, config: ASTConfig, blocks: int, width: int) -> int:
        """Return the number of parameters of all mixtures of a model."""
        shape = self._make_shape(config, width)
        made = nnx.eval_shape(lambda: self.make_mixture(shape, nnx.Rngs(0)))
        values = surgery.variables(made).values()
        each = sum(math.prod(v.shape) for v in values if isinstance(v, nnx.Param))
        return blocks * len(list_sites(self.location)) * each


def record_routing(module: nnx.Module, **arrays: Array | None) -> None:
    """Keep arrays as `nnx.Intermediate` variables of a mixture whose `watched` is True."""
    if getattr(module, "watched", False):
        for name, value in arrays.items():
            if value is not None:
                setattr(module, f"recorded_{name}", nnx.Intermediate(value))
