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

from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, ROWS, dot

VMEM = 60 * 2**20
"""Bytes that a kernel may take: v5p has 64 MiB a core, v5e and v6e 128."""

QUERIES = (640, 512, 384, 256, 128)
"""Queries a step, at most.

Sums over the keys are chains of additions, one for every 128 queries, and few chains side by side
leave the vector unit waiting: 640 queries a step halve the schedule of 256 at 590 tokens (v6e).
"""


ROWS_A_STEP = 640
"""Tokens a step, if several clips have no more."""


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


def _ahead(make: Callable[..., Any], heads: list[tuple[int, int]]) -> Iterator[Any]:
    """Each (clip, head), and what `make` makes for it, one ahead.

    So its products run beside the vector unit's work on the one before.
    """
    following = make(*heads[0])
    for at, head in enumerate(heads):
        current = following
        following = make(*heads[at + 1]) if at + 1 < len(heads) else None
        yield *head, current


def _heads(plan: Plan, clips: int) -> list[tuple[int, int]]:
    return [(clip, head) for clip in range(clips) for head in range(plan.group)]


def _scores(key: Array, query: Array, bias: Array | None) -> Array:
    """Logits `[m, n]` of one head; what is not seen is far below all else."""
    scores = dot(key, query, LANES)
    return scores if bias is None else jnp.where(bias > 0, scores, LOW)


def _forward_kernel(static: Any, *refs: Any) -> None:
    plan, width, masked = static
    query_ref, key_ref, value_ref = refs[:3]
    seen_ref = refs[3] if masked else None
    out_ref, sum_ref = refs[3 + masked :]
    answers: list[Array] = []

    def scored(clip: int, head: int) -> Array:
        query = query_ref[clip] * jnp.asarray(width**-0.5, query_ref.dtype)
        query = jnp.where(_lanes(query.shape, head, width), query, 0)
        return _scores(key_ref[clip], query, None if seen_ref is None else seen_ref[clip])

    for clip, head, scores in _ahead(scored, _heads(plan, query_ref.shape[0])):
        peak = scores.max(axis=0, keepdims=True)
        raw = jnp.exp(scores - peak)
        total = raw.sum(axis=0, keepdims=True)
        answer = dot(_of(head, width, value_ref[clip]), raw.astype(value_ref.dtype), COLUMNS)
        answers.append(answer * (1.0 / total))
        sum_ref[clip, 0, head : head + 1] = peak + jnp.log(total)
        if head + 1 == plan.group:
            out_ref[clip] = jnp.concatenate(answers).T.astype(out_ref.dtype)
            answers.clear()


def _backward_kernel(static: Any, *refs: Any) -> None:
    plan, width, masked, queries = static
    query_ref, key_ref, value_ref, out_ref, dout_ref, sum_ref = refs[:6]
    seen_ref = refs[6] if masked else None
    dquery_ref, dkey_ref, dvalue_ref, dkey_sum, dvalue_sum = refs[6 + masked :]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        dkey_sum[...] = jnp.zeros(dkey_sum.shape, F32)
        dvalue_sum[...] = jnp.zeros(dvalue_sum.shape, F32)

    def inside(x: Array, axis: int) -> Array:
        """Zero past the end, which the last block reaches: what is there is anything."""
        if queries % plan.queries == 0:
            return x
        at = lax.broadcasted_iota(jnp.int32, x.shape, axis) + step * plan.queries
        return jnp.where(at < queries, x, 0)

    def multiplied(clip: int, head: int) -> tuple[Array, ...]:
        query = inside(query_ref[clip], 0) * jnp.asarray(width**-0.5, query_ref.dtype)
        dout = inside(dout_ref[clip], 0)
        mine = _lanes(query.shape, head, width)
        asked, answer = jnp.where(mine, query, 0), jnp.where(mine, dout, 0)
        scores = _scores(key_ref[clip], asked, None if seen_ref is None else seen_ref[clip])
        return asked, answer, scores, dot(value_ref[clip], answer, LANES)

    agreed, dqueries = jnp.zeros(()), []
    for clip, head, products in _ahead(multiplied, _heads(plan, query_ref.shape[0])):
        asked, answer, scores, dweights = products
        if head == 0:
            out, dout = (inside(ref[clip], 0).astype(F32) for ref in (out_ref, dout_ref))
            agreed = (out * dout).T
        weights = jnp.exp(scores - inside(sum_ref[clip, 0], 1)[head : head + 1])
        dvalue_sum[clip] += dot(weights.astype(value_ref.dtype), answer, ROWS)
        along = agreed[head * width : (head + 1) * width].sum(axis=0, keepdims=True)
        dscores = (weights * (dweights - along)).astype(query_ref.dtype)
        dkey_sum[clip] += dot(dscores, asked, ROWS)
        dqueries.append(dot(_of(head, width, key_ref[clip]), dscores, COLUMNS))
        if head + 1 == plan.group:
            dquery = jnp.concatenate(dqueries).T
            dquery_ref[clip] = (dquery * width**-0.5).astype(dquery_ref.dtype)
            dqueries.clear()

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        dkey_ref[...] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum[...].astype(dvalue_ref.dtype)


