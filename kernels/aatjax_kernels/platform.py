"""Choosing a branch by the platform that a program is compiled for, not the one it is traced on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = {"tpu": "TPU", "cuda": "NVIDIA GPU", "cpu": "CPU"}


def branch(
    branches: Mapping[str, Callable[..., Any]], default: Callable[..., Any] | str, *args: Any
) -> Any:
    """Calls the branch of the platform, by its name in JAX, or the default.

    Args:
        branches: what runs on which platform; all must return the same shapes.
        default: what runs on any other platform; a string is the message of the ValueError that
            compiling for it raises.
        args: arguments.
    """
    if not branches:
        assert callable(default)
        return default(*args)
    if callable(default):
        return jax.lax.platform_dependent(*args, default=default, **branches)
    message = default
    shapes = jax.eval_shape(next(iter(branches.values())), *args)

    def refuse(*_: Any) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        avals = tuple(ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)
        return tree.unflatten(_refuse.bind(avals=avals, message=message))

    return jax.lax.platform_dependent(*args, default=refuse, **branches)


_refuse = Primitive("refuse")
_refuse.multiple_results = True


@_refuse.def_abstract_eval
def _(*, avals: Any, message: str) -> Any:
    return avals


@_refuse.def_impl
def _(*, avals: Any, message: str) -> Any:
    raise ValueError(message)


def _lower(ctx: Any, *, avals: Any, message: str) -> Any:
    raise ValueError(message)


def _batch(args: Any, dims: Any, *, avals: Any, message: str) -> Any:
    raise ValueError(message)


mlir.register_lowering(_refuse, _lower)
batching.primitive_batchers[_refuse] = _batch
