"""Choosing a branch by the platform that a program is compiled for, not the one it is traced on."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = {"tpu": "TPU", "cuda": "NVIDIA GPU", "cpu": "CPU"}

PLATFORM = {"tpu": "tpu", "gpu": "cuda"}
"""The platform of each Pallas kernel, by the name of the implementation."""

UNASKED = ("tpu",)
"""Kernels that run unasked on their platform, where they take the shape.

TPU: by the static schedules and bytes of the compiled programs, at every shape tried
(kernels/README.md). The GPU kernels were not timed yet.
"""

VARIABLE = "AATJAX_KERNELS"


def unasked() -> tuple[str, ...]:
    """Names of the kernels that run unasked: `UNASKED`, or what the environment says instead.

    `AATJAX_KERNELS=gpu`, `tpu,gpu` or `none`.

    Raises:
        ValueError: the variable names something else.
    """
    said = os.environ.get(VARIABLE)
    if said is None:
        return UNASKED
    names = tuple(name.strip() for name in said.split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in PLATFORM:
            raise ValueError(
                f"{VARIABLE}={said!r}: no kernel is called {name!r}; write "
                f"{', '.join(PLATFORM)}, several with commas, or none"
            )
    return names


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
