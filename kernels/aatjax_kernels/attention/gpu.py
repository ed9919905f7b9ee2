"""Attention for NVIDIA GPUs, Ampere and newer (Pallas, Triton): the weights never leave a core.

A program takes a block of queries of one head and goes through the keys with an online softmax. The
backward pass makes the weights again from the logarithms of the softmax's sums: one pass over the
keys for each block of queries gives the queries' gradient, one over the queries for each block of
keys the keys' and values'. With P the weights, O the output and its cotangent dO, the gradient of
the logits is P (dO V^T - <dO, O>), as in `blocked.py`.

Forward 4N bytes, backward 8N (three passes read again what a neighbour read, from the L2 cache).
Exponentials are powers of two: the logits are scaled by log2(e) in float32 once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot

LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """How a shape is cut: queries and keys a block in the forward and in the backward pass."""

    queries: int
    keys: int
    back: int


def plan_of(tokens: tuple[int, int], heads: int, width: int, size: int) -> Plan | str:
    """The cut of a shape, or what of it the kernel does not take.

    Args:
        tokens: queries and keys.
        heads: heads.
        width: features of a head.
        size: bytes of a number.
    """
    if triton.missing():
        return str(triton.missing())
    if width < 16 or width & (width - 1) or width > 128:
        return f"heads of width {width}: it must be 16, 32, 64 or 128"
    # What a program holds must fit 255 registers a thread: no spills on an H100 so.
    small = width * size <= 128
    return Plan(128 if small else 64, 64 if small else 32, 64 if small else 32)


def _load(ref: Any, rows: Any, inside: Array | None) -> Array:
    """Rows `[r, k]`; zeros for those outside."""
    if inside is None:
        return triton.load(ref.at[rows, :])
    return triton.load(ref.at[rows, :], mask=inside[:, None], other=0.0)


def _row(ref: Any, rows: Any, inside: Array | None, other: float = 0.0) -> Array:
    """Numbers of rows `[r]`."""
    if inside is None:
        return triton.load(ref.at[rows])
    return triton.load(ref.at[rows], mask=inside, other=other)


def _block(index: Any, size: int, count: int) -> tuple[Any, Array]:
    """The rows of a block, and which of them there are."""
    start = index * size
    return pl.ds(start, size), start + jnp.arange(size) < count


def _next(index: Any, size: int, count: int, *, whole: bool) -> tuple[Any, Array | None]:
    """`_block` in a loop: None for which there are where the block is known to be whole."""
    rows, inside = _block(index, size, count)
    return rows, None if whole else inside


def _over(count: int, size: int, step: Callable[..., Any], first: Any) -> Any:
    """Goes through `count` rows in blocks; only the last one asks where they end."""
    whole = count // size
    found = lax.fori_loop(0, whole, functools.partial(step, whole=True), first)
    return lax.fori_loop(whole, pl.cdiv(count, size), functools.partial(step, whole=False), found)


def _seen(valid: Any, rows: Any, inside: Array | None) -> Array | None:
    """Which keys of a block are seen, or None for all."""
    if valid is None:
        return inside
    return _row(valid, rows, inside) > 0


def _scale(width: int) -> float:
    return width**-0.5 * LOG2_E


def _forward_kernel(plan: Plan, masked: bool, *refs: Any) -> None:
    query_ref, key_ref, value_ref = refs[:3]
    valid = refs[3] if masked else None
    out_ref, sum_ref = refs[3 + masked :]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    rows, inside = _block(pl.program_id(2), plan.queries, queries)
    query = _load(query_ref, rows, inside)

    def step(index: Any, carry: Any, *, whole: bool) -> Any:
        peak, total, out = carry
        columns, there = _next(index, plan.keys, keys, whole=whole)
        scores = dot(query, _load(key_ref, columns, there), LANES) * _scale(width)
        seen = _seen(valid, columns, there)
        if seen is not None:
            scores = jnp.where(seen[None], scores, LOW)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        raw, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(peak - higher)
        value = _load(value_ref, columns, there)
        out = out * shrink[:, None] + dot(raw.astype(value.dtype), value)
        return higher, total * shrink + jnp.sum(raw, axis=1), out

    first = (
        jnp.full((plan.queries,), LOW, F32),
        jnp.zeros((plan.queries,), F32),
        jnp.zeros((plan.queries, width), F32),
    )
    peak, total, out = _over(keys, plan.keys, step, first)
    found = (out / total[:, None]).astype(out_ref.dtype)
    triton.store(out_ref.at[rows, :], found, mask=inside[:, None])
    triton.store(sum_ref.at[rows], (peak + jnp.log2(total)) / LOG2_E, mask=inside)


def _query_kernel(plan: Plan, masked: bool, *refs: Any) -> None:
    """The gradient of a block of queries."""
    query_ref, key_ref, value_ref, dout_ref, sum_ref, along_ref = refs[:6]
    valid = refs[6] if masked else None
    dquery_ref = refs[-1]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    rows, inside = _block(pl.program_id(2), plan.back, queries)
    query, dout = _load(query_ref, rows, inside), _load(dout_ref, rows, inside)
    log_sum = _row(sum_ref, rows, inside) * LOG2_E
    along = _row(along_ref, rows, inside)

    def step(index: Any, dquery: Array, *, whole: bool) -> Array:
        columns, there = _next(index, plan.back, keys, whole=whole)
        key, value = _load(key_ref, columns, there), _load(value_ref, columns, there)
        scores = dot(query, key, LANES) * _scale(width)
        weights = jnp.exp2(scores - log_sum[:, None])
        seen = _seen(valid, columns, there)
        if seen is not None:
            weights = jnp.where(seen[None], weights, 0.0)
        dscores = weights * (dot(dout, value, LANES) - along[:, None])
        return dquery + dot(dscores.astype(key.dtype), key)

    dquery = _over(keys, plan.back, step, jnp.zeros((plan.back, width), F32))
    dquery = (dquery * width**-0.5).astype(dquery_ref.dtype)
    triton.store(dquery_ref.at[rows, :], dquery, mask=inside[:, None])


def _key_kernel(plan: Plan, masked: bool, *refs: Any) -> None:
    """The gradients of a block of keys and their values."""
    query_ref, key_ref, value_ref, dout_ref, sum_ref, along_ref = refs[:6]
    valid = refs[6] if masked else None
    dkey_ref, dvalue_ref = refs[-2:]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    columns, there = _block(pl.program_id(2), plan.back, keys)
    key, value = _load(key_ref, columns, there), _load(value_ref, columns, there)
    seen = there if valid is None else _row(valid, columns, there) > 0

    def step(index: Any, carry: Any, *, whole: bool) -> Any:
        dkey, dvalue = carry
        rows, inside = _next(index, plan.back, queries, whole=whole)
        query, dout = _load(query_ref, rows, inside), _load(dout_ref, rows, inside)
        # A query that is not there has no sum: with it as large as can be, its weights are zero.
        log_sum = _row(sum_ref, rows, inside, -LOW) * LOG2_E
        scores = dot(query, key, LANES) * _scale(width)
        weights = jnp.where(seen[None], jnp.exp2(scores - log_sum[:, None]), 0.0)
        dvalue += dot(weights.astype(dout.dtype), dout, COLUMNS)
        along = _row(along_ref, rows, inside)
        dscores = weights * (dot(dout, value, LANES) - along[:, None])
        return dkey + dot(dscores.astype(query.dtype), query, COLUMNS), dvalue

    blank = jnp.zeros((plan.back, width), F32)
    dkey, dvalue = _over(queries, plan.back, step, (blank, blank))
    dkey = (dkey * width**-0.5).astype(dkey_ref.dtype)
    triton.store(dkey_ref.at[columns, :], dkey, mask=there[:, None])
    triton.store(dvalue_ref.at[columns, :], dvalue.astype(dvalue_ref.dtype), mask=there[:, None])


# The calls.


def _head(x: Any) -> tuple[Any, pl.BlockSpec]:
    """One head's part of an array [b, n, h, k]."""
    _, tokens, _, width = x.shape
    return x, pl.BlockSpec((None, tokens, None, width), lambda b, h, i: (b, 0, h, 0))


