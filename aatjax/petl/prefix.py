"""Prefix tuning: learned keys and values in front of the tokens' own."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method, zero_positions
from aatjax.petl.prompt import uniform_rows
from aatjax.surgery import Trainable


class PrefixRows(nnx.Module):
    """A projection with learned rows in front of its own: `[b, n, d] -> [b, p + n, d]`."""

    def __init__(self, base: nnx.Module, rows: Array):
        self.base = base
        self.prefix = Trainable(rows)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        y: jax.Array = self.base(x)  # pyright: ignore[reportCallIssue]
        rows = jnp.broadcast_to(self.prefix[...], (x.shape[0], *self.prefix.shape[1:]))
        return jnp.concatenate([rows.astype(y.dtype), y], axis=1)


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Prefix tuning (Li & Liang 2021; arXiv 2312.03694): keys and values that are learned.

    Half of the `tokens` are keys and half values of every block's attention; they do not pass
    through the key and value projections, and the queries are the tokens' own. (Where among the
    keys they stand does not matter.) Trained besides: the head and the last LayerNorm before it.
    Not the identity at init: the rows are drawn from U(-v, v), v = sqrt(6 / (3 * patch + D)).
    Adds tokens * D a block. as_published=True: zero positions.

    Attributes:
        tokens: learned rows a block, an even number.
        as_published: see above.
    """

    name: ClassVar[str] = "prefix"

    tokens: int = 24
    as_published: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.tokens % 2:
            raise UsageError(
                f"Prefix tokens={self.tokens} must be even and at least 2: half are keys, half "
                "values"
            )

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Wraps `blocks/*/attn/k` and `blocks/*/attn/v`."""
        for name in ("k", "v"):
            surgery.wrap(
                model,
                f"blocks/*/attn/{name}",
                lambda _, base: PrefixRows(
                    base, uniform_rows(model.config, self.tokens // 2, rngs)
                ),
            )
        if self.as_published:
            zero_positions(model)
