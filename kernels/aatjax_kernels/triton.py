"""Pallas's Triton backend, imported when it is used; deprecated from jax 0.11 on, later gone."""

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("CompilerParams", "load", "store"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return getattr(triton, name, None)


def explain_missing() -> str | None:
    """Return why no kernel can run, or None."""
    if sys.modules[__name__].load is None:
        return "any shape with this jax, which has no Triton backend in Pallas"
    return None
