"""Attention that keeps no weights: the backward pass recomputes them.

The output and, for every query, the logarithm of its softmax's sum are kept instead of [b, h, n, m]
weights in float32. With weights P, output O and its cotangent dO the gradient of the logits is
P (dO V^T - <dO, O>).

On CPU a few heads are computed at a time, so that their weights stay in the cache; elsewhere all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from aatjax_kernels import platform
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import LOW

BLOCK = 1_500_000
"""Weights per step on CPU at most, 6 MB: 4 heads of 602 tokens.

Measured there, batch 4 and 12 heads, forward and backward: 97, 82 and 81 ms with 1, 2 and 4 heads
per step, 111 ms as plain einsums, 103 ms in PyTorch (medians of 7 interleaved rounds, 2 cores).
"""


def tile(options: KernelOptions, *arrays: Any) -> None:
    """Any shape is taken; see `Backend`."""


def forward(options: KernelOptions, *arrays: Any, keep: bool) -> tuple[Array, Array]:
    """Return the output `[b, n, h, k]` and the logarithms of the softmax's sums `[b, h, n]`."""
    query, key, value, mask = arrays
    batch, queries, heads, _ = query.shape
    split = (*map(_split, (query, key, value)), _repeat(mask, heads))
    out, log_sum = _over_heads(_attend, queries * key.shape[1], *split)
    return _join(out, batch), log_sum.reshape(batch, heads, -1)


def backward(options: KernelOptions, dout: Array, kept: Any, *arrays: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value."""
    (query, key, value, mask), (out, log_sum) = arrays, kept
    batch, queries, heads, _ = query.shape
    split = (*map(_split, (query, key, value)), _repeat(mask, heads))
    sums = log_sum.reshape(batch * heads, -1, 1)
    more = (_split(out), sums, _split(dout))
    grads = _over_heads(_attend_back, queries * key.shape[1], *split, *more)
    return tuple(_join(grad, batch) for grad in grads)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _logits(query: Array, key: Array, mask: Array | None) -> Array:
    logits = _dot("gnk,gmk->gnm", query * query.shape[-1] ** -0.5, key)
    return logits if mask is None else jnp.where(mask[:, None], logits, LOW)


def _attend(arrays: tuple[Any, ...]) -> tuple[Array, Array]:
    """Return output and logarithms of the softmax's sums of heads [g, n, k]."""
    query, key, value, mask = arrays
    logits = _logits(query, key, mask)
    peak = logits.max(axis=-1, keepdims=True)
    raw = jnp.exp(logits - peak)
    total = raw.sum(axis=-1, keepdims=True)
    out = _dot("gnm,gmk->gnk", raw.astype(value.dtype), value) / total
    return out.astype(value.dtype), peak + jnp.log(total)


def _attend_back(arrays: tuple[Any, ...]) -> tuple[Array, Array, Array]:
    query, key, value, mask, out, log_sum, dout = arrays
    weights = jnp.exp(_logits(query, key, mask) - log_sum)
    dvalue = _over_queries(weights.astype(value.dtype), dout)
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    inner = jax.lax.optimization_barrier(inner)  # XLA:CPU would sum again for every tile of dP
    dlogits = weights * (_dot("gnk,gmk->gnm", dout, value) - inner)
    dlogits = (dlogits * query.shape[-1] ** -0.5).astype(query.dtype)
    dquery = _dot("gnm,gmk->gnk", dlogits, key).astype(query.dtype)
    dkey = _over_queries(dlogits, query).astype(key.dtype)
    return dquery, dkey, dvalue.astype(value.dtype)


def _over_queries(weights: Array, values: Array) -> Array:
    """Return W^T V as the transpose of V^T W: on CPU it is slow to transpose the larger one."""
    product = jax.lax.optimization_barrier(_dot("gnk,gnm->gkm", values, weights))
    return jnp.swapaxes(product, 1, 2)


def _over_heads(function: Callable[..., Any], weights: int, *arrays: Any) -> Any:
    """Apply a function of heads [g, ...] to all heads [b h, ...]: on CPU in blocks."""
    heads = arrays[0].shape[0]
    if not (isinstance(heads, int) and isinstance(weights, int)):
        return function(arrays)  # a symbolic batch of `jax.export`
    most = max(1, BLOCK // weights)
    block = max(size for size in range(1, min(heads, most) + 1) if heads % size == 0)
    if block == heads:
        return function(arrays)

    def mapped(*arrays: Any) -> Any:
        blocks = jax.tree.map(lambda x: x.reshape(heads // block, block, *x.shape[1:]), arrays)
        results = jax.lax.map(function, blocks)
        return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), results)

    return platform.branch({"cpu": mapped}, lambda *arrays: function(arrays), *arrays)


def _split(x: Array) -> Array:
    """Reshape [b, n, h, k] to [b h, n, k]."""
    batch, tokens, heads, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch * heads, tokens, width)


def _join(x: Array, batch: int) -> Array:
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)


def _repeat(mask: Array | None, heads: int) -> Array | None:
    return None if mask is None else jnp.repeat(mask, heads, axis=0)
