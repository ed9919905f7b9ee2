"""Attention for TPU (Pallas, Mosaic): the weights stay in VMEM.

Keys and values of a few heads are held whole (3,590 tokens of two heads: 0.9 MB in bfloat16); the
softmax of a block of queries needs one pass. Logits lie as [keys, queries]: they are summed over
sublanes, and a row holds one number per query. Heads lie side by side on lanes as the projections
leave them, without a transpose; the product of one head reads all lanes with those of the others
set to zero, which costs a systolic array of 128 lanes no more than 64 would.

Forward 4N bytes (three tensors read, one written), backward 8N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl, pltpu

VMEM = 60 * 2**20
"""Bytes that a kernel may use: v5p has 64 MiB per core, v5e and v6e 128."""

QUERIES = (640, 512, 384, 256, 128)
"""Queries per step, at most.

Sums over the keys are chains of additions, one for every 128 queries, and few chains side by side
leave the vector unit waiting: 640 queries per step halve the schedule of 256 at 590 tokens (v6e).
"""

STEP_TOKENS = 640
"""Tokens per step at most, if a step holds several clips."""


class TpuAttentionTiling(NamedTuple):
    """Heads that lie on the lanes of one step, and queries per step."""

    group: int
    queries: int


def tile(options: KernelOptions, query: Any, key: Any, *rest: Any) -> TpuAttentionTiling | str:
    """Return the tiling of a shape; see `Backend`."""
    queries, keys, (heads, width) = query.shape[1], key.shape[1], query.shape[2:]
    if min(queries, keys) < 8:
        return f"{min(queries, keys)} tokens, fewer than 8"
    groups = [g for g in range(1, heads + 1) if heads % g == 0 and g * width % 128 == 0]
    group = groups[0] if groups else heads
    if group * width > 512:
        return f"{heads} heads of width {width}: no small group of them fills 128 lanes"
    padded = -(-group * width // 128) * 128
    fitting = []
    for block in {min(most, queries) for most in QUERIES}:
        moved = 2 * query.dtype.itemsize * padded * (4 * keys + 5 * block)
        if moved + 4 * (2 * padded * keys + 8 * block * keys) <= VMEM:
            fitting.append(block)
    if not fitting:
        return f"{keys} keys: VMEM is too small"
    # The fewest queries in all, those past the end counted; of these the fewest steps.
    block = min(fitting, key=lambda block: (-(-queries // block) * block, -block))
    return TpuAttentionTiling(group, block)


def _select_lanes(head: int, width: int, *arrays: Array) -> list[Array]:
    """Set all lanes of arrays `[n, lanes]` to zero but those of a head."""
    lane = lax.broadcasted_iota(jnp.int32, arrays[0].shape, 1)
    own = (lane >= head * width) & (lane < (head + 1) * width)
    return [jnp.where(own, x, 0) for x in arrays]


def _slice_head(x: Array, head: int, width: int) -> Array:
    """Return the features of a head of `[m, lanes]`."""
    return x[:, head * width : (head + 1) * width]


def _prefetch(
    make: Callable[..., Any], tiling: TpuAttentionTiling, clips: int
) -> Iterator[tuple[int, int, Any]]:
    """Yield each (clip, head) with `make(clip, head)`, which is computed one step ahead.

    So its products run beside the vector unit's work on the previous head.
    """
    heads = [(clip, head) for clip in range(clips) for head in range(tiling.group)]
    following = make(*heads[0])
    for at, head in enumerate(heads):
        current = following
        following = make(*heads[at + 1]) if at + 1 < len(heads) else None
        yield *head, current


def _scores(key: Array, query: Array, mask: Array | None) -> Array:
    """Return the logits `[m, n]` of one head."""
    scores = dot(key, query, LANES)
    return scores if mask is None else jnp.where(mask > 0, scores, LOW)


def _forward_kernel(tiling: TpuAttentionTiling, width: int, masked: bool, *refs: Any) -> None:
    query_ref, key_ref, value_ref = refs[:3]
    mask_ref = refs[3] if masked else None
    out_ref, sum_ref = refs[3 + masked :]
    outputs: list[Array] = []

    def make(clip: int, head: int) -> Array:
        query = query_ref[clip] * jnp.asarray(width**-0.5, query_ref.dtype)
        (query,) = _select_lanes(head, width, query)
        return _scores(key_ref[clip], query, None if mask_ref is None else mask_ref[clip])

    for clip, head, scores in _prefetch(make, tiling, query_ref.shape[0]):
        peak = scores.max(axis=0, keepdims=True)
        raw = jnp.exp(scores - peak)
        total = raw.sum(axis=0, keepdims=True)
        value = _slice_head(value_ref[clip], head, width)
        output = dot(value, raw.astype(value_ref.dtype), COLUMNS)
        outputs.append(output * (1.0 / total))
        sum_ref[clip, 0, head : head + 1] = peak + jnp.log(total)
        if head + 1 == tiling.group:
            out_ref[clip] = jnp.concatenate(outputs).T.astype(out_ref.dtype)
            outputs.clear()


def _backward_kernel(
    tiling: TpuAttentionTiling, width: int, masked: bool, queries: int, *refs: Any
) -> None:
    query_ref, key_ref, value_ref, out_ref, dout_ref, sum_ref = refs[:6]
    mask_ref = refs[6] if masked else None
    dquery_ref, dkey_ref, dvalue_ref, dkey_sum, dvalue_sum = refs[6 + masked :]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        dkey_sum[...] = jnp.zeros(dkey_sum.shape, F32)
        dvalue_sum[...] = jnp.zeros(dvalue_sum.shape, F32)

    def clear_end(x: Array, axis: int) -> Array:
        """Set what lies past the last query to zero: memory there is undefined."""
        if queries % tiling.queries == 0:
            return x
        at = lax.broadcasted_iota(jnp.int32, x.shape, axis) + step * tiling.queries
        return jnp.where(at < queries, x, 0)

    def make(clip: int, head: int) -> tuple[Array, ...]:
        query = clear_end(query_ref[clip], 0) * jnp.asarray(width**-0.5, query_ref.dtype)
        dout = clear_end(dout_ref[clip], 0)
        query, dout = _select_lanes(head, width, query, dout)
        scores = _scores(key_ref[clip], query, None if mask_ref is None else mask_ref[clip])
        return query, dout, scores, dot(value_ref[clip], dout, LANES)

    products, dqueries = jnp.zeros(()), []
    for clip, head, (query, dout, scores, dweights) in _prefetch(make, tiling, query_ref.shape[0]):
        if head == 0:
            out, whole = (clear_end(ref[clip], 0).astype(F32) for ref in (out_ref, dout_ref))
            products = (out * whole).T
        weights = jnp.exp(scores - clear_end(sum_ref[clip, 0], 1)[head : head + 1])
        dvalue_sum[clip] += dot(weights.astype(value_ref.dtype), dout)
        inner = products[head * width : (head + 1) * width].sum(axis=0, keepdims=True)
        dscores = (weights * (dweights - inner)).astype(query_ref.dtype)
        dkey_sum[clip] += dot(dscores, query)
        dqueries.append(dot(_slice_head(key_ref[clip], head, width), dscores, COLUMNS))
        if head + 1 == tiling.group:
            dquery = jnp.concatenate(dqueries).T
            dquery_ref[clip] = (dquery * width**-0.5).astype(dquery_ref.dtype)
            dqueries.clear()

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        dkey_ref[...] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum[...].astype(dvalue_ref.dtype)


def _flatten(x: Array) -> Array:
    """Reshape [b, n, h, k] to [b, n, h k]."""
    return x.reshape(*x.shape[:2], -1)


class _Layout(NamedTuple):
    """Grid of a call, and the blocks of queries, keys, sums `[b, groups, group, n]` and mask."""

    tiling: TpuAttentionTiling
    grid: tuple[int, int, int]
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    sums: pl.BlockSpec
    mask: list[pl.BlockSpec]
    sums_shape: tuple[int, int, int, int]
    key_sums: tuple[int, int, int]


def _lay_out(options: KernelOptions, query: Array, key: Array, mask: Array | None) -> _Layout:
    tiling: Any = tile(options, query, key)
    (batch, queries, heads, width), keys = query.shape, key.shape[1]
    clips = 1
    if tiling.queries >= queries:  # several short clips, since every step has a fixed cost
        most = min(batch, max(1, STEP_TOKENS // max(queries, keys)))
        clips = max(n for n in range(1, most + 1) if batch % n == 0)
    groups, lanes = heads // tiling.group, tiling.group * width
    spec = pl.BlockSpec
    return _Layout(
        tiling,
        (batch // clips, groups, pl.cdiv(queries, tiling.queries)),
        spec((clips, tiling.queries, lanes), lambda b, g, i: (b, i, g)),
        spec((clips, keys, lanes), lambda b, g, i: (b, 0, g)),
        spec((clips, 1, tiling.group, tiling.queries), lambda b, g, i: (b, g, 0, i)),
        [] if mask is None else [spec((clips, keys, 1), lambda b, g, i: (b, 0, 0))],
        (batch, groups, tiling.group, queries),
        (clips, keys, lanes),
    )


def forward(options: KernelOptions, *arrays: Any, keep: bool) -> tuple[Array, Array]:
    """Return the output `[b, n, h, k]` and the logarithms of the softmax's sums `[b, h, n]`."""
    query, key, value, mask = arrays
    layout = _lay_out(options, query, key, mask)
    batch, queries, heads, width = query.shape
    out, sums = pl.pallas_call(
        functools.partial(_forward_kernel, layout.tiling, width, mask is not None),
        grid=layout.grid,
        in_specs=[layout.queries, layout.keys, layout.keys, *layout.mask],
        out_specs=[layout.queries, layout.sums],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads * width), value.dtype),
            jax.ShapeDtypeStruct(layout.sums_shape, F32),
        ],
        compiler_params=_parameters("parallel"),
        cost_estimate=_estimate(query, key, products=2, tensors=2),
        interpret=options.interpret,
    )(*map(_flatten, (query, key, value)), *_column(mask))
    return out.reshape(query.shape), sums.reshape(batch, heads, queries)


