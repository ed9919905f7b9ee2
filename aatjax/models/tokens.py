"""Token sequences: their array types, masked calls and masked means."""

from typing import Any

from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "b n d"]
"""Clips `b`, tokens `n`, width `d`."""
Mask = Bool[Array, "b n"]
"""True for tokens that hold sound, False for padding."""


def call_masked(module: Any, x: Tokens, mask: Mask | None) -> Any:
    """Call a module as `module(x, mask)`, or as `module(x)` where there is no mask."""
    return module(x) if mask is None else module(x, mask)


def average_tokens(tokens: Tokens, mask: Mask | None, start: int = 0) -> Float[Array, "b d"]:
    """Mean over the tokens from `start` on that the mask keeps."""
    where = None if mask is None else mask[:, start:, None]
    return tokens[:, start:].mean(axis=1, where=where)
