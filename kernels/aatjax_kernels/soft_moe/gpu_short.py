"""Short clips on NVIDIA GPUs: a program holds one clip, so that tokens come from memory once.

One kernel in each direction instead of two and the experts between them. The second look at the
tokens is served by the caches of the program's own core (110 tokens are 169 kB in bfloat16). The
equations are those of `xla.py`; experts are two products over all of them, as in `packed.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.soft_moe import gpu_tiles as pieces
from aatjax_kernels.soft_moe.gpu_tiles import Plan
from aatjax_kernels.soft_moe.packing import Options, Packed, gelu, ownership, pack
from aatjax_kernels.soft_moe.reference import experts as apply

MOST_TOKENS = {16: 160, 32: 128}
"""Tokens of a clip at most, by the padded slots: more do not fit 255 registers a thread."""

FEWEST_CLIPS = 64
"""With fewer clips half of an H100's 132 cores would have nothing to do."""


def plan_of(plan: Plan) -> Plan | None:
    """The plan with one block of rows that holds a clip, or None where that is no use."""
    if plan.tokens > MOST_TOKENS.get(plan.padded, 0) or plan.batch < FEWEST_CLIPS:
        return None
    rows = pl.next_power_of_2(plan.tokens)
    # No spills on an H100 so.
    chunk = min(plan.chunk, 32 if rows > 128 or plan.padded > 16 else 128)
    return plan._replace(rows=rows, blocks=1, chunk=chunk, group=plan.dim // chunk)


def _clip(plan: Plan, scores: Array, seen: Array) -> tuple[Array, Array]:
    """Dispatch and combine weights of a clip, [tokens, slots]."""
    shown = jnp.where(seen[:, None], scores, LOW)
    raw = jnp.where(seen[:, None], jnp.exp(shown - jnp.max(shown, axis=0)[None]), 0.0)
    total = jnp.maximum(jnp.sum(raw, axis=0), 1e-30)
    return raw / total[None], pieces.read(plan, scores, seen)


def _below(x: Array) -> Array:
    """The normal distribution function, within 2.1e-7 in float32: Triton has no erf.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    size = jnp.abs(x) * 0.5**0.5
    t = 1.0 / (1.0 + 0.3275911 * size)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series = functools.reduce(lambda total, term: (total + term) * t, terms, 0.0 * t)
    tail = 0.5 * series * jnp.exp(-size * size)
    return jnp.where(x < 0, tail, 1.0 - tail)


def _forward_kernel(plan: Plan, *refs: Any) -> None:
    x, phi, w_down, b_down, w_up, b_up, own = refs[:7]
    valid = refs[7] if plan.masked else None
    out, *kept = refs[7 + plan.masked :]
    rows, inside = pieces.inside(plan, 0)
    scores, _ = pieces.score(plan, x, phi, rows, inside)
    sent, read = _clip(plan, scores, pieces.seen(valid, rows, inside))
    if kept:
        pieces.store(kept[1], rows, slice(None), scores, inside)
    sent, read = sent.astype(x.dtype), read.astype(x.dtype)

    def gather(chunk: Any, before: Array) -> Array:
        columns = pieces.columns(plan, chunk)
        slots = dot(sent, pieces.load(x, rows, columns, inside), COLUMNS)
        if kept:
            pieces.put(plan, kept[0], columns, slots)
        return before + dot(slots, w_down[:, columns], LANES)

    hidden = pieces.over_chunks(plan, gather, jnp.zeros(own.shape, F32)) + b_down[...]
    answer = hidden * _below(hidden) * own[...]

    def answers(chunk: Any, carry: Any) -> Any:
        columns = pieces.columns(plan, chunk)
        outputs = (dot(answer, w_up[:, columns]) + b_up[:, columns]).astype(x.dtype)
        pieces.store(out, rows, columns, dot(read, outputs).astype(out.dtype), inside)
        return carry

    pieces.over_chunks(plan, answers, 0)


def _backward_kernel(plan: Plan, *refs: Any) -> None:
    x, dout, phi, scores_ref, slots, outputs, slope, w_down, w_up = refs[:9]
    valid = refs[9] if plan.masked else None
    dx, dphi, doutputs_ref = refs[-3:]
    rows, inside = pieces.inside(plan, 0)
    scores = pieces.load(scores_ref, rows, slice(None), inside)
    sent, read = _clip(plan, scores, pieces.seen(valid, rows, inside))
    length = pieces.lengths(plan, x, rows, inside) if plan.normalize else None
    small = read.astype(x.dtype)

    def outputs_of(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = pieces.columns(plan, chunk)
        cotangent = pieces.load(dout, rows, columns, inside)
        doutputs = dot(small, cotangent, COLUMNS)
        pieces.put(plan, doutputs_ref, columns, doutputs)
        dread = carry[0] + dot(cotangent, outputs[:, columns], LANES)
        return dread, carry[1] + dot(doutputs, w_up[:, columns], LANES)

    blank = jnp.zeros((plan.rows, plan.padded), F32)
    first = (blank, jnp.zeros(slope.shape, F32))
    dread, dhidden = pieces.over_chunks(plan, outputs_of, first)
    dhidden = dhidden * slope[...]

    def slots_of(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = pieces.columns(plan, chunk)
        dslots = dot(dhidden, w_down[:, columns])
        tokens = pieces.load(x, rows, columns, inside)
        dsent = carry[0] + dot(tokens, dslots.astype(x.dtype), LANES)
        return dsent, carry[1] + jnp.sum(slots[:, columns] * dslots, axis=1)

    dsent, delta = pieces.over_chunks(plan, slots_of, (blank, jnp.zeros((plan.padded,), F32)))
    of_tokens = jnp.sum(read * dread, axis=1)[:, None]
    dscores = read * (dread - of_tokens) + sent * (dsent - delta[None])
    scaled = dscores if length is None else dscores * length[:, None]
    weights, slopes = sent.astype(x.dtype), scaled.astype(x.dtype)

    def finish(chunk: Any, carry: Any) -> Any:
        columns = pieces.columns(plan, chunk)
        dslots = dot(dhidden, w_down[:, columns]).astype(x.dtype)
        value = dot(weights, dslots) + dot(slopes, phi[:, columns])
        tokens = pieces.load(x, rows, columns, inside)
        if length is not None:
            along = length * length * jnp.sum(dscores * scores, axis=1)
            value -= along[:, None] * tokens.astype(F32)
        pieces.store(dx, rows, columns, value.astype(dx.dtype), inside)
        pieces.put(plan, dphi, columns, dot(slopes, tokens, COLUMNS))
        return carry

    pieces.over_chunks(plan, finish, 0)


def _wide(packed: Packed, own: Array, plan: Plan) -> tuple[Packed, Array]:
    """Slots padded as the plan has them, hidden units to a power of two."""
    units = packed.w_down.shape[0]
    more = max(16, pl.next_power_of_2(units)) - units
    slots = plan.padded - plan.slots
    rows, across, both = ((0, more), (0, 0)), ((0, 0), (0, more)), ((0, slots), (0, more))
    return Packed(
        packed.phi,
        jnp.pad(packed.w_down, rows),
        jnp.pad(packed.b_down, across),
        jnp.pad(packed.w_up, rows),
        jnp.pad(packed.b_up, ((0, slots), (0, 0))),
    ), jnp.pad(own, both)


def _experts(plan: Plan, phi: Array, *experts: Array) -> tuple[Packed, Array]:
    slots = phi.shape[2]
    own = jnp.asarray(ownership(phi.shape[1], slots, experts[0].shape[2]))
    packed = pack(phi, *(each.astype(F32) for each in experts))
    return _wide(packed, own, plan)


def forward(
    plan: Plan,
    options: Options,
    x: Array,
    phi: Array,
    *experts: Array,
    mask: Array | None,
    keep: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and slots and scores if they are to be kept."""
    batch, tokens, dim = x.shape
    packed, own = _experts(plan, phi, *experts)
    flat, size = pieces.packed_phi(plan, phi, x.dtype), plan.padded
    fixed = [flat, packed.w_down, packed.b_down, packed.w_up, packed.b_up, own]
    whole = pieces.clip((tokens, dim))
    sums = (batch, plan.slots, dim)
    kept = [
        (pieces.shaped(sums), pieces.clip(sums[1:])),
        (pieces.shaped((batch, tokens, size)), pieces.clip((tokens, size))),
    ]
    out, *found = pieces.call(
        plan,
        options,
        _forward_kernel,
        [(x, whole), *((each, pieces.constant(each)) for each in fixed), *pieces.valid(plan, mask)],
        [(pieces.shaped(x.shape, x.dtype), whole), *(kept if keep else [])],
    )
    return out, tuple(found)


def backward(
    plan: Plan,
    options: Options,
    dout: Array,
    kept: tuple[Array, ...],
    x: Array,
    phi: Array,
    *experts: Array,
    mask: Array | None,
) -> tuple[Array, ...]:
    """Gradients of x, phi and the experts' weights."""
    real, scores = kept
    batch, tokens, dim = x.shape
    packed, own = _experts(plan, phi, *experts)
    slots = pieces.pad(plan, real)
    hidden = jnp.einsum("bsd,hd->bsh", slots, packed.w_down) + packed.b_down[None]
    outputs, pull = jax.vjp(apply, real.reshape(batch, *phi.shape[1:], dim), *experts)
    flat = pieces.packed_phi(plan, phi, x.dtype)
    answers = pieces.pad(plan, outputs.reshape(batch, plan.slots, dim).astype(x.dtype))
    clip = pieces.clip
    wide, whole = clip((plan.padded, dim)), clip((tokens, dim))
    sums = (batch, plan.slots, dim)
    dx, dphi, doutputs = pieces.call(
        plan,
        options,
        _backward_kernel,
        [
            (x, whole),
            (dout, whole),
            (flat, pieces.constant(flat)),
            (scores, clip((tokens, plan.padded))),
            (slots, wide),
            (answers, wide),
            (gelu(hidden)[1] * own[None], clip(own.shape)),
            (packed.w_down, pieces.constant(packed.w_down)),
            (packed.w_up, pieces.constant(packed.w_up)),
            *pieces.valid(plan, mask),
        ],
        [
            (pieces.shaped(x.shape, x.dtype), whole),
            (pieces.shaped(sums), clip(sums[1:])),
            (pieces.shaped(sums), clip(sums[1:])),
        ],
    )
    _, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    return dx, dphi.sum(axis=0).T.reshape(phi.shape), *dweights
