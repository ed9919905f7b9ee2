"""Prompt tuning, shallow and deep: learned tokens among the patches."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.pool import make_pool
from aatjax.models.tokens import Mask, Tokens, average_tokens, call_masked
from aatjax.petl.base import Method
from aatjax.petl.published_start import start_as_aat, start_as_petl
from aatjax.petl.sites import list_blocks

PromptPooling = Literal["all", "cls", "prompts", "patches", "prompts_patches"]
OF_MODEL: dict[str, PromptPooling] = {"mean_all": "all", "mean_patches": "patches", "cls": "cls"}


def draw_rows(config: ASTConfig, rows: int, rngs: nnx.Rngs) -> Array:
    """Draw prompts or prefixes `[1, rows, d]` from U(-v, v), v = sqrt(6 / (3 * patch area + d))."""
    bound = math.sqrt(6 / (3 * math.prod(config.patch) + config.dim))
    return jax.random.uniform(rngs.params(), (1, rows, config.dim), minval=-bound, maxval=bound)


class PromptEmbed(nnx.Module):
    """The embedding with places for prompts after CLS (and DIST): `[b, t, f] -> [b, n + p, d]`.

    Args:
        base: the patch embedding.
        rows: the prompts `[1, p, d]`, or the number of places that each block fills itself.
        prefix: tokens in front of the prompts.
        drop: drop DIST, the token after CLS.
        unused: do not insert the prompts, although they are parameters.
    """

    def __init__(
        self, base: nnx.Module, rows: Array | int, *, prefix: int, drop: bool, unused: bool = False
    ):
        self.base = base
        self.prefix: int = prefix
        self.drop: bool = drop
        self.unused: bool = unused
        self.places: int = rows if isinstance(rows, int) else rows.shape[1]
        self.prompts: nnx.Param[Array] | None = None if isinstance(rows, int) else nnx.Param(rows)

    def __call__(self, x: Float[Array, "b t f"]) -> Tokens:
        tokens: jax.Array = self.base(x)  # pyright: ignore[reportCallIssue]
        shape = (tokens.shape[0], self.places, tokens.shape[-1])
        rows = jnp.zeros(shape) if self.prompts is None else self.prompts[...]
        return self._insert(tokens, jnp.broadcast_to(rows, shape).astype(tokens.dtype))

    def mask(self, valid: Integer[Array, " b"], frames: int | None = None) -> Mask:
        """Return which tokens hold sound or are learned."""
        mask: jax.Array = self.base.mask(valid, frames)  # pyright: ignore[reportAttributeAccessIssue]
        return self._insert(mask, jnp.ones((mask.shape[0], self.places), bool))

    def _insert(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        if self.drop:
            tokens = jnp.delete(tokens, 1, axis=1)
        if self.unused:
            return tokens
        return jnp.concatenate([tokens[:, : self.prefix], rows, tokens[:, self.prefix :]], axis=1)


class PromptBlock(nnx.Module):
    """A block that first replaces the tokens at the places of the prompts by its own prompts."""

    def __init__(self, base: nnx.Module, rows: Array, *, prefix: int):
        self.base = base
        self.prefix = prefix
        self.prompts: nnx.Param[Array] = nnx.Param(rows)

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        rows = jnp.broadcast_to(self.prompts[...], (x.shape[0], *self.prompts.shape[1:]))
        end = self.prefix + rows.shape[1]
        x = jnp.concatenate([x[:, : self.prefix], rows.astype(x.dtype), x[:, end:]], axis=1)
        return call_masked(self.base, x, mask)


class PromptPool(nnx.Module):
    """Pooling of a sequence with prompts: `[b, n + p, d] -> [b, d]`."""

    def __init__(self, base: nnx.Module, kind: PromptPooling, *, prefix: int, places: int):
        self.base = base
        self.kind: PromptPooling = kind
        self.prefix: int = prefix
        self.places: int = places

    def __call__(self, tokens: Tokens, mask: Mask | None = None) -> Float[Array, "b d"]:
        end = self.prefix + self.places
        match self.kind:
            case "cls":
                return tokens[:, 0]
            case "prompts":
                return tokens[:, self.prefix : end].mean(axis=1)
            case "patches":
                return average_tokens(tokens, mask, end)
            case "prompts_patches":
                return average_tokens(tokens, mask, 1)
            case _:
                return average_tokens(tokens, mask)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Visual prompt tuning (Jia et al. 2022) of an AST, shallow or deep.

    `tokens` learned rows follow the prefix tokens. Shallow prompts (SPT) are inserted before the
    first block; deep ones (DPT) too, and every later block replaces them by its own. Prompts have
    no position. Also trained: the head and the last LayerNorm before it. Not the identity at
    initialisation. Adds tokens * D, times the number of blocks if deep.

    arXiv 2312.03694 and 2402.00828 drop the DIST token and pool all tokens (SPT 300, DPT 25: the
    defaults here); AAT's baseline (2401.10544) keeps it and pools CLS and DIST:
    `Prompt(tokens=12, keep_dist=True, pool=None)`.

    as_published=True: with keep_dist=False zero positions and a uniform head (`start_as_petl`);
    with keep_dist=True AAT's start of the head (`start_as_aat`) and what AAT's code computes: the
    shallow prompts are never inserted, and the deep ones replace the first patches in all blocks
    but the first.

    Attributes:
        tokens: number of prompts.
        deep: blocks have prompts of their own.
        blocks: which blocks, if deep, see `petl.sites.list_blocks`; None is all. Without the first
            block among them, the prompts that enter it are learned too.
        keep_dist: keep the DIST token.
        pool: mean of `all` tokens, the `prompts`, the `patches`, `prompts_patches` (all but CLS),
            or `cls` alone; None is the model's, and so are its `stats`, `attention` and
            `prototypes`, which do not pool the prompts (but `attention`).
        as_published: see above.
    """

    name: ClassVar[str] = "prompt"
    rates: ClassVar[tuple[float, float]] = (1e-2, 1e-2)

    tokens: Annotated[int, Range(1)] = 25
    deep: bool = True
    keep_dist: bool = False
    pool: PromptPooling | None = "all"
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_published and self.keep_dist and self.pool == "prompts":
            raise UsageError(
                "Prompt as_published=True with keep_dist=True never inserts the prompts, so there "
                "are none to pool: give another pool"
            )
        if self.blocks is not None and not self.deep:
            raise UsageError("Prompt deep=False has no blocks with prompts of their own")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `embed`, `pool` and, for deep prompts, `blocks/*`."""
        config = model.config
        drop = config.distilled and not self.keep_dist
        prefix = config.num_prefix - drop
        defect = self.as_published and self.keep_dist

        def draw() -> Array:
            return draw_rows(config, self.tokens, rngs)

        blocks = list_blocks(self, config.depth) if self.deep else []
        # The first block sets its own places too, so that all blocks are alike and can be scanned.
        shallow = self.tokens if 0 in blocks and not defect else draw()
        surgery.wrap(
            model,
            "embed",
            lambda _, base: PromptEmbed(base, shallow, prefix=prefix, drop=drop, unused=defect),
        )
        for number in [number for number in blocks if number or not defect]:
            surgery.wrap(
                model, f"blocks/{number}", lambda _, base: PromptBlock(base, draw(), prefix=prefix)
            )
        places = 0 if defect else self.tokens
        kind = self.pool or (None if defect else OF_MODEL.get(config.pool))
        if config.pool in ("stats", "bands", "attention", "prototypes"):  # of the patches, as it is
            model.pool.prefix, model.pool.start = prefix, prefix + places
        elif kind is not None:
            surgery.wrap(
                model, "pool", lambda _, base: PromptPool(base, kind, prefix=prefix, places=places)
            )
        elif drop:
            model.pool = make_pool(dataclasses.replace(config, pool="cls"), rngs=rngs)
        if self.as_published:
            (start_as_aat if self.keep_dist else start_as_petl)(model, rngs=rngs)
