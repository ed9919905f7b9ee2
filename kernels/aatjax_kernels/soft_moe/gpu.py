"""Soft mixture of bottleneck adapters for NVIDIA GPUs, Ampere and newer (Pallas, Triton).

Short clips go whole, one a program (`gpu_whole.py`). Others take two passes over blocks of tokens
in each direction, with the little that concerns slots alone between them in plain jnp:

    gather       scores, an online softmax over the tokens, slots     reads x
    answer       softmax over the slots, output                       writes y
    gather_back  gradients of the slots' outputs                      reads dout
    answer_back  gradients of tokens and phi                          reads x, dout, writes dx

Up to 32 slots the scores are kept between the passes (s/n of 2N in bfloat16): 2N bytes forward, 4N
backward, N one activation tensor. With more they are computed again from x, 3N and 5N; a program
then holds one chunk of the width only, so that its sums stay in registers.

Triton and not Mosaic GPU, whose `plgpu.kernel` needs Hopper: this runs on Ampere and Hopper, under
jax 0.10 to 0.12, where it is deprecated. Slots are padded to a power of two, at least 16.

The equations are those of `xla.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.soft_moe import gpu_short
from aatjax_kernels.soft_moe import gpu_tiles as pieces
from aatjax_kernels.soft_moe.gpu_tiles import KEPT_SLOTS, Plan
from aatjax_kernels.soft_moe.packing import Options
from aatjax_kernels.soft_moe.reference import experts as apply

PROGRAMS = 132
"""Programs that a pass is split into, if there are tokens enough: one a core of an H100.

