"""Attention for TPU (Pallas, Mosaic): the weights never leave VMEM.

Keys and values of a few heads are held whole (3,590 tokens of two heads are 0.9 MB in bfloat16)
while blocks of queries go by, so the softmax needs no second look. Logits lie as [keys, queries]:
their sums run over sublanes, and what belongs to a query is a row. Heads lie side by side on lanes
as the projections leave them, without a transpose; a product of one head reads all lanes with the
others' set to zero, which costs a systolic array of 128 lanes no more than 64 would.

Forward 4N bytes (three tensors read, one written), backward 8N.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from aatjax_kernels.product import COLUMNS, F32, LANES, LOW, ROWS, dot

VMEM = 60 * 2**20
"""Bytes that a kernel may take: v5p has 64 MiB a core, v5e and v6e 128."""

QUERIES = (640, 512, 384, 256, 128)
"""Queries a step, at most.

Sums over the keys are chains of additions, one for every 128 queries, and few chains side by side
leave the vector unit waiting: 640 queries a step halve the schedule of 256 at 590 tokens (v6e).
"""


class Plan(NamedTuple):
    """How a shape is cut: heads that lie on one step's lanes, and queries a step."""

    group: int
    queries: int


def plan_of(tokens: tuple[int, int], heads: int, width: int, size: int) -> Plan | str:
    """The cut of a shape, or what of it the kernel does not take.

    Args:
        tokens: queries and keys.
        heads: heads.
        width: features of a head.
        size: bytes of a number.
    """
    if min(tokens) < 8:
        return f"{min(tokens)} tokens, fewer than 8"
    groups = [g for g in range(1, heads + 1) if heads % g == 0 and g * width % 128 == 0]
    group = groups[0] if groups else heads
    lanes = group * width
    if lanes > 512:
        return f"{heads} heads of width {width}: no few of them fill 128 lanes"
    padded = -(-lanes // 128) * 128
    fitting = []
    for block in {min(queries, tokens[0]) for queries in QUERIES}:
        moved = 2 * size * padded * (4 * tokens[1] + 5 * block)
        if moved + 4 * (2 * padded * tokens[1] + 8 * block * tokens[1]) <= VMEM:
            fitting.append(block)
    if not fitting:
        return f"{tokens[1]} keys: VMEM is too small"
    # The fewest queries in all, those past the end counted; of these the fewest steps.
    return Plan(group, min(fitting, key=lambda block: (pl.cdiv(tokens[0], block) * block, -block)))


def _lanes(shape: tuple[int, ...], head: int, width: int) -> Array:
    """Which lanes are a head's."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head * width) & (lane < (head + 1) * width)


def _of(head: int, width: int, x: Array) -> Array:
    """A head's features of `[m, lanes]`."""
    return x[:, head * width : (head + 1) * width]


def _ahead(make: Callable[[int], Any], count: int) -> Iterator[Any]:
    """What `make` makes for each head, one head ahead: products beside the vector unit's work."""
    following = make(0)
    for head in range(count):
        current = following
        following = make(head + 1) if head + 1 < count else None
        yield current


def _scores(key: Array, query: Array, bias: Array | None) -> Array:
    """Logits `[m, n]` of one head; what is not seen is far below all else."""
    scores = dot(key, query, LANES)
    return scores if bias is None else jnp.where(bias > 0, scores, LOW)


def _forward_kernel(static: Any, *refs: Any) -> None:
    plan, width, masked = static
    query_ref, key_ref, value_ref = refs[:3]
    seen = refs[3][0] if masked else None
    out_ref, sum_ref = refs[3 + masked :]
    query, key, value = query_ref[0], key_ref[0], value_ref[0]
    query = query * jnp.asarray(width**-0.5, query.dtype)

    def scored(head: int) -> Array:
        return _scores(key, jnp.where(_lanes(query.shape, head, width), query, 0), seen)

    answers = []
    for head, scores in enumerate(_ahead(scored, plan.group)):
        peak = scores.max(axis=0, keepdims=True)
        raw = jnp.exp(scores - peak)
        total = raw.sum(axis=0, keepdims=True)
        answer = dot(_of(head, width, value), raw.astype(value.dtype), COLUMNS)
        answers.append(answer * (1.0 / total))
        sum_ref[0, 0, head : head + 1] = peak + jnp.log(total)
    out_ref[0] = jnp.concatenate(answers).T.astype(out_ref.dtype)


def _backward_kernel(static: Any, *refs: Any) -> None:
    plan, width, masked, queries = static
    query_ref, key_ref, value_ref, out_ref, dout_ref, sum_ref = refs[:6]
    seen = refs[6][0] if masked else None
    dquery_ref, dkey_ref, dvalue_ref, dkey_sum, dvalue_sum = refs[6 + masked :]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        dkey_sum[...] = jnp.zeros(dkey_sum.shape, F32)
        dvalue_sum[...] = jnp.zeros(dvalue_sum.shape, F32)

    query, key, value = query_ref[0], key_ref[0], value_ref[0]
    out, dout = out_ref[0], dout_ref[0]
    log_sum = sum_ref[0, 0]
    if queries % plan.queries:  # the last block reaches past the end: what is there is anything
        row = lax.broadcasted_iota(jnp.int32, query.shape, 0) + step * plan.queries
        inside = row < queries
        query, out, dout = (jnp.where(inside, x, 0) for x in (query, out, dout))
        column = lax.broadcasted_iota(jnp.int32, log_sum.shape, 1) + step * plan.queries
        log_sum = jnp.where(column < queries, log_sum, 0.0)
    query = query * jnp.asarray(width**-0.5, query.dtype)

    def multiplied(head: int) -> tuple[Array, ...]:
        mine = _lanes(query.shape, head, width)
        asked, answer = jnp.where(mine, query, 0), jnp.where(mine, dout, 0)
        return asked, answer, _scores(key, asked, seen), dot(value, answer, LANES)

    agreed = (dout.astype(F32) * out.astype(F32)).T
    dqueries = []
    for head, (asked, answer, scores, dweights) in enumerate(_ahead(multiplied, plan.group)):
        weights = jnp.exp(scores - log_sum[head : head + 1])
        small = weights.astype(value.dtype)
        dvalue_sum[...] += dot(small, answer, ROWS)
        along = agreed[head * width : (head + 1) * width].sum(axis=0, keepdims=True)
        dscores = (weights * (dweights - along)).astype(query.dtype)
        dkey_sum[...] += dot(dscores, asked, ROWS)
        dqueries.append(dot(_of(head, width, key), dscores, COLUMNS))
    dquery = jnp.concatenate(dqueries).T
    dquery_ref[0] = (dquery * width**-0.5).astype(dquery_ref.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        dkey_ref[0] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[0] = dvalue_sum[...].astype(dvalue_ref.dtype)


def _flat(x: Array) -> Array:
    """[b, n, h, k] as [b, n, h k]."""
    return x.reshape(*x.shape[:2], -1)


def _specs(plan: Plan, width: int, keys: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, of all keys, and of the logarithms of the sums."""
    lanes = plan.group * width
    of_queries = pl.BlockSpec((1, plan.queries, lanes), lambda b, g, i: (b, i, g))
    of_keys = pl.BlockSpec((1, keys, lanes), lambda b, g, i: (b, 0, g))
    of_sums = pl.BlockSpec((1, 1, plan.group, plan.queries), lambda b, g, i: (b, g, 0, i))
    return of_queries, of_keys, of_sums


def _mask(mask: Array | None) -> tuple[list[Array], list[pl.BlockSpec]]:
    if mask is None:
        return [], []
    column = mask.astype(F32)[:, :, None]
    return [column], [pl.BlockSpec((1, mask.shape[1], 1), lambda b, g, i: (b, 0, 0))]


def _params(last: Any) -> Any:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", last), vmem_limit_bytes=VMEM
    )


def forward(
    plan: Plan, query: Array, key: Array, value: Array, mask: Array | None, *, interpret: Any
) -> tuple[Array, Array]:
    """Output `[b, n, h, k]`, and the logarithms of the softmax's sums `[b, h, n]`."""
    batch, queries, heads, width = query.shape
    groups = heads // plan.group
    of_queries, of_keys, of_sums = _specs(plan, width, key.shape[1])
    masks, mask_specs = _mask(mask)
    cost = 4 * batch * heads * width * queries * key.shape[1]
    out, sums = pl.pallas_call(
        functools.partial(_forward_kernel, (plan, width, len(masks))),
        grid=(batch, groups, pl.cdiv(queries, plan.queries)),
        in_specs=[of_queries, of_keys, of_keys, *mask_specs],
        out_specs=[of_queries, of_sums],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads * width), value.dtype),
            jax.ShapeDtypeStruct((batch, groups, plan.group, queries), F32),
        ],
        compiler_params=_params("parallel"),
        cost_estimate=pl.CostEstimate(
            flops=cost,
            transcendentals=batch * heads * queries * key.shape[1],
            bytes_accessed=2 * query.size * query.dtype.itemsize + 2 * key.size * 2,
        ),
        interpret=interpret,
    )(*map(_flat, (query, key, value)), *masks)
    return out.reshape(query.shape), sums.reshape(batch, heads, queries)


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
    batch, queries, heads, width = query.shape
    keys, lanes, groups = key.shape[1], plan.group * width, heads // plan.group
    of_queries, of_keys, of_sums = _specs(plan, width, keys)
    masks, mask_specs = _mask(mask)
    sums = log_sum.reshape(batch, groups, plan.group, queries)
    grads = pl.pallas_call(
        functools.partial(_backward_kernel, (plan, width, len(masks), queries)),
        grid=(batch, groups, pl.cdiv(queries, plan.queries)),
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_queries, of_sums, *mask_specs],
        out_specs=[of_queries, of_keys, of_keys],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads * width), query.dtype),
            jax.ShapeDtypeStruct((batch, keys, heads * width), key.dtype),
            jax.ShapeDtypeStruct((batch, keys, heads * width), value.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((keys, lanes), F32), pltpu.VMEM((keys, lanes), F32)],
        compiler_params=_params("arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * heads * width * queries * keys,
            transcendentals=batch * heads * queries * keys,
            bytes_accessed=4 * query.size * query.dtype.itemsize + 4 * key.size * 2,
        ),
        interpret=interpret,
    )(*map(_flat, (query, key, value, out, dout)), sums, *masks)
    return (
        grads[0].reshape(query.shape),
        grads[1].reshape(key.shape),
        grads[2].reshape(value.shape),
    )
