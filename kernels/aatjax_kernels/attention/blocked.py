"""Attention that keeps no weights: the backward pass makes them again from the logits' sums.

What is kept is the output and, for every query, the logarithm of its softmax's sum, instead of
[b, h, n, m] weights in float32. With weights P, output O and its cotangent dO the gradient of the
logits is P (dO V^T - <dO, O>).

On CPU a few heads go at a time, so that their weights stay in the cache; elsewhere all at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aatjax_kernels import platform

BLOCK = 1_500_000
"""Weights that a step on CPU makes at most, 6 MB: 4 heads a step of 602 tokens.

Measured there, batch 4 and 12 heads, forward and backward: 97, 82 and 81 ms with 1, 2 and 4 heads a
step, 111 ms as plain einsums, 103 ms in PyTorch (medians of 7 rounds in turn, 2 cores).
"""

LOW = -1e30


def whole(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None,
) -> tuple[Array, Array]:
    """Output `[b, n, h, k]`, and the logarithms of the softmax's sums `[b, h, n]`."""
    batch, _, heads, _ = query.shape
    tokens = (query.shape[1], key.shape[1])
    found = _over_heads(_answer, tokens, *map(_split, (query, key, value)), _seen(mask, heads))
    return _join(found[0], batch), found[1].reshape(batch, heads, -1)


def pull(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    out: Array,
    log_sum: Array,
    dout: Array,
) -> tuple[Array, ...]:
    """Cotangents of query, key and value."""
    batch, _, heads, _ = query.shape
    tokens = (query.shape[1], key.shape[1])
    split = (*map(_split, (query, key, value)), _seen(mask, heads))
    sums = log_sum.reshape(batch * heads, -1, 1)
    grads = _over_heads(_answer_back, tokens, *split, _split(out), sums, _split(dout))
    return tuple(_join(grad, batch) for grad in grads)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _logits(query: Array, key: Array, mask: Array | None) -> Array:
    logits = _dot("gnk,gmk->gnm", query * query.shape[-1] ** -0.5, key)
    return logits if mask is None else jnp.where(mask[:, None], logits, LOW)


def _answer(given: tuple[Any, ...]) -> tuple[Array, Array]:
    """Output and logarithm of the softmax's sum, of some heads [g, n, k]."""
    query, key, value, mask = given
    logits = _logits(query, key, mask)
    peak = logits.max(axis=-1, keepdims=True)
    raw = jnp.exp(logits - peak)
    total = raw.sum(axis=-1, keepdims=True)
    out = _dot("gnm,gmk->gnk", raw.astype(value.dtype), value) / total
    return out.astype(value.dtype), peak + jnp.log(total)


def _answer_back(given: tuple[Any, ...]) -> tuple[Array, Array, Array]:
    query, key, value, mask, out, log_sum, dout = given
    weights = jnp.exp(_logits(query, key, mask) - log_sum)
    dvalue = _dot("gnm,gnk->gmk", weights.astype(value.dtype), dout)
    along = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dlogits = weights * (_dot("gnk,gmk->gnm", dout, value) - along)
    dlogits = (dlogits * query.shape[-1] ** -0.5).astype(query.dtype)
    dquery = _dot("gnm,gmk->gnk", dlogits, key).astype(query.dtype)
    dkey = _dot("gnm,gnk->gmk", dlogits, query).astype(key.dtype)
    return dquery, dkey, dvalue.astype(value.dtype)


def _over_heads(function: Callable[..., Any], tokens: tuple[int, int], *given: Any) -> Any:
    """Applies a function of heads [g, ...] to all heads [b h, ...]: on CPU in blocks."""
    heads = given[0].shape[0]
    most = max(1, BLOCK // (tokens[0] * tokens[1]))
    block = max(size for size in range(1, min(heads, most) + 1) if heads % size == 0)
    if block == heads:
        return function(given)

    def mapped(*given: Any) -> Any:
        blocks = jax.tree.map(lambda x: x.reshape(heads // block, block, *x.shape[1:]), given)
        found = jax.lax.map(function, blocks)
        return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), found)

    return platform.branch({"cpu": mapped}, lambda *given: function(given), *given)


def _split(x: Array) -> Array:
    """[b, n, h, k] as [b h, n, k]."""
    batch, tokens, heads, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch * heads, tokens, width)


def _join(x: Array, batch: int) -> Array:
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)


def _seen(mask: Array | None, heads: int) -> Array | None:
    return None if mask is None else jnp.repeat(mask, heads, axis=0)
