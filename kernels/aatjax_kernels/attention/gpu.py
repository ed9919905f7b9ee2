"""Attention for NVIDIA GPUs, Ampere and newer (Pallas, Triton): the weights stay on chip.

A program computes a block of queries of one head, with an online softmax over blocks of keys. The
backward pass recomputes the weights from the logarithms of the softmax's sums: one pass over the
keys for each block of queries gives the gradient of the queries, one over the queries for each
block of keys those of keys and values. The equations are those of `blocked.py`.

Forward 4N bytes, backward 8N (the three passes share tokens through the L2 cache). Exponentials are
powers of two: the logits are scaled by log2(e) in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl

LOG2_E = math.log2(math.e)


class GpuAttentionTiling(NamedTuple):
    """Queries and keys per block in the forward pass, and both in the backward pass."""

    queries: int
    keys: int
    back: int


def tile(options: KernelOptions, query: Any, *rest: Any) -> GpuAttentionTiling | str:
    """Return the tiling of a shape; see `Backend`."""
    width = query.shape[3]
    missing = triton.explain_missing()
    if missing:
        return missing
    if width < 16 or width & (width - 1) or width > 128:
        return f"heads of width {width}: it must be 16, 32, 64 or 128"
    # A program has 255 registers a thread: these do not spill on an H100.
    small = width * query.dtype.itemsize <= 128
    return GpuAttentionTiling(*(128, 64, 64) if small else (64, 32, 32))


def _load(ref: Any, rows: Any, mask: Array | None, other: float = 0.0) -> Array:
    """Load rows `[r, k]`, or numbers of rows `[r]`; `other` where the mask is False."""
    if ref.ndim == 2:
        mask, ref = None if mask is None else mask[:, None], ref.at[rows, :]
    else:
        ref = ref.at[rows]
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=other)


def _block(index: Any, size: int, count: int) -> tuple[Any, Array]:
    """Return the rows of a block, and the mask of those below `count`."""
    start = index * size
    return pl.ds(start, size), start + jnp.arange(size) < count


def _over(count: int, size: int, step: Callable[..., Any], first: Any) -> Any:
    """Fold `step(rows, mask, carry)` over `count` rows in blocks; whole blocks have no mask."""
    whole = count // size

    def unmasked(index: Any, carry: Any) -> Any:
        return step(_block(index, size, count)[0], None, carry)

    def masked(index: Any, carry: Any) -> Any:
        return step(*_block(index, size, count), carry)

    carry = lax.fori_loop(0, whole, unmasked, first)
    return lax.fori_loop(whole, pl.cdiv(count, size), masked, carry)


def _key_mask(mask_ref: Any, rows: Any, mask: Array | None) -> Array | None:
    """Return the mask of a block of keys, or None for all."""
    return mask if mask_ref is None else _load(mask_ref, rows, mask) > 0


def _scores(query: Array, key: Array) -> Array:
    return dot(query, key, LANES) * (query.shape[1] ** -0.5 * LOG2_E)


def _forward_kernel(tiling: GpuAttentionTiling, masked: bool, *refs: Any) -> None:
    query_ref, key_ref, value_ref = refs[:3]
    mask_ref = refs[3] if masked else None
    out_ref, sum_ref = refs[3 + masked :]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    rows, inside = _block(pl.program_id(2), tiling.queries, queries)
    query = _load(query_ref, rows, inside)

    def step(columns: Any, there: Array | None, carry: Any) -> Any:
        peak, total, out = carry
        scores = _scores(query, _load(key_ref, columns, there))
        mask = _key_mask(mask_ref, columns, there)
        if mask is not None:
            scores = jnp.where(mask[None], scores, LOW)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        raw, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(peak - higher)
        value = _load(value_ref, columns, there)
        out = out * shrink[:, None] + dot(raw.astype(value.dtype), value)
        return higher, total * shrink + jnp.sum(raw, axis=1), out

    first = (
        jnp.full((tiling.queries,), LOW, F32),
        jnp.zeros((tiling.queries,), F32),
        jnp.zeros((tiling.queries, width), F32),
    )
    peak, total, out = _over(keys, tiling.keys, step, first)
    out = (out / total[:, None]).astype(out_ref.dtype)
    triton.store(out_ref.at[rows, :], out, mask=inside[:, None])
    triton.store(sum_ref.at[rows], (peak + jnp.log2(total)) / LOG2_E, mask=inside)


def _query_kernel(tiling: GpuAttentionTiling, masked: bool, *refs: Any) -> None:
    """Compute the gradient of a block of queries."""
    query_ref, key_ref, value_ref, dout_ref, sum_ref, inner_ref = refs[:6]
    mask_ref = refs[6] if masked else None
    dquery_ref = refs[-1]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    rows, inside = _block(pl.program_id(2), tiling.back, queries)
    query, dout = _load(query_ref, rows, inside), _load(dout_ref, rows, inside)
    log_sum = _load(sum_ref, rows, inside) * LOG2_E
    inner = _load(inner_ref, rows, inside)

    def step(columns: Any, there: Array | None, dquery: Array) -> Array:
        key, value = _load(key_ref, columns, there), _load(value_ref, columns, there)
        weights = jnp.exp2(_scores(query, key) - log_sum[:, None])
        mask = _key_mask(mask_ref, columns, there)
        if mask is not None:
            weights = jnp.where(mask[None], weights, 0.0)
        dscores = weights * (dot(dout, value, LANES) - inner[:, None])
        return dquery + dot(dscores.astype(key.dtype), key)

    dquery = _over(keys, tiling.back, step, jnp.zeros((tiling.back, width), F32))
    dquery = (dquery * width**-0.5).astype(dquery_ref.dtype)
    triton.store(dquery_ref.at[rows, :], dquery, mask=inside[:, None])


def _key_kernel(tiling: GpuAttentionTiling, masked: bool, *refs: Any) -> None:
    """Compute the gradients of a block of keys and their values."""
    query_ref, key_ref, value_ref, dout_ref, sum_ref, inner_ref = refs[:6]
    mask_ref = refs[6] if masked else None
    dkey_ref, dvalue_ref = refs[-2:]
    (queries, width), keys = query_ref.shape, key_ref.shape[0]
    columns, there = _block(pl.program_id(2), tiling.back, keys)
    key, value = _load(key_ref, columns, there), _load(value_ref, columns, there)
    mask: Any = _key_mask(mask_ref, columns, there)

    def step(rows: Any, inside: Array | None, carry: Any) -> Any:
        dkey, dvalue = carry
        query, dout = _load(query_ref, rows, inside), _load(dout_ref, rows, inside)
        # Queries past the end get the largest sum, so that their weights are zero.
        log_sum = _load(sum_ref, rows, inside, -LOW) * LOG2_E
        scores = _scores(query, key)
        weights = jnp.where(mask[None], jnp.exp2(scores - log_sum[:, None]), 0.0)
        dvalue += dot(weights.astype(dout.dtype), dout, COLUMNS)
        inner = _load(inner_ref, rows, inside)
        dscores = weights * (dot(dout, value, LANES) - inner[:, None])
        return dkey + dot(dscores.astype(query.dtype), query, COLUMNS), dvalue

    blank = jnp.zeros((tiling.back, width), F32)
    dkey, dvalue = _over(queries, tiling.back, step, (blank, blank))
    dkey = (dkey * width**-0.5).astype(dkey_ref.dtype)
    triton.store(dkey_ref.at[columns, :], dkey, mask=there[:, None])
    triton.store(dvalue_ref.at[columns, :], dvalue.astype(dvalue_ref.dtype), mask=there[:, None])


def _spec(x: Any) -> pl.BlockSpec:
    """Return the block of one head: of [b, n, h, k], of numbers [b, h, n], or of a mask [b, n]."""
    if x.ndim == 4:
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, h, i: (b, 0, h, 0))
    if x.ndim == 3:
        return pl.BlockSpec((None, None, x.shape[2]), lambda b, h, i: (b, h, 0))
    return pl.BlockSpec((None, x.shape[1]), lambda b, h, i: (b, 0))


def _call(
    kernel: Any,
    tiling: GpuAttentionTiling,
    options: KernelOptions,
    blocks: int,
    arrays: Sequence[Any],
    mask: Array | None,
    results: Sequence[Any],
) -> Any:
    """Run a kernel, one program for each block of each head of the first array."""
    arrays = arrays if mask is None else [*arrays, mask.astype(F32)]
    return pl.pallas_call(
        functools.partial(kernel, tiling, mask is not None),
        grid=(arrays[0].shape[0], arrays[0].shape[2], blocks),
        in_specs=[_spec(x) for x in arrays],
        out_specs=[_spec(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=options.interpret,
    )(*arrays)


def forward(options: KernelOptions, *arrays: Any, keep: bool) -> tuple[Array, Array]:
    """Return the output `[b, n, h, k]` and the logarithms of the softmax's sums `[b, h, n]`."""
    query, key, value, mask = arrays
    tiling: Any = tile(options, query)
    batch, queries, heads, _ = query.shape
    sums: Any = jax.ShapeDtypeStruct((batch, heads, queries), F32)
    out: Any = jax.ShapeDtypeStruct(query.shape, value.dtype)
    blocks = pl.cdiv(queries, tiling.queries)
    given = (query, key, value)
    return tuple(_call(_forward_kernel, tiling, options, blocks, given, mask, (out, sums)))


def backward(options: KernelOptions, dout: Array, kept: Any, *arrays: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value."""
    (query, key, value, mask), (out, log_sum) = arrays, kept
    tiling: Any = tile(options, query)
    inner = jnp.einsum("bnhk,bnhk->bhn", out, dout, preferred_element_type=F32)
    given = (query, key, value, dout, log_sum, inner)
    blocks = [pl.cdiv(x.shape[1], tiling.back) for x in (query, key)]
    (dquery,) = _call(_query_kernel, tiling, options, blocks[0], given, mask, (query,))
    dkey, dvalue = _call(_key_kernel, tiling, options, blocks[1], given, mask, (key, value))
    return dquery, dkey, dvalue