Each leaves sums of the size of the slots behind, so that more of them cost more than they win.
"""


def refuses(x: Array, phi: Array, width: int) -> str | None:
    """What of a shape the kernels do not take, or None."""
    if x.shape[2] % 16:
        return f"a width of {x.shape[2]}, which is not a multiple of 16"
    return triton.missing()


def plan_of(options: Options, x: Array, phi: Array, mask: Array | None) -> Plan:
    """Chooses chunks and splits."""
    batch, tokens, dim = x.shape
    slots = phi.shape[1] * phi.shape[2]
    padded = max(16, pl.next_power_of_2(slots))
    chunk = dim & -dim  # the largest power of two that divides it
    chunk = min(chunk, 256 if padded == 16 else 128 if padded == 32 else 32)
    group = dim // chunk if slots <= KEPT_SLOTS else 1
    # What a program holds must fit 255 registers a thread: no spills on an H100 so.
    rows = 32 if padded == 16 else 16
    blocks = pl.cdiv(tokens, rows)
    splits = min(blocks, max(1, PROGRAMS // (batch * (dim // (chunk * group)))))
    return Plan(
        batch,
        tokens,
        dim,
        slots,
        padded,
        chunk,
        group,
        rows,
        pl.cdiv(blocks, splits),
        options.normalize,
        mask is not None,
    )


def _place(plan: Plan) -> tuple[Any, Any]:
    """The first block of tokens and the first chunk of the width that this program works on."""
    return pl.program_id(1) * plan.blocks, pl.program_id(2) * plan.group


def _gather(plan: Plan, x: Any, phi: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    peak_ref, total_ref, mean_ref, *kept = refs[plan.masked :]

    def step(index: Any, carry: Any) -> Any:
        peak, total, means = carry
        rows, inside = pieces.inside(plan, block + index)
        scores, _ = pieces.score(plan, x, phi, rows, inside)
        if kept:
            triton.store(kept[0].at[rows, :], scores, mask=inside[:, None])
        seen = pieces.seen(valid, rows, inside)
        scores = jnp.where(seen[:, None], scores, LOW)
        higher = jnp.maximum(peak, jnp.max(scores, axis=0))
        shrink = jnp.exp(peak - higher)
        raw = jnp.where(seen[:, None], jnp.exp(scores - higher[None]), 0.0)
        total = total * shrink + jnp.sum(raw, axis=0)
        means = tuple(
            mean * shrink[:, None]
            + dot(
                raw.astype(x.dtype),
                pieces.load(x, rows, pieces.columns(plan, first_chunk + own), inside),
                COLUMNS,
            )
            for own, mean in enumerate(means)
        )
        return higher, total, means

    first = (
        jnp.full((plan.padded,), LOW, F32),
        jnp.zeros((plan.padded,), F32),
        tuple(jnp.zeros((plan.padded, plan.chunk), F32) for _ in range(plan.group)),
    )
    peak, total, means = lax.fori_loop(0, plan.blocks, step, first)
    peak_ref[...] = peak
    total_ref[...] = total
    for own, mean in enumerate(means):
        pieces.put(plan, mean_ref, pieces.columns(plan, first_chunk + own), mean)


def _scores_of(plan: Plan, source: Any, phi: Any, rows: Any, inside: Array) -> Array:
    """Scores of a block: those that were kept, or from the tokens."""
    if plan.keep:
        return triton.load(source.at[rows, :], mask=inside[:, None], other=0.0)
    return pieces.score(plan, source, phi, rows, inside)[0]


def _answer(plan: Plan, source: Any, phi: Any, outputs: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    out = refs[-1]

    def step(index: Any, carry: Any) -> Any:
        rows, inside = pieces.inside(plan, block + index)
        scores = _scores_of(plan, source, phi, rows, inside)
        read = pieces.read(plan, scores, pieces.seen(valid, rows, inside)).astype(outputs.dtype)
        for own in range(plan.group):
            columns = pieces.columns(plan, first_chunk + own)
            value = dot(read, outputs[:, columns]).astype(out.dtype)
            triton.store(out.at[rows, columns], value, mask=inside[:, None])
        return carry

    lax.fori_loop(0, plan.blocks, step, 0)


def _gather_back(plan: Plan, source: Any, phi: Any, dout: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    sum_ref = refs[-1]

    def step(index: Any, sums: Any) -> Any:
        rows, inside = pieces.inside(plan, block + index)
        scores = _scores_of(plan, source, phi, rows, inside)
        read = pieces.read(plan, scores, pieces.seen(valid, rows, inside)).astype(dout.dtype)
        return tuple(
            total
            + dot(
                read,
                pieces.load(dout, rows, pieces.columns(plan, first_chunk + own), inside),
                COLUMNS,
            )
            for own, total in enumerate(sums)
        )

    first = tuple(jnp.zeros((plan.padded, plan.chunk), F32) for _ in range(plan.group))
    for own, total in enumerate(lax.fori_loop(0, plan.blocks, step, first)):
        pieces.put(plan, sum_ref, pieces.columns(plan, first_chunk + own), total)


def _answer_back(
    plan: Plan,
    x: Any,
    dout: Any,
    phi: Any,
    outputs: Any,
    dslots: Any,
    peak: Any,
    total: Any,
    delta: Any,
    *refs: Any,
) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    kept = refs[plan.masked] if plan.keep else None
    dx, dphi = refs[-2:]

    def step(index: Any, sums: Any) -> Any:
        rows, inside = pieces.inside(plan, block + index)
        seen = pieces.seen(valid, rows, inside)
        length = None
        if kept is None:
            scores, length = pieces.score(plan, x, phi, rows, inside)
        else:
            scores = _scores_of(plan, kept, phi, rows, inside)
            if plan.normalize:
                length = pieces.lengths(plan, x, rows, inside)
        read = pieces.read(plan, scores, seen)
        sent = jnp.exp(jnp.where(seen[:, None], scores, LOW) - peak[...][None])
        sent = jnp.where(seen[:, None], sent / total[...][None], 0.0)

        def compare(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            columns = pieces.columns(plan, chunk)
            dread = dot(pieces.load(dout, rows, columns, inside), outputs[:, columns], LANES)
            dsent = dot(pieces.load(x, rows, columns, inside), dslots[:, columns], LANES)
            return carry[0] + dread, carry[1] + dsent

        blank = jnp.zeros((plan.rows, plan.padded), F32)
        dread, dsent = pieces.over_chunks(plan, compare, (blank, blank))
        of_tokens = jnp.sum(read * dread, axis=1)[:, None]
        dscores = read * (dread - of_tokens) + sent * (dsent - delta[...][None])
        scaled = dscores if length is None else dscores * length[:, None]
        # 16-bit once, for the products below.
        weights, slopes = sent.astype(x.dtype), scaled.astype(x.dtype)
        found = []
        for own, before in enumerate(sums):
            columns = pieces.columns(plan, first_chunk + own)
            value = dot(weights, dslots[:, columns]) + dot(slopes, phi[:, columns])
            tokens = pieces.load(x, rows, columns, inside)
            if length is not None:
                along = length * length * jnp.sum(dscores * scores, axis=1)
                value -= along[:, None] * tokens.astype(F32)
            triton.store(dx.at[rows, columns], value.astype(dx.dtype), mask=inside[:, None])
            found.append(before + dot(slopes, tokens, COLUMNS))
        return tuple(found)

    first = tuple(jnp.zeros((plan.padded, plan.chunk), F32) for _ in range(plan.group))
    for own, value in enumerate(lax.fori_loop(0, plan.blocks, step, first)):
        pieces.put(plan, dphi, pieces.columns(plan, first_chunk + own), value)


def _partial(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One program's part of sums [b, splits, ...]."""
    return pl.BlockSpec((None, None, *shape), lambda b, k, g: (b, k, *(0 for _ in shape)))


