"""Branches by the platform that a program is compiled for, not the one it is traced on."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORM_LABELS = {"tpu": "TPU", "cuda": "NVIDIA GPU", "cpu": "CPU"}

KERNEL_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
"""Name of a kernel to its platform in JAX."""

DEFAULT_KERNELS = ("tpu",)
"""Kernels that `implementation=None` chooses on their platform, for the shapes that they take.

TPU: by the static schedules and bytes of the compiled programs, at every shape tried
(kernels/README.md). The GPU kernels have not been timed.
"""

VARIABLE = "AATJAX_KERNELS"


def default_kernels() -> tuple[str, ...]:
    """Return `DEFAULT_KERNELS`, or those of the environment: `AATJAX_KERNELS=tpu,gpu` or `none`.

    Raises:
        ValueError: the variable names an unknown kernel.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        return DEFAULT_KERNELS
    names = tuple(name.strip() for name in value.split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in KERNEL_PLATFORMS:
            raise ValueError(
                f"{VARIABLE}={value!r}: unknown kernel {name!r}; use "
                f"{', '.join(KERNEL_PLATFORMS)}, a list with commas, or none"
            )
    return names


def branch(
    branches: Mapping[str, Callable[..., Any]], default: Callable[..., Any] | str, *args: Any
) -> Any:
    """Call the branch of the platform, or the default.

    Args:
        branches: functions by the platform's name in JAX; all return the same shapes.
        default: the function for all other platforms, or a message: compiling for one of them
            raises a ValueError with it.
        args: arguments.
    """
    if not branches:
        assert callable(default)
        return default(*args)
    if callable(default):
        return jax.lax.platform_dependent(*args, default=default, **branches)
    leaves, tree = jax.tree.flatten(jax.eval_shape(next(iter(branches.values())), *args))
    avals = tuple(ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)

    def refuse(*_: Any) -> Any:
        return tree.unflatten(_refuse.bind(avals=avals, message=default))

    return jax.lax.platform_dependent(*args, default=refuse, **branches)


def _raise(*_: Any, avals: Any, message: str) -> Any:
    raise ValueError(message)


_refuse = Primitive("refuse")
_refuse.multiple_results = True
_refuse.def_impl(_raise)
_refuse.def_abstract_eval(lambda *, avals, message: avals)
mlir.register_lowering(_refuse, _raise)
batching.primitive_batchers[_refuse] = _raise
