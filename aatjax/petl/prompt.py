"""Prompt tuning, shallow and deep: learned tokens among the patches."""

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, Pool
from aatjax.models.config import ASTConfig
from aatjax.models.tokens import average_tokens, call_masked
from aatjax.petl.base import Method, zero_positions
from aatjax.surgery import Trainable

PromptPooling = Literal["all", "cls", "prompts", "patches", "prompts_patches"]
OF_MODEL: dict[str, PromptPooling] = {"mean_all": "all", "mean_patches": "patches", "cls": "cls"}


def uniform_rows(config: ASTConfig, rows: int, rngs: nnx.Rngs) -> Array:
    """Initial prompts or prefixes `[1, rows, d]`: U(-v, v), v = sqrt(6 / (3 * patch area + d))."""
    bound = math.sqrt(6 / (3 * math.prod(config.patch) + config.dim))
    return jax.random.uniform(rngs.params(), (1, rows, config.dim), minval=-bound, maxval=bound)


class PromptEmbed(nnx.Module):
    """The embedding with room for prompts after CLS (and DIST): `[b, t, f] -> [b, n + p, d]`.

    Args:
        base: the patch embedding.
        rows: the prompts `[1, p, d]`, or a number of places that each block fills itself.
        prefix: tokens in front of the prompts.
        drop: whether the token after CLS, DIST, is left out.
        unused: the prompts are parameters but are not inserted.
    """

    def __init__(
        self, base: nnx.Module, rows: Array | int, *, prefix: int, drop: bool, unused: bool = False
    ):
        self.base = base
        self.prefix, self.drop, self.unused = prefix, drop, unused
        self.places = rows if isinstance(rows, int) else rows.shape[1]
        self.prompts = None if isinstance(rows, int) else Trainable(rows)

    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b n d"]:
        tokens: jax.Array = self.base(x)  # pyright: ignore[reportCallIssue]
        if self.drop:
            tokens = jnp.delete(tokens, 1, axis=1)
        if self.unused:
            return tokens
        batch, _, dim = tokens.shape
        rows = jnp.zeros((1, self.places, dim)) if self.prompts is None else self.prompts[...]
        rows = jnp.broadcast_to(rows, (batch, self.places, dim)).astype(tokens.dtype)
        return jnp.concatenate([tokens[:, : self.prefix], rows, tokens[:, self.prefix :]], axis=1)

    def mask(self, valid: Integer[Array, " b"], frames: int | None = None) -> Bool[Array, "b n"]:
        """Which tokens hold sound or are learned."""
        mask: jax.Array = self.base.mask(valid, frames)  # pyright: ignore[reportAttributeAccessIssue]
        if self.drop:
            mask = jnp.delete(mask, 1, axis=1)
        if self.unused:
            return mask
        rows = jnp.ones((mask.shape[0], self.places), bool)
        return jnp.concatenate([mask[:, : self.prefix], rows, mask[:, self.prefix :]], axis=1)


class PromptBlock(nnx.Module):
    """A block that first overwrites the places of the prompts with its own."""

    def __init__(self, base: nnx.Module, rows: Array, *, prefix: int):
        self.base = base
        self.prefix = prefix
        self.prompts = Trainable(rows)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        rows = jnp.broadcast_to(self.prompts[...], (x.shape[0], *self.prompts.shape[1:]))
        end = self.prefix + rows.shape[1]
        x = jnp.concatenate([x[:, : self.prefix], rows.astype(x.dtype), x[:, end:]], axis=1)
        return call_masked(self.base, x, mask)


class PromptPool(nnx.Module):
    """Pooling that knows where the prompts stand: `[b, n + p, d] -> [b, d]`."""

    def __init__(self, base: nnx.Module, kind: PromptPooling, *, prefix: int, places: int):
        self.base = base
        self.kind, self.prefix, self.places = kind, prefix, places

    def __call__(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b d"]:
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
    """Visual-prompt-style tuning (Jia et al. 2022) of an AST, shallow or deep.

    `tokens` learned rows stand after the prefix tokens. Shallow prompts (SPT) are inserted before
    the first block; deep ones (DPT) are inserted there too, and every later block replaces them by
    its own. Prompts have no position. Trained besides: the head and the last LayerNorm before it.
    Not the identity at init. Adds tokens * D, times the number of blocks if deep.

    arXiv 2312.03694 and 2402.00828 leave out the DIST token and pool all tokens (SPT 300, DPT 25:
    the defaults here); AAT's baseline (2401.10544) keeps it and pools CLS and DIST:
    `Prompt(tokens=12, keep_dist=True, pool=None)`.

    as_published=True: with keep_dist=False zero positions; with keep_dist=True, what AAT's code
    does: the shallow prompts are never inserted, and the deep ones overwrite the first patches in
    all blocks but the first.

    Attributes:
        tokens: number of prompts.
        deep: own prompts in every block.
        keep_dist: keep the DIST token.
        pool: what is averaged: `all` tokens, the `prompts`, the `patches`, `prompts_patches` (all
            but CLS), or `cls` alone; None takes the model's.
        as_published: see above.
    """

    name: ClassVar[str] = "prompt"

    tokens: int = 25
    deep: bool = True
    keep_dist: bool = False
    pool: PromptPooling | None = "all"
    as_published: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"Prompt tokens={self.tokens} must be at least 1")
        if self.pool not in (None, *get_args(PromptPooling)):
            raise UsageError(
                f"Prompt pool={self.pool!r} is not one of {', '.join(get_args(PromptPooling))}"
            )
        if self.as_published and self.keep_dist and self.pool == "prompts":
            raise UsageError(
                "Prompt as_published=True with keep_dist=True never inserts the prompts, so there "
                "are none to pool: give another pool"
            )

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `embed`, `pool` and, for deep prompts, `blocks/*`."""
        config = model.config
        drop = config.distilled and not self.keep_dist
        prefix = config.num_prefix - drop
        defect = self.as_published and self.keep_dist

        def rows() -> Array:
            return uniform_rows(config, self.tokens, rngs)

        # The first block sets its own places too, so that all blocks are alike and can be scanned.
        shallow = rows() if defect or not self.deep else self.tokens
        surgery.wrap(
            model,
            "embed",
            lambda _, base: PromptEmbed(base, shallow, prefix=prefix, drop=drop, unused=defect),
        )
        if self.deep:
            for number in range(1 if defect else 0, config.depth):
                surgery.wrap(
                    model,
                    f"blocks/{number}",
                    lambda _, base: PromptBlock(base, rows(), prefix=prefix),
                )
        kind = self.pool
        if kind is None and not defect:
            kind = OF_MODEL.get(config.pool)
        if kind is not None:
            places = 0 if defect else self.tokens
            surgery.wrap(
                model,
                "pool",
                lambda _, base: PromptPool(base, kind, prefix=prefix, places=places),
            )
        elif drop:
            model.pool = Pool(dataclasses.replace(config, pool="cls"))
        if self.as_published and not self.keep_dist:
            zero_positions(model)