def _flat(x: Array) -> Array:
    """[b, n, h, k] as [b, n, h k]."""
    return x.reshape(*x.shape[:2], -1)


def _specs(
    plan: Plan, clips: int, width: int, keys: int
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, of all keys, and of the logarithms of the sums."""
    lanes = plan.group * width
    of_queries = pl.BlockSpec((clips, plan.queries, lanes), lambda b, g, i: (b, i, g))
    of_keys = pl.BlockSpec((clips, keys, lanes), lambda b, g, i: (b, 0, g))
    of_sums = pl.BlockSpec((clips, 1, plan.group, plan.queries), lambda b, g, i: (b, g, 0, i))
    return of_queries, of_keys, of_sums


def _clips(plan: Plan, batch: int, queries: int, keys: int) -> int:
    """Clips a step: several short ones, since a step has a price of its own."""
    if plan.queries < queries:
        return 1
    most = max(1, ROWS_A_STEP // max(queries, keys))
    return max(clips for clips in range(1, min(most, batch) + 1) if batch % clips == 0)


def _mask(mask: Array | None, clips: int) -> tuple[list[Array], list[pl.BlockSpec]]:
    if mask is None:
        return [], []
    column = mask.astype(F32)[:, :, None]
    return [column], [pl.BlockSpec((clips, mask.shape[1], 1), lambda b, g, i: (b, 0, 0))]


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
    clips = _clips(plan, batch, queries, key.shape[1])
    of_queries, of_keys, of_sums = _specs(plan, clips, width, key.shape[1])
    masks, mask_specs = _mask(mask, clips)
    cost = 4 * batch * heads * width * queries * key.shape[1]
    out, sums = pl.pallas_call(
        functools.partial(_forward_kernel, (plan, width, len(masks))),
        grid=(batch // clips, groups, pl.cdiv(queries, plan.queries)),
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
    clips = _clips(plan, batch, queries, keys)
    of_queries, of_keys, of_sums = _specs(plan, clips, width, keys)
    masks, mask_specs = _mask(mask, clips)
    sums = log_sum.reshape(batch, groups, plan.group, queries)
    grads = pl.pallas_call(
        functools.partial(_backward_kernel, (plan, width, len(masks), queries)),
        grid=(batch // clips, groups, pl.cdiv(queries, plan.queries)),
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_queries, of_sums, *mask_specs],
        out_specs=[of_queries, of_keys, of_keys],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads * width), query.dtype),
            jax.ShapeDtypeStruct((batch, keys, heads * width), key.dtype),
            jax.ShapeDtypeStruct((batch, keys, heads * width), value.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((clips, keys, lanes), F32)] * 2,
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