def forward(
    options: Options, x: Array, phi: Array, *experts: Array, mask: Array | None, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs beside the arguments."""
    plan = plan_of(options, x, phi, mask)
    short = gpu_short.plan_of(plan)
    if short is not None:
        return gpu_short.forward(short, options, x, phi, *experts, mask=mask, keep=keep)
    batch, tokens, dim = x.shape
    flat, valid, size = pieces.packed_phi(plan, phi, x.dtype), pieces.valid(plan, mask), plan.padded
    whole, per_slot = (x, pieces.clip((tokens, dim))), (batch, plan.splits, size)
    sums = (batch, plan.splits, plan.slots, dim)
    kept = (
        [(pieces.shaped((batch, tokens, size)), pieces.clip((tokens, size)))] if plan.keep else []
    )
    peak, total, mean, *scores = pieces.call(
        plan,
        options,
        _gather,
        [whole, (flat, pieces.constant(flat)), *valid],
        [
            *[(pieces.shaped(per_slot), _partial((size,)))] * 2,
            (pieces.shaped(sums), _partial(sums[2:])),
            *kept,
        ],
    )
    # One softmax of what the splits found.
    highest = jnp.max(peak, axis=1)
    share = jnp.exp(peak - highest[:, None])
    total = jnp.maximum(jnp.sum(total * share, axis=1), 1e-30)[:, : plan.slots]
    slots = jnp.sum(share[..., : plan.slots, None] * mean, axis=1) / total[..., None]
    outputs = apply(slots.reshape(batch, *phi.shape[1:], dim), *experts).reshape(slots.shape)
    source = (scores[0], pieces.clip((tokens, size))) if plan.keep else whole
    answers = pieces.pad(plan, outputs.astype(x.dtype))
    (out,) = pieces.call(
        plan.answering,
        options,
        _answer,
        [source, (flat, pieces.constant(flat)), (answers, pieces.clip((size, dim))), *valid],
        [(pieces.shaped(x.shape, x.dtype), pieces.clip((tokens, dim)))],
    )
    return out, (slots, highest[:, : plan.slots], total, *scores) if keep else ()


def backward(
    options: Options,
    dout: Array,
    kept: tuple[Array, ...],
    x: Array,
    phi: Array,
    *experts: Array,
    mask: Array | None,
) -> tuple[Array, ...]:
    """Gradients of x, phi and the experts' weights."""
    plan = plan_of(options, x, phi, mask)
    short = gpu_short.plan_of(plan)
    if short is not None:
        return gpu_short.backward(short, options, dout, kept, x, phi, *experts, mask=mask)
    slots, peak, total, *scores = kept
    batch, tokens, dim = x.shape
    flat, valid, size = pieces.packed_phi(plan, phi, x.dtype), pieces.valid(plan, mask), plan.padded
    whole, score = pieces.clip((tokens, dim)), pieces.clip((tokens, size))
    fixed, sums = (flat, pieces.constant(flat)), (batch, plan.splits, plan.slots, dim)
    saved = [(each, score) for each in scores]
    source = saved[0] if plan.keep else (x, whole)
    outputs, pull = jax.vjp(apply, slots.reshape(batch, *phi.shape[1:], dim), *experts)
    (doutputs,) = pieces.call(
        plan,
        options,
        _gather_back,
        [source, fixed, (dout, whole), *valid],
        [(pieces.shaped(sums), _partial(sums[2:]))],
    )
    doutputs = doutputs.sum(axis=1)
    dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    delta = jnp.sum(slots * dslots, axis=2)
    wide, narrow = pieces.clip((size, dim)), pieces.clip((size,))
    dx, dphi = pieces.call(
        plan,
        options,
        _answer_back,
        [
            (x, whole),
            (dout, whole),
            fixed,
            (pieces.pad(plan, outputs.reshape(slots.shape).astype(x.dtype)), wide),
            (pieces.pad(plan, dslots.astype(x.dtype)), wide),
            (pieces.pad(plan, peak), narrow),
            (pieces.pad(plan, total, 1.0), narrow),
            (pieces.pad(plan, delta), narrow),
            *valid,
            *saved,
        ],
        [(pieces.shaped(x.shape, x.dtype), whole), (pieces.shaped(sums), _partial(sums[2:]))],
    )
    dphi = dphi.sum(axis=(0, 1)).T.reshape(phi.shape)
    return dx, dphi, *dweights
