"""Prefix tuning: learned keys and values in front of those of the tokens."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import Range, UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import Tokens
from aatjax.petl.base import Method
from aatjax.petl.prompt import draw_rows
from aatjax.petl.published_start import start_as_petl
from aatjax.petl.sites import list_blocks


class PrefixRows(nnx.Module):
    """A projection with learned rows in front of its output: `[b, n, d] -> [b, p + n, d]`."""

    def __init__(self, base: nnx.Module, rows: Array, name: str):
        self.base = base
        self.name = name
        setattr(self, name, nnx.Param(rows))

    def __call__(self, x: Tokens) -> Float[Array, "b m d"]:
        y: jax.Array = self.base(x)  # pyright: ignore[reportCallIssue]
        prefix: Array = getattr(self, self.name)[...]
        rows = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
        return jnp.concatenate([rows.astype(y.dtype), y], axis=1)


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Prefix tuning: learned keys and values (Li & Liang 2021; arXiv 2312.03694).

    Half of the `tokens` are keys and half values of every block's attention; they do not pass
    through the key and value projections, and the queries are those of the tokens alone. (The order
    of keys does not matter.) Also trained: the head and the last LayerNorm before it.
    Not the identity at initialisation: the rows are drawn from U(-v, v),
    v = sqrt(6 / (3 * patch + D)). Adds tokens * D per block.

    Attributes:
        tokens: learned rows per block, an even number.
        as_published: zero positions and a uniform head (`start_as_petl`).
        blocks: which blocks have learned rows, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "prefix"
    rates: ClassVar[tuple[float, float]] = (1e-2, 1e-2)

    tokens: Annotated[int, Range(2)] = 24
    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens % 2:
            raise UsageError(
                f"Prefix tokens={self.tokens} must be even: half are keys, half values"
            )

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wrap `blocks/*/attn/k` and `blocks/*/attn/v`."""

        def add_rows(_: str, base: nnx.Module) -> nnx.Module:
            rows = draw_rows(model.config, self.tokens // 2, rngs)
            return PrefixRows(base, rows, self.label("prefix"))

        for name in ("k", "v"):
            for block in list_blocks(self, model.config.depth):
                surgery.wrap(model, f"blocks/{block}/attn/{name}", add_rows)
        if self.as_published:
            start_as_petl(model, rngs=rngs)
