"""Attention with one custom derivative, whatever computes it; under a mesh on each device alone."""

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from aatjax_kernels import mesh, platform
from aatjax_kernels.attention import blocked, tpu


class Static(NamedTuple):
    """What is known before anything is traced.

    Attributes:
        implementation: as asked for.
        plan: the TPU kernel's cut of the shape, or None where it is not to run.
        interpret: run it in Pallas's interpreter.
    """

    implementation: str | None
    plan: tpu.Plan | None
    interpret: bool


def static(implementation: str | None, query: Array, key: Array, *, interpret: bool) -> Static:
    """Decides by the shape whether the kernel can run.

    Raises:
        ValueError: it was asked for by name and cannot.
    """
    heads = query.shape[2] // mesh.head_shards(query.shape[2])
    tokens = (query.shape[1], key.shape[1])
    plan = tpu.plan_of(tokens, heads, query.shape[3], query.dtype.itemsize)
    if isinstance(plan, str):
        if implementation == "tpu":
            raise ValueError(f"attention: implementation 'tpu' does not take {plan}")
        return Static(implementation, None, interpret)
    return Static(implementation, None if implementation == "blocked" else plan, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(how: Static, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """softmax(Q K^T / sqrt(k)) V; see the package's `attention`. No forward mode."""
    return _forward(how, query, key, value, mask)[0]


def _choose(how: Static, kernel: Any, plain: Any, *given: Any) -> Any:
    """The kernel where the program is compiled for a TPU, or as was asked for."""
    if how.plan is None:
        return plain(*given)
    kernel = functools.partial(kernel, how.plan, interpret=how.interpret)
    if how.interpret:
        return kernel(*given)
    default = plain
    if how.implementation == "tpu":
        default = "attention: implementation 'tpu' runs on TPU only; use None"
    return platform.branch({"tpu": kernel}, default, *given)


def _forward(
    how: Static, query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Any]:
    given = (query, key, value, mask)
    axes = (2, 2, 2, None if mask is None else -1)
    out, log_sum = mesh.over_heads(
        lambda given: _choose(how, tpu.forward, blocked.whole, *given), given, axes, (2, 1),
        otherwise=lambda given: blocked.whole(*given),
    )  # fmt: skip
    return out, (*given, out, log_sum)


def _backward(how: Static, kept: Any, dout: Array) -> tuple[Array | None, ...]:
    axes = (2, 2, 2, None if kept[3] is None else -1, 2, 1, 2)
    grads = mesh.over_heads(
        lambda given: _choose(how, tpu.backward, blocked.pull, *given),
        (*kept, dout),
        axes,
        (2, 2, 2),
        otherwise=lambda given: blocked.pull(*given),
    )
    return *grads, None


attention.defvjp(_forward, _backward)