def _rows(x: Any) -> tuple[Any, pl.BlockSpec]:
    """One head's part of numbers [b, h, n]."""
    return x, pl.BlockSpec((None, None, x.shape[2]), lambda b, h, i: (b, h, 0))


def _mask(mask: Array | None) -> list[tuple[Any, pl.BlockSpec]]:
    if mask is None:
        return []
    return [(mask.astype(F32), pl.BlockSpec((None, mask.shape[1]), lambda b, h, i: (b, 0)))]


def _call(
    kernel: Any, plan: Plan, blocks: int, masked: bool, given: Any, results: Any, interpret: Any
) -> Any:
    """Runs a kernel on (array, spec) pairs, a program for each block of each head."""
    batch, _, heads, _ = given[0][0].shape
    return pl.pallas_call(
        functools.partial(kernel, plan, masked),
        grid=(batch, heads, blocks),
        in_specs=[spec for _, spec in given],
        out_specs=[spec for _, spec in results],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*(array for array, _ in given))


def forward(
    plan: Plan, query: Array, key: Array, value: Array, mask: Array | None, *, interpret: Any
) -> tuple[Array, Array]:
    """Output `[b, n, h, k]`, and the logarithms of the softmax's sums `[b, h, n]`."""
    batch, queries, heads, _ = query.shape
    sums: Any = jax.ShapeDtypeStruct((batch, heads, queries), F32)
    out: Any = jax.ShapeDtypeStruct(query.shape, value.dtype)
    return _call(
        _forward_kernel,
        plan,
        pl.cdiv(queries, plan.queries),
        mask is not None,
        [_head(query), _head(key), _head(value), *_mask(mask)],
        [_head(out), _rows(sums)],
        interpret,
    )


def backward(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    out: Array,
    log_sum: Array,
    dout: Array,
    *,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Cotangents of query, key and value."""
    along = jnp.einsum("bnhk,bnhk->bhn", out, dout, preferred_element_type=F32)
    given = [*map(_head, (query, key, value, dout)), _rows(log_sum), _rows(along), *_mask(mask)]
    masked = mask is not None
    (dquery,) = _call(
        _query_kernel,
        plan,
        pl.cdiv(query.shape[1], plan.back),
        masked,
        given,
        [_head(query)],
        interpret,
    )
    dkey, dvalue = _call(
        _key_kernel,
        plan,
        pl.cdiv(key.shape[1], plan.back),
        masked,
        given,
        [_head(key), _head(value)],
        interpret,
    )
    return dquery, dkey, dvalue
