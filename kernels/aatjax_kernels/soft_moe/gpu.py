"""Soft mixture of bottleneck adapters for NVIDIA GPUs, Ampere and newer (Pallas, Triton).

Two passes over blocks of tokens in each direction, with the little that concerns slots alone
between them in plain jnp:

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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from aatjax_kernels.product import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.soft_moe.packed import Options
from aatjax_kernels.soft_moe.reference import NORM_EPS
from aatjax_kernels.soft_moe.reference import experts as apply

KEPT_SLOTS = 32
UNROLLED = 3
"""Chunks of the width that a program goes through without a loop."""

PROGRAMS = 132
"""Programs that a pass is split into, if there are tokens enough: one a core of an H100.

Each leaves sums of the size of the slots behind, so that more of them cost more than they win.
"""


class Plan(NamedTuple):
    """How a shape is cut.

    Attributes:
        batch, tokens, dim, slots: the shape.
        padded: slots rounded up to a power of two.
        chunk: columns of the width at a time.
        group: chunks that one program sums.
        rows: tokens a block.
        blocks: blocks of tokens that one program goes through.
        normalize, masked: the form of the op.
    """

    batch: int
    tokens: int
    dim: int
    slots: int
    padded: int
    chunk: int
    group: int
    rows: int
    blocks: int
    normalize: bool
    masked: bool

    @property
    def splits(self) -> int:
        """Programs along the tokens."""
        return pl.cdiv(self.tokens, self.rows * self.blocks)

    @property
    def groups(self) -> int:
        """Programs along the width."""
        return self.dim // (self.chunk * self.group)

    @property
    def answering(self) -> "Plan":
        """The plan of the answer: with 32 slots 16 rows are too few for 8 warps, which spill."""
        if self.padded != 32:
            return self
        return self._replace(rows=2 * self.rows, blocks=pl.cdiv(self.blocks, 2))

    @property
    def keep(self) -> bool:
        """The scores are kept."""
        return self.slots <= KEPT_SLOTS


def refuses(x: Array, phi: Array, width: int) -> str | None:
    """What of a shape the kernels do not take, or None."""
    if x.shape[2] % 16:
        return f"a width of {x.shape[2]}, which is not a multiple of 16"
    return None


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
        batch, tokens, dim, slots, padded, chunk, group, rows, pl.cdiv(blocks, splits),
        options.normalize, mask is not None,
    )  # fmt: skip


# Pieces of the kernels.


def _load(ref: Any, rows: Any, columns: Any, inside: Array) -> Array:
    return triton.load(ref.at[rows, columns], mask=inside[:, None], other=0.0)


def _columns(plan: Plan, chunk: Any) -> Any:
    return pl.ds(chunk * plan.chunk, plan.chunk)


def _over_chunks(plan: Plan, step: Any, first: Any) -> Any:
    """Goes through the width; many chunks in a loop, whose loads do not fill the registers."""
    count = plan.dim // plan.chunk
    if count > UNROLLED:
        return lax.fori_loop(0, count, step, first)
    return functools.reduce(lambda carry, chunk: step(chunk, carry), range(count), first)


def _inside(plan: Plan, block: Any) -> tuple[Any, Array]:
    """The rows of a block of tokens, and which of them are tokens."""
    start = block * plan.rows
    return pl.ds(start, plan.rows), start + jnp.arange(plan.rows) < plan.tokens


def _score(plan: Plan, x: Any, phi: Any, rows: Any, inside: Array) -> tuple[Array, Array | None]:
    """Scores of a block, [tokens, slots], and the tokens' reciprocal lengths."""

    def step(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, square = carry
        tokens = _load(x, rows, _columns(plan, chunk), inside)
        if plan.normalize:
            square += jnp.sum(tokens.astype(F32) * tokens.astype(F32), axis=1)
        return scores + dot(tokens, phi[:, _columns(plan, chunk)], LANES), square

    first = (jnp.zeros((plan.rows, plan.padded), F32), jnp.zeros((plan.rows,), F32))
    scores, square = _over_chunks(plan, step, first)
    if not plan.normalize:
        return scores, None
    length = lax.rsqrt(square + NORM_EPS)
    return scores * length[:, None], length


def _lengths(plan: Plan, x: Any, rows: Any, inside: Array) -> Array:
    def step(chunk: Any, square: Array) -> Array:
        tokens = _load(x, rows, _columns(plan, chunk), inside).astype(F32)
        return square + jnp.sum(tokens * tokens, axis=1)

    square = _over_chunks(plan, step, jnp.zeros((plan.rows,), F32))
    return lax.rsqrt(square + NORM_EPS)


def _put(plan: Plan, ref: Any, columns: Any, sums: Array) -> None:
    """Writes sums of the real slots."""
    real = jnp.arange(plan.padded) < plan.slots
    triton.store(ref.at[pl.ds(0, plan.padded), columns], sums, mask=real[:, None])


def _seen(valid: Any, rows: Any, inside: Array) -> Array:
    """Which rows are tokens that take part."""
    if valid is None:
        return inside
    return inside & (triton.load(valid.at[rows], mask=inside, other=0.0) > 0)


def _read(plan: Plan, scores: Array, seen: Array) -> Array:
    """Combine weights [tokens, slots]: zero for padded slots and tokens that are not seen."""
    real = jnp.arange(plan.padded) < plan.slots
    scores = jnp.where(real[None], scores, LOW)
    raw = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return jnp.where(seen[:, None], raw / jnp.sum(raw, axis=1)[:, None], 0.0)


def _place(plan: Plan) -> tuple[Any, Any]:
    """The first block of tokens and the first chunk of the width that this program works on."""
    return pl.program_id(1) * plan.blocks, pl.program_id(2) * plan.group


def _gather(plan: Plan, x: Any, phi: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    peak_ref, total_ref, mean_ref, *kept = refs[plan.masked :]

    def step(index: Any, carry: Any) -> Any:
        peak, total, means = carry
        rows, inside = _inside(plan, block + index)
        scores, _ = _score(plan, x, phi, rows, inside)
        if kept:
            triton.store(kept[0].at[rows, :], scores, mask=inside[:, None])
        seen = _seen(valid, rows, inside)
        scores = jnp.where(seen[:, None], scores, LOW)
        higher = jnp.maximum(peak, jnp.max(scores, axis=0))
        shrink = jnp.exp(peak - higher)
        raw = jnp.where(seen[:, None], jnp.exp(scores - higher[None]), 0.0)
        total = total * shrink + jnp.sum(raw, axis=0)
        means = tuple(
            mean * shrink[:, None]
            + dot(
                raw.astype(x.dtype),
                _load(x, rows, _columns(plan, first_chunk + own), inside),
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
        _put(plan, mean_ref, _columns(plan, first_chunk + own), mean)


def _scores_of(plan: Plan, source: Any, phi: Any, rows: Any, inside: Array) -> Array:
    """Scores of a block: those that were kept, or from the tokens."""
    if plan.keep:
        return triton.load(source.at[rows, :], mask=inside[:, None], other=0.0)
    return _score(plan, source, phi, rows, inside)[0]


def _answer(plan: Plan, source: Any, phi: Any, outputs: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    out = refs[-1]

    def step(index: Any, carry: Any) -> Any:
        rows, inside = _inside(plan, block + index)
        scores = _scores_of(plan, source, phi, rows, inside)
        read = _read(plan, scores, _seen(valid, rows, inside)).astype(outputs.dtype)
        for own in range(plan.group):
            columns = _columns(plan, first_chunk + own)
            value = dot(read, outputs[:, columns]).astype(out.dtype)
            triton.store(out.at[rows, columns], value, mask=inside[:, None])
        return carry

    lax.fori_loop(0, plan.blocks, step, 0)


def _gather_back(plan: Plan, source: Any, phi: Any, dout: Any, *refs: Any) -> None:
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    sum_ref = refs[-1]

    def step(index: Any, sums: Any) -> Any:
        rows, inside = _inside(plan, block + index)
        scores = _scores_of(plan, source, phi, rows, inside)
        read = _read(plan, scores, _seen(valid, rows, inside)).astype(dout.dtype)
        return tuple(
            total + dot(read, _load(dout, rows, _columns(plan, first_chunk + own), inside), COLUMNS)
            for own, total in enumerate(sums)
        )

    first = tuple(jnp.zeros((plan.padded, plan.chunk), F32) for _ in range(plan.group))
    for own, total in enumerate(lax.fori_loop(0, plan.blocks, step, first)):
        _put(plan, sum_ref, _columns(plan, first_chunk + own), total)


def _answer_back(
    plan: Plan, x: Any, dout: Any, phi: Any, outputs: Any, dslots: Any, peak: Any, total: Any,
    delta: Any, *refs: Any,
) -> None:  # fmt: skip
    block, first_chunk = _place(plan)
    valid = refs[0] if plan.masked else None
    kept = refs[plan.masked] if plan.keep else None
    dx, dphi = refs[-2:]

    def step(index: Any, sums: Any) -> Any:
        rows, inside = _inside(plan, block + index)
        seen = _seen(valid, rows, inside)
        length = None
        if kept is None:
            scores, length = _score(plan, x, phi, rows, inside)
        else:
            scores = _scores_of(plan, kept, phi, rows, inside)
            if plan.normalize:
                length = _lengths(plan, x, rows, inside)
        read = _read(plan, scores, seen)
        sent = jnp.exp(jnp.where(seen[:, None], scores, LOW) - peak[...][None])
        sent = jnp.where(seen[:, None], sent / total[...][None], 0.0)

        def compare(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            columns = _columns(plan, chunk)
            dread = dot(_load(dout, rows, columns, inside), outputs[:, columns], LANES)
            dsent = dot(_load(x, rows, columns, inside), dslots[:, columns], LANES)
            return carry[0] + dread, carry[1] + dsent

        blank = jnp.zeros((plan.rows, plan.padded), F32)
        dread, dsent = _over_chunks(plan, compare, (blank, blank))
        of_tokens = jnp.sum(read * dread, axis=1)[:, None]
        dscores = read * (dread - of_tokens) + sent * (dsent - delta[...][None])
        scaled = dscores if length is None else dscores * length[:, None]
        # 16-bit once, for the products below.
        weights, slopes = sent.astype(x.dtype), scaled.astype(x.dtype)
        found = []
        for own, before in enumerate(sums):
            columns = _columns(plan, first_chunk + own)
            value = dot(weights, dslots[:, columns]) + dot(slopes, phi[:, columns])
            tokens = _load(x, rows, columns, inside)
            if length is not None:
                along = length * length * jnp.sum(dscores * scores, axis=1)
                value -= along[:, None] * tokens.astype(F32)
            triton.store(dx.at[rows, columns], value.astype(dx.dtype), mask=inside[:, None])
            found.append(before + dot(slopes, tokens, COLUMNS))
        return tuple(found)

    first = tuple(jnp.zeros((plan.padded, plan.chunk), F32) for _ in range(plan.group))
    for own, value in enumerate(lax.fori_loop(0, plan.blocks, step, first)):
        _put(plan, dphi, _columns(plan, first_chunk + own), value)


# The calls.


def _clip(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One clip's part of an array [b, ...]."""
    return pl.BlockSpec((None, *shape), lambda b, k, g: (b, *(0 for _ in shape)))


def _partial(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One program's part of sums [b, splits, ...]."""
    return pl.BlockSpec((None, None, *shape), lambda b, k, g: (b, k, *(0 for _ in shape)))


def _constant(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda b, k, g: (0,) * array.ndim)


def _call(plan: Plan, options: Options, kernel: Any, arrays: Any, outputs: Any) -> Any:
    """Runs a kernel on (array, spec) pairs, for (shape, spec) outputs."""
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.batch, plan.splits, plan.groups),
        in_specs=[spec for _, spec in arrays],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=triton.CompilerParams(
            num_warps=8, num_stages=2 if plan.padded == 16 else 1
        ),
        interpret=options.interpret,
    )(*(array for array, _ in arrays))


def _packed_phi(plan: Plan, phi: Array, dtype: Any) -> Array:
    """Phi as [padded slots, d]."""
    flat = phi.reshape(plan.dim, -1).T.astype(dtype)
    return jnp.pad(flat, ((0, plan.padded - plan.slots), (0, 0)))


def _pad(plan: Plan, values: Array, fill: float = 0.0) -> Array:
    """Per-slot values [b, s, ...] with the slots padded."""
    more = [(0, 0)] * values.ndim
    more[1] = (0, plan.padded - plan.slots)
    return jnp.pad(values, more, constant_values=fill)


def _valid(plan: Plan, mask: Array | None) -> list[Any]:
    return [] if mask is None else [(mask.astype(F32), _clip((plan.tokens,)))]


def _shaped(shape: tuple[int, ...], dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(
    options: Options, x: Array, phi: Array, *experts: Array, mask: Array | None, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs beside the arguments."""
    plan = plan_of(options, x, phi, mask)
    batch, tokens, dim = x.shape
    flat, valid, size = _packed_phi(plan, phi, x.dtype), _valid(plan, mask), plan.padded
    whole, per_slot = (x, _clip((tokens, dim))), (batch, plan.splits, size)
    sums = (batch, plan.splits, plan.slots, dim)
    kept = [(_shaped((batch, tokens, size)), _clip((tokens, size)))] if plan.keep else []
    peak, total, mean, *scores = _call(
        plan, options, _gather, [whole, (flat, _constant(flat)), *valid],
        [
            (_shaped(per_slot), _partial((size,))), (_shaped(per_slot), _partial((size,))),
            (_shaped(sums), _partial(sums[2:])), *kept,
        ],
    )  # fmt: skip
    # One softmax of what the splits found.
    highest = jnp.max(peak, axis=1)
    share = jnp.exp(peak - highest[:, None])
    total = jnp.maximum(jnp.sum(total * share, axis=1), 1e-30)[:, : plan.slots]
    slots = jnp.sum(share[..., : plan.slots, None] * mean, axis=1) / total[..., None]
    outputs = apply(slots.reshape(batch, *phi.shape[1:], dim), *experts).reshape(slots.shape)
    source = (scores[0], _clip((tokens, size))) if plan.keep else whole
    answers = _pad(plan, outputs.astype(x.dtype))
    (out,) = _call(
        plan.answering, options, _answer,
        [source, (flat, _constant(flat)), (answers, _clip((size, dim))), *valid],
        [(_shaped(x.shape, x.dtype), _clip((tokens, dim)))],
    )  # fmt: skip
    return out, (slots, highest[:, : plan.slots], total, *scores) if keep else ()


def backward(
    options: Options, dout: Array, kept: tuple[Array, ...], x: Array, phi: Array, *experts: Array,
    mask: Array | None,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradients of x, phi and the experts' weights."""
    plan = plan_of(options, x, phi, mask)
    slots, peak, total, *scores = kept
    batch, tokens, dim = x.shape
    flat, valid, size = _packed_phi(plan, phi, x.dtype), _valid(plan, mask), plan.padded
    whole, score = _clip((tokens, dim)), _clip((tokens, size))
    fixed, sums = (flat, _constant(flat)), (batch, plan.splits, plan.slots, dim)
    saved = [(each, score) for each in scores]
    source = saved[0] if plan.keep else (x, whole)
    outputs, pull = jax.vjp(apply, slots.reshape(batch, *phi.shape[1:], dim), *experts)
    (doutputs,) = _call(
        plan, options, _gather_back, [source, fixed, (dout, whole), *valid],
        [(_shaped(sums), _partial(sums[2:]))],
    )  # fmt: skip
    doutputs = doutputs.sum(axis=1)
    dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    delta = jnp.sum(slots * dslots, axis=2)
    wide, narrow = _clip((size, dim)), _clip((size,))
    dx, dphi = _call(
        plan, options, _answer_back,
        [
            (x, whole), (dout, whole), fixed,
            (_pad(plan, outputs.reshape(slots.shape).astype(x.dtype)), wide),
            (_pad(plan, dslots.astype(x.dtype)), wide),
            (_pad(plan, peak), narrow), (_pad(plan, total, 1.0), narrow),
            (_pad(plan, delta), narrow), *valid, *saved,
        ],
        [(_shaped(x.shape, x.dtype), whole), (_shaped(sums), _partial(sums[2:]))],
    )  # fmt: skip
    dphi = dphi.sum(axis=(0, 1)).T.reshape(phi.shape)
    return dx, dphi, *dweights
