"""Attention with one custom derivative, whatever computes it; under a mesh on each device alone."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from aatjax_kernels import mesh, platform
from aatjax_kernels.attention import blocked, gpu, tpu

KERNELS: dict[str, ModuleType] = {"tpu": tpu, "gpu": gpu}


class Static(NamedTuple):
    """What is known before anything is traced.

    Attributes:
        kernels: the kernels that may run, each with its cut of the shape; `blocked` else.
        named: it was asked for, so that nothing else will do.
        interpret: run it in Pallas's interpreter.
    """

    kernels: tuple[tuple[str, Any], ...] = ()
    named: bool = False
    interpret: bool = False


def static(implementation: str | None, query: Array, key: Array, *, interpret: bool) -> Static:
    """Decides by the shape which kernel can run.

    Raises:
        ValueError: one was asked for by name and cannot.
    """
    heads = query.shape[2] // mesh.head_shards(query.shape[2])
    tokens = (query.shape[1], key.shape[1])
    named = implementation in KERNELS
    names = (implementation,) if named else platform.unasked() if implementation is None else ()
    plans = []
    for name in names:
        plan = KERNELS[name].plan_of(tokens, heads, query.shape[3], query.dtype.itemsize)
        if not isinstance(plan, str):
            plans.append((name, plan))
        elif named:
            raise ValueError(f"attention: implementation {name!r} does not take {plan}")
    return Static(tuple(plans), named, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(how: Static, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """softmax(Q K^T / sqrt(k)) V; see the package's `attention`. No forward mode."""
    return _forward(how, query, key, value, mask)[0]


def _choose(how: Static, direction: str, plain: Any, *given: Any) -> Any:
    """The kernel where the program is compiled for its platform, or as was asked for."""
    branches = {
        platform.PLATFORM[name]: functools.partial(
            getattr(KERNELS[name], direction), plan, interpret=how.interpret
        )
        for name, plan in how.kernels
    }
    if not how.named:
        return platform.branch(branches, plain, *given)
    ((name, _),) = how.kernels
    where = platform.PLATFORM[name]
    if how.interpret:
        return branches[where](*given)
    only = f"attention: implementation {name!r} runs on {platform.PLATFORMS[where]} only; use None"
    return platform.branch(branches, only, *given)


def _forward(
    how: Static, query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Any]:
    given = (query, key, value, mask)
    axes = (2, 2, 2, None if mask is None else -1)
    out, log_sum = mesh.over_heads(
        lambda given: _choose(how, "forward", blocked.whole, *given),
        given,
        axes,
        (2, 1),
        otherwise=lambda given: blocked.whole(*given),
    )
    return out, (*given, out, log_sum)


def _backward(how: Static, kept: Any, dout: Array) -> tuple[Array | None, ...]:
    axes = (2, 2, 2, None if kept[3] is None else -1, 2, 1, 2)
    grads = mesh.over_heads(
        lambda given: _choose(how, "backward", blocked.pull, *given),
        (*kept, dout),
        axes,
        (2, 2, 2),
        otherwise=lambda given: blocked.pull(*given),
    )
    return *grads, None


attention.defvjp(_forward, _backward)