def backward(options: KernelOptions, dout: Array, kept: Any, *arrays: Any) -> tuple[Array, ...]:
    """Return the gradients of query, key and value."""
    (query, key, _, mask), (out, log_sum) = arrays, kept
    layout = _lay_out(options, query, key, mask)
    of_queries, of_keys = layout.queries, layout.keys
    _, queries, heads, width = query.shape
    grads = pl.pallas_call(
        functools.partial(_backward_kernel, layout.tiling, width, mask is not None, queries),
        grid=layout.grid,
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_queries, layout.sums, *layout.mask],
        out_specs=[of_queries, of_keys, of_keys],
        out_shape=[
            jax.ShapeDtypeStruct((*x.shape[:2], heads * width), x.dtype) for x in arrays[:3]
        ],
        scratch_shapes=[pltpu.VMEM(layout.key_sums, F32)] * 2,
        compiler_params=_parameters("arbitrary"),
        cost_estimate=_estimate(query, key, products=5, tensors=4),
        interpret=options.interpret,
    )(*map(_flatten, (*arrays[:3], out, dout)), log_sum.reshape(layout.sums_shape), *_column(mask))
    return tuple(grad.reshape(x.shape) for grad, x in zip(grads, arrays[:3], strict=True))


def _column(mask: Array | None) -> list[Array]:
    """Return the mask `[b, m]` as `[b, m, 1]`, or nothing."""
    return [] if mask is None else [mask.astype(F32)[:, :, None]]


def _parameters(last: Any) -> Any:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", last), vmem_limit_bytes=VMEM
    )


def _estimate(query: Array, key: Array, *, products: int, tensors: int) -> pl.CostEstimate:
    """Return the cost of products of queries and keys, and of the tensors moved of each."""
    batch, queries, heads, width = query.shape
    weights = batch * heads * queries * key.shape[1]
    return pl.CostEstimate(
        flops=2 * products * weights * width,
        transcendentals=weights,
        bytes_accessed=tensors * (query.size * query.dtype.itemsize + key.size * 2),
    )
