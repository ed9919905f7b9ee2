"""Short clips on NVIDIA GPUs: a program holds one clip, so that its tokens are read once.

One kernel per direction instead of two and the experts between them. Repeated reads of the tokens
hit the L1 cache (110 tokens are 169 kB in bfloat16). The equations are those of `xla.py`; the
experts are two products over all of them, as in `packing.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl
from aatjax_kernels.soft_moe.gpu_tiles import (
    GpuMixtureTiling,
    constant,
    load_tile,
    mask_argument,
    mask_tokens,
    per_clip,
    store_tile,
)
from aatjax_kernels.soft_moe.packing import (
    apply_experts,
    gelu_and_slope,
    make_ownership,
    pack,
)

MAX_TOKENS = {16: 160, 32: 128}
"""Tokens of a clip at most, by the padded slots: more do not fit 255 registers a thread."""

MIN_CLIPS = 64
"""With fewer clips half of an H100's 132 cores would be idle."""


def tile_short(tiling: GpuMixtureTiling) -> GpuMixtureTiling | None:
    """Return the tiling with one block of rows that holds a clip, or None where it does not pay."""
    if tiling.tokens > MAX_TOKENS.get(tiling.padded, 0) or tiling.batch < MIN_CLIPS:
        return None
    rows = pl.next_power_of_2(tiling.tokens)
    # These do not spill on an H100.
    chunk = min(tiling.chunk, 32 if rows > 128 or tiling.padded > 16 else 128)
    return tiling._replace(rows=rows, blocks=1, chunk=chunk, group=tiling.dim // chunk)


def _weights(tiling: GpuMixtureTiling, scores: Array, valid: Array) -> tuple[Array, Array]:
    """Return dispatch and combine weights of a clip, [tokens, slots]."""
    masked = jnp.where(valid[:, None], scores, LOW)
    raw = jnp.where(valid[:, None], jnp.exp(masked - jnp.max(masked, axis=0)[None]), 0.0)
    total = jnp.maximum(jnp.sum(raw, axis=0), 1e-30)
    return raw / total[None], tiling.compute_combine(scores, valid)


def normal_cdf(x: Array) -> Array:
    """Normal distribution function, within 2.1e-7 in float32: Triton has no erf.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    size = jnp.abs(x) * 0.5**0.5
    t = 1.0 / (1.0 + 0.3275911 * size)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series = functools.reduce(lambda total, term: (total + term) * t, terms, 0.0 * t)
    tail = 0.5 * series * jnp.exp(-size * size)
    return jnp.where(x < 0, tail, 1.0 - tail)


def _forward_kernel(tiling: GpuMixtureTiling, *refs: Any) -> None:
    x, phi, w_down, b_down, w_up, b_up, own = refs[:7]
    mask_ref = refs[7] if tiling.masked else None
    out, *kept = refs[7 + tiling.masked :]
    rows, inside = tiling.slice_block(0)
    scores, _ = tiling.compute_scores(x, phi, rows, inside)
    dispatch, combine = _weights(tiling, scores, mask_tokens(mask_ref, rows, inside))
    if kept:
        store_tile(kept[1], rows, slice(None), scores, inside)
    dispatch, combine = dispatch.astype(x.dtype), combine.astype(x.dtype)

    def gather(chunk: Any, before: Array) -> Array:
        columns = tiling.slice_chunk(chunk)
        slots = dot(dispatch, load_tile(x, rows, columns, inside), COLUMNS)
        if kept:
            tiling.store_slots(kept[0], columns, slots)
        return before + dot(slots, w_down[:, columns], LANES)

    hidden = tiling.over_chunks(gather, jnp.zeros(own.shape, F32)) + b_down[...]
    hidden = hidden * normal_cdf(hidden) * own[...]

    def scatter(chunk: Any, carry: Any) -> Any:
        columns = tiling.slice_chunk(chunk)
        outputs = (dot(hidden, w_up[:, columns]) + b_up[:, columns]).astype(x.dtype)
        store_tile(out, rows, columns, dot(combine, outputs).astype(out.dtype), inside)
        return carry

    tiling.over_chunks(scatter, 0)


def _backward_kernel(tiling: GpuMixtureTiling, *refs: Any) -> None:
    x, dout, phi, scores_ref, slots, outputs, slope, w_down, w_up = refs[:9]
    mask_ref = refs[9] if tiling.masked else None
    dx, dphi, doutputs_ref = refs[-3:]
    rows, inside = tiling.slice_block(0)
    scores = load_tile(scores_ref, rows, slice(None), inside)
    dispatch, combine = _weights(tiling, scores, mask_tokens(mask_ref, rows, inside))
    length = tiling.compute_lengths(x, rows, inside) if tiling.normalize else None
    small = combine.astype(x.dtype)

    def gather_outputs(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = tiling.slice_chunk(chunk)
        cotangent = load_tile(dout, rows, columns, inside)
        doutputs = dot(small, cotangent, COLUMNS)
        tiling.store_slots(doutputs_ref, columns, doutputs)
        dcombine = carry[0] + dot(cotangent, outputs[:, columns], LANES)
        return dcombine, carry[1] + dot(doutputs, w_up[:, columns], LANES)

    blank = jnp.zeros((tiling.rows, tiling.padded), F32)
    first = (blank, jnp.zeros(slope.shape, F32))
    dcombine, dhidden = tiling.over_chunks(gather_outputs, first)
    dhidden = dhidden * slope[...]

    def gather_slots(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = tiling.slice_chunk(chunk)
        dslots = dot(dhidden, w_down[:, columns])
        tokens = load_tile(x, rows, columns, inside)
        ddispatch = carry[0] + dot(tokens, dslots.astype(x.dtype), LANES)
        return ddispatch, carry[1] + jnp.sum(slots[:, columns] * dslots, axis=1)

    first = (blank, jnp.zeros((tiling.padded,), F32))
    ddispatch, delta = tiling.over_chunks(gather_slots, first)
    of_tokens = jnp.sum(combine * dcombine, axis=1)[:, None]
    dscores = combine * (dcombine - of_tokens) + dispatch * (ddispatch - delta[None])
    scaled = dscores if length is None else dscores * length[:, None]
    weights, slopes = dispatch.astype(x.dtype), scaled.astype(x.dtype)

    def finish(chunk: Any, carry: Any) -> Any:
        columns = tiling.slice_chunk(chunk)
        dslots = dot(dhidden, w_down[:, columns]).astype(x.dtype)
        value = dot(weights, dslots) + dot(slopes, phi[:, columns])
        tokens = load_tile(x, rows, columns, inside)
        if length is not None:
            inner = length * length * jnp.sum(dscores * scores, axis=1)
            value -= inner[:, None] * tokens.astype(F32)
        store_tile(dx, rows, columns, value.astype(dx.dtype), inside)
        tiling.store_slots(dphi, columns, dot(slopes, tokens, COLUMNS))
        return carry

    tiling.over_chunks(finish, 0)


def _pack_padded(
    tiling: GpuMixtureTiling, phi: Array, *experts: Array
) -> tuple[tuple[Array, ...], Array]:
    """Return packed expert weights and `own`, hidden units padded to a power of two."""
    own = make_ownership(phi.shape[1], phi.shape[2], experts[0].shape[2])
    _, w_down, b_down, w_up, b_up = pack(phi, *(each.astype(F32) for each in experts))
    units, slots = w_down.shape[0], tiling.padded - tiling.slots
    more = max(16, pl.next_power_of_2(units)) - units
    return (
        jnp.pad(w_down, ((0, more), (0, 0))),
        jnp.pad(b_down, ((0, 0), (0, more))),
        jnp.pad(w_up, ((0, more), (0, 0))),
        jnp.pad(b_up, ((0, slots), (0, 0))),
    ), jnp.pad(jnp.asarray(own), ((0, slots), (0, more)))


def forward(
    tiling: GpuMixtureTiling, options: KernelOptions, x: Array, phi: Array, *rest: Any, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output, and with `keep` slots and scores."""
    *experts, mask = rest
    batch, tokens, dim = x.shape
    packed, own = _pack_padded(tiling, phi, *experts)
    shared = (tiling.flatten_phi(phi, x.dtype), *packed, own)
    rows, kept = tiling.rows, []
    if keep:
        kept.append(((batch, tiling.slots, dim), F32, tiling.padded))
        kept.append(((batch, tokens, tiling.padded), F32, rows))
    out, *kept = tiling.call(
        options,
        _forward_kernel,
        [per_clip(x, rows=rows), *map(constant, shared), *mask_argument(mask, rows)],
        [
            per_clip(jax.ShapeDtypeStruct(x.shape, x.dtype), rows=rows),
            *(per_clip(jax.ShapeDtypeStruct(*each), rows=size) for *each, size in kept),
        ],
    )
    return out, tuple(kept)


def backward(
    tiling: GpuMixtureTiling,
    options: KernelOptions,
    dout: Array,
    kept: tuple[Array, ...],
    x: Array,
    phi: Array,
    *rest: Any,
) -> tuple[Array, ...]:
    """Return the gradients of x, phi and the experts' weights."""
    *experts, mask = rest
    real, scores = kept
    batch, _, dim = x.shape
    (w_down, b_down, w_up, _), own = _pack_padded(tiling, phi, *experts)
    slots = tiling.pad_slots(real)
    hidden = jnp.einsum("bsd,hd->bsh", slots, w_down) + b_down[None]
    outputs, pull = jax.vjp(apply_experts, real.reshape(batch, *phi.shape[1:], dim), *experts)
    answers = outputs.reshape(batch, tiling.slots, dim).astype(x.dtype)
    slope = gelu_and_slope(hidden)[1] * own[None]
    sums = per_clip(jax.ShapeDtypeStruct((batch, tiling.slots, dim), F32), rows=tiling.padded)
    by_slot = (slots, tiling.pad_slots(answers), slope)
    dx, dphi, doutputs = tiling.call(
        options,
        _backward_kernel,
        [
            *(per_clip(each, rows=tiling.rows) for each in (x, dout)),
            constant(tiling.flatten_phi(phi, x.dtype)),
            per_clip(scores, rows=tiling.rows),
            *map(per_clip, by_slot),
            *map(constant, (w_down, w_up)),
            *mask_argument(mask, tiling.rows),
        ],
        [per_clip(jax.ShapeDtypeStruct(x.shape, x.dtype), rows=tiling.rows), sums, sums],
    )
    _, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    return dx, dphi.sum(axis=0).T.reshape(phi.shape), *dweights
