"""Attention as one differentiable op over its implementations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from aatjax_kernels import dispatch, mesh
from aatjax_kernels.attention import blocked, gpu, tpu
from aatjax_kernels.dispatch import Backend, KernelChoice, KernelOptions

BACKENDS: dict[str, Backend] = {"blocked": blocked, "tpu": tpu, "gpu": gpu}


def choose_attention(
    implementation: str | None, query: Array, key: Array, mask: Array | None, interpret: Any
) -> KernelChoice:
    """Choose the implementations for some shapes; see `dispatch.choose`."""
    options = KernelOptions(interpret)
    heads = query.shape[2] // mesh.count_head_shards(query.shape[2])
    local = [
        jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[3]), x.dtype) for x in (query, key, key)
    ]
    return dispatch.choose_kernels(
        "attention",
        implementation,
        "blocked",
        lambda name: dispatch.find_tiling(BACKENDS[name], options, *local, mask),
        options,
        mesh.explain_uneven(query.shape[0], query.shape[2]),
    )


def forward(choice: KernelChoice, *arrays: Any, keep: bool) -> tuple[Array, Any]:
    """Return the output, and what `backward` needs: it and the logarithms of the softmax's sums."""

    def make(name: str) -> Any:
        return functools.partial(dispatch.call, BACKENDS[name].forward, choice.options, keep=keep)

    out, log_sum = mesh.over_heads(
        lambda arrays: dispatch.run_chosen(choice, make, *arrays),
        arrays,
        _head_axes(arrays),
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
        (2, (2, 1), *_head_axes(arrays)),
        (2, 2, 2),
    )


def _head_axes(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the axes of the heads of query, key, value and mask."""
    return 2, 2, 2, None if arrays[3] is None else -1


attention: Callable[..., Array] = dispatch.make_op(forward, backward)
"""softmax(Q K^T / sqrt(k)) V of `(choice, query, key, value, mask)`."""
