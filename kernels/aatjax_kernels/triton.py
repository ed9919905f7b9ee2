"""Pallas's Triton backend, which is deprecated from jax 0.11 on: a later jax may lack it."""

from typing import Any

try:
    from jax.experimental.pallas import triton as _triton
except ImportError:
    _triton = None

CompilerParams: Any = getattr(_triton, "CompilerParams", None)
load: Any = getattr(_triton, "load", None)
store: Any = getattr(_triton, "store", None)


def explain_missing() -> str | None:
    """Return why no kernel can run, or None."""
    if load is None:
        return "any shape with this jax, which has no Triton backend in Pallas"
    return None
