"""Attention as one differentiable op over its implementations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from aatjax_kernels import dispatch, mesh
from aatjax_kernels.attention import blocked, gpu, tpu
from aatjax_kernels.dispatch import Backend, KernelChoice, KernelOptions

BACKENDS: dict[str, Backend] = {"blocked": blocked, "tpu": tpu, "gpu": gpu}


def choose_attention(
    implementation: str | None,
    local: Sequence[jax.ShapeDtypeStruct | None],
    unasked: Sequence[str],
    uneven: str | None,
    interpret: Any,
) -> KernelChoice:
    """Choose the implementations for some shapes on one device; see `dispatch.choose_kernels`."""
    options = KernelOptions(interpret)
    return dispatch.choose_kernels(
        "attention",
        implementation,
        "blocked",
        lambda name: dispatch.find_tiling(BACKENDS[name], options, *local),
        options,
        uneven,
        [name for name in unasked if name in BACKENDS and name != "blocked"],
    )


def forward(choice: KernelChoice, *arrays: Any, keep: bool) -> tuple[Array, Any]:
    """Return the output, and what `backward` needs: it and the logarithms of the softmax's sums."""

    def make(name: str) -> Any:
        return functools.partial(dispatch.call, BACKENDS[name].forward, choice.options, keep=keep)

    out, log_sum = mesh.over_heads(
        lambda arrays: dispatch.run_chosen(choice, make, *arrays),
        arrays,
        head_axes(arrays),
        (2, 1),
    )
    return out, (out, log_sum)


def backward(choice: KernelChoice, dout: Array, kept: Any, *arrays: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value."""

    def make(name: str) -> Any:
        return functools.partial(dispatch.call, BACKENDS[name].backward, choice.options)

    return mesh.over_heads(
        lambda given: dispatch.run_chosen(choice, make, *given),
        (dout, kept, *arrays),
        (2, (2, 1), *head_axes(arrays)),
        (2, 2, 2),
    )


def head_axes(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the axes of the heads of query, key, value and mask."""
    return 2, 2, 2, None if arrays[3] is None else -1


attention: Callable[..., Array] = dispatch.make_op(forward, backward)
"""softmax(Q K^T / sqrt(k)) V of `(choice, query, key, value, mask)`."""
