"""Token sequences: their array types, masked calls, calls for some tokens, masked means."""

from typing import Any

from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "b n d"]
"""Clips `b`, tokens `n`, width `d`."""
FirstTokens = Float[Array, "b m d"]
"""The first `m` of the tokens `n`, which are all unless fewer are asked for."""
Mask = Bool[Array, "b n"]
"""True for tokens that hold sound, False for padding."""


def call_masked(module: Any, x: Tokens, mask: Mask | None) -> Any:
    """Call a module as `module(x, mask)`, or as `module(x)` where there is no mask."""
    return module(x) if mask is None else module(x, mask)


def is_per_token(module: Any) -> bool:
    """Return whether a token of the output depends on no other token of the input.

    A module says so by its attribute `per_token`, see `_states`.
    """
    return _states(module, "per_token")


def _states(module: Any, name: str) -> bool:
    """Return an attribute about a module's call; void in a subclass with another call."""
    kinds = type(module).__mro__
    about = [index for index, kind in enumerate(kinds) if name in vars(kind)]
    calls = [index for index, kind in enumerate(kinds) if "__call__" in vars(kind)]
    return bool(about) and about[0] <= calls[0] and bool(getattr(module, name))


def call_first(module: Any, x: Tokens, mask: Mask | None, count: int | None) -> Any:
    """Return a module's output for the first `count` tokens only; None is all.

    Less is computed where the module is per token, or has the attribute `takes_count`: its call
    then takes `count` after the mask.
    """
    if count is None:
        return call_masked(module, x, mask)
    if is_per_token(module):
        return call_masked(module, x[:, :count], cut_mask(mask, count))
    if _states(module, "takes_count"):
        return module(x, mask, count)
    return call_masked(module, x, mask)[:, :count]


def cut_mask(mask: Mask | None, count: int | None) -> Bool[Array, "b m"] | None:
    """Return the mask of the first `count` tokens; None is all."""
    return None if mask is None else mask[:, :count]


def average_tokens(tokens: Tokens, mask: Mask | None, start: int = 0) -> Float[Array, "b d"]:
    """Mean over the tokens from `start` on that the mask keeps."""
    where = None if mask is None else mask[:, start:, None]
    return tokens[:, start:].mean(axis=1, where=where)
