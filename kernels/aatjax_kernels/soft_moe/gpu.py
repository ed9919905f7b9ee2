"""Soft mixture of bottleneck adapters for NVIDIA GPUs, Ampere and newer (Pallas, Triton).

A program computes a whole short clip (`gpu_short.py`). Longer clips take two passes over blocks of
tokens in each direction; what concerns slots alone stands between them in plain jnp:

    gather       scores, an online softmax over the tokens, slots     reads x
    answer       softmax over the slots, output                       writes y
    gather_back  gradients of the slots' outputs                      reads dout
    answer_back  gradients of tokens and phi                          reads x, dout, writes dx

Up to 32 slots the scores are kept between the passes (s/n of 2N in bfloat16): 2N bytes forward, 4N
backward, N one activation tensor. With more they are recomputed from x, 3N and 5N; a program then
holds one chunk of the width, so that its sums stay in registers.

Triton, not Mosaic GPU, whose `plgpu.kernel` needs Hopper: this runs on Ampere and Hopper, under jax
0.10 to 0.12, where it is deprecated. Slots are padded to a power of two, at least 16.

The equations are those of `xla.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl
from aatjax_kernels.soft_moe import gpu_short
from aatjax_kernels.soft_moe.gpu_tiles import (
    KEPT_SLOTS,
    GpuMixtureTiling,
    constant,
    load_tile,
    mask_argument,
    mask_tokens,
    per_clip,
    store_tile,
)
from aatjax_kernels.soft_moe.packing import apply_experts

PROGRAMS = 132
"""Programs that a pass is split into, if there are tokens enough: one per core of an H100.

Each writes sums of the size of the slots, so that more of them cost more than they save.
"""


def tile(options: KernelOptions, x: Any, phi: Any, *rest: Any) -> GpuMixtureTiling | str:
    """Return the tiling of a shape; see `Backend`."""
    batch, tokens, dim = x.shape
    if dim % 16:
        return f"a width of {dim}, which is not a multiple of 16"
    missing = triton.explain_missing()
    if missing:
        return missing
    slots = phi.shape[1] * phi.shape[2]
    padded = max(16, pl.next_power_of_2(slots))
    chunk = dim & -dim  # the largest power of two that divides it
    chunk = min(chunk, 256 if padded == 16 else 128 if padded == 32 else 32)
    group = dim // chunk if slots <= KEPT_SLOTS else 1
    # A program has 255 registers a thread: these do not spill on an H100.
    rows = 32 if padded == 16 else 16
    blocks = pl.cdiv(tokens, rows)
    splits = min(blocks, max(1, PROGRAMS // (batch * (dim // (chunk * group)))))
    shape = (batch, tokens, dim, slots, padded, chunk, group, rows, pl.cdiv(blocks, splits))
    return GpuMixtureTiling(*shape, normalize=options.normalize, masked=rest[-1] is not None)


def _place(tiling: GpuMixtureTiling) -> tuple[Any, Any]:
    """Return the first block of tokens and the first chunk of the width of this program."""
    return pl.program_id(1) * tiling.blocks, pl.program_id(2) * tiling.group


def _sums(tiling: GpuMixtureTiling) -> tuple[Array, ...]:
    """Return blank sums over the tokens, [slots, chunk] for each chunk."""
    return tuple(jnp.zeros((tiling.padded, tiling.chunk), F32) for _ in range(tiling.group))


def _gather(tiling: GpuMixtureTiling, x: Any, phi: Any, *refs: Any) -> None:
    block, chunk = _place(tiling)
    mask_ref = refs[0] if tiling.masked else None
    peak_ref, total_ref, mean_ref, *kept = refs[tiling.masked :]

    def step(index: Any, carry: Any) -> Any:
        peak, total, means = carry
        rows, inside = tiling.slice_block(block + index)
        scores, _ = tiling.compute_scores(x, phi, rows, inside)
        if kept:
            store_tile(kept[0], rows, slice(None), scores, inside)
        valid = mask_tokens(mask_ref, rows, inside)
        scores = jnp.where(valid[:, None], scores, LOW)
        higher = jnp.maximum(peak, jnp.max(scores, axis=0))
        shrink = jnp.exp(peak - higher)
        raw = jnp.where(valid[:, None], jnp.exp(scores - higher[None]), 0.0)
        total = total * shrink + jnp.sum(raw, axis=0)

        def load(own: int) -> Array:
            return load_tile(x, rows, tiling.slice_chunk(chunk + own), inside)

        means = tuple(
            mean * shrink[:, None] + dot(raw.astype(x.dtype), load(own), COLUMNS)
            for own, mean in enumerate(means)
        )
        return higher, total, means

    first = (jnp.full((tiling.padded,), LOW, F32), jnp.zeros((tiling.padded,), F32), _sums(tiling))
    peak, total, means = lax.fori_loop(0, tiling.blocks, step, first)
    peak_ref[...] = peak
    total_ref[...] = total
    for own, mean in enumerate(means):
        tiling.store_slots(mean_ref, tiling.slice_chunk(chunk + own), mean)


def _read_combine(
    tiling: GpuMixtureTiling, source: Any, phi: Any, mask_ref: Any, block: Any, dtype: Any
) -> tuple[Any, Array, Array]:
    """Return rows, mask and combine weights of a block, its scores kept or recomputed."""
    rows, inside = tiling.slice_block(block)
    if tiling.keep:
        scores = load_tile(source, rows, slice(None), inside)
    else:
        scores, _ = tiling.compute_scores(source, phi, rows, inside)
    valid = mask_tokens(mask_ref, rows, inside)
    return rows, inside, tiling.compute_combine(scores, valid).astype(dtype)


def _answer(tiling: GpuMixtureTiling, source: Any, phi: Any, outputs: Any, *refs: Any) -> None:
    block, chunk = _place(tiling)
    mask_ref = refs[0] if tiling.masked else None
    out = refs[-1]

    def step(index: Any, carry: Any) -> Any:
        rows, inside, combine = _read_combine(
            tiling, source, phi, mask_ref, block + index, outputs.dtype
        )
        for own in range(tiling.group):
            columns = tiling.slice_chunk(chunk + own)
            value = dot(combine, outputs[:, columns]).astype(out.dtype)
            store_tile(out, rows, columns, value, inside)
        return carry

    lax.fori_loop(0, tiling.blocks, step, 0)


def _gather_back(tiling: GpuMixtureTiling, source: Any, phi: Any, dout: Any, *refs: Any) -> None:
    block, chunk = _place(tiling)
    mask_ref = refs[0] if tiling.masked else None
    sum_ref = refs[-1]

    def step(index: Any, sums: Any) -> Any:
        rows, inside, combine = _read_combine(
            tiling, source, phi, mask_ref, block + index, dout.dtype
        )

        def load(own: int) -> Array:
            return load_tile(dout, rows, tiling.slice_chunk(chunk + own), inside)

        return tuple(total + dot(combine, load(own), COLUMNS) for own, total in enumerate(sums))

    sums = lax.fori_loop(0, tiling.blocks, step, _sums(tiling))
    for own, total in enumerate(sums):
        tiling.store_slots(sum_ref, tiling.slice_chunk(chunk + own), total)


def _answer_back(tiling: GpuMixtureTiling, *refs: Any) -> None:
    x, dout, phi, outputs, dslots, peak, total, delta = refs[:8]
    mask_ref = refs[8] if tiling.masked else None
    kept = refs[8 + tiling.masked] if tiling.keep else None
    dx, dphi = refs[-2:]
    block, chunk = _place(tiling)

    def step(index: Any, sums: Any) -> Any:
        rows, inside = tiling.slice_block(block + index)
        valid = mask_tokens(mask_ref, rows, inside)
        length = None
        if kept is None:
            scores, length = tiling.compute_scores(x, phi, rows, inside)
        else:
            scores = load_tile(kept, rows, slice(None), inside)
            if tiling.normalize:
                length = tiling.compute_lengths(x, rows, inside)
        combine = tiling.compute_combine(scores, valid)
        dispatch = jnp.exp(jnp.where(valid[:, None], scores, LOW) - peak[...][None])
        dispatch = jnp.where(valid[:, None], dispatch / total[...][None], 0.0)

        def compare(at: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            columns = tiling.slice_chunk(at)
            dcombine = dot(load_tile(dout, rows, columns, inside), outputs[:, columns], LANES)
            ddispatch = dot(load_tile(x, rows, columns, inside), dslots[:, columns], LANES)
            return carry[0] + dcombine, carry[1] + ddispatch

        blank = jnp.zeros((tiling.rows, tiling.padded), F32)
        dcombine, ddispatch = tiling.over_chunks(compare, (blank, blank))
        of_tokens = jnp.sum(combine * dcombine, axis=1)[:, None]
        dscores = combine * (dcombine - of_tokens) + dispatch * (ddispatch - delta[...][None])
        scaled = dscores if length is None else dscores * length[:, None]
        # Rounded to 16 bits once, for the products below.
        weights, slopes = dispatch.astype(x.dtype), scaled.astype(x.dtype)
        results = []
        for own, before in enumerate(sums):
            columns = tiling.slice_chunk(chunk + own)
            value = dot(weights, dslots[:, columns]) + dot(slopes, phi[:, columns])
            tokens = load_tile(x, rows, columns, inside)
            if length is not None:
                inner = length * length * jnp.sum(dscores * scores, axis=1)
                value -= inner[:, None] * tokens.astype(F32)
            store_tile(dx, rows, columns, value.astype(dx.dtype), inside)
            results.append(before + dot(slopes, tokens, COLUMNS))
        return tuple(results)

    sums = lax.fori_loop(0, tiling.blocks, step, _sums(tiling))
    for own, value in enumerate(sums):
        tiling.store_slots(dphi, tiling.slice_chunk(chunk + own), value)


def forward(
    options: KernelOptions, x: Array, phi: Array, *rest: Any, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output, and with `keep` slots, peaks and sums of their softmaxes, and scores."""
    tiling: Any = tile(options, x, phi, *rest)
    short = gpu_short.tile_short(tiling)
    if short is not None:
        return gpu_short.forward(short, options, x, phi, *rest, keep=keep)
    *experts, mask = rest
    batch, tokens, dim = x.shape
    masks, phi_flat = mask_argument(mask), tiling.flatten_phi(phi, x.dtype)
    per_slot = jax.ShapeDtypeStruct((batch, tiling.splits, tiling.padded), F32)
    sums = jax.ShapeDtypeStruct((batch, tiling.splits, tiling.slots, dim), F32)
    kept = [per_clip(jax.ShapeDtypeStruct((batch, tokens, tiling.padded), F32))] * tiling.keep
    peak, total, mean, *scores = tiling.call(
        options,
        _gather,
        [per_clip(x), constant(phi_flat), *masks],
        [per_clip(per_slot, 2), per_clip(per_slot, 2), per_clip(sums, 2, tiling.padded), *kept],
    )
    # One softmax of what the splits found.
    highest = jnp.max(peak, axis=1)
    share = jnp.exp(peak - highest[:, None])
    total = jnp.maximum(jnp.sum(total * share, axis=1), 1e-30)[:, : tiling.slots]
    slots = jnp.sum(share[..., : tiling.slots, None] * mean, axis=1) / total[..., None]
    outputs = apply_experts(slots.reshape(batch, *phi.shape[1:], dim), *experts)
    answers = tiling.pad_slots(outputs.reshape(slots.shape).astype(x.dtype))
    source = scores[0] if tiling.keep else x
    wide = tiling
    if tiling.padded == 32:  # 16 rows are too few for 8 warps, which spill
        wide = tiling._replace(rows=2 * tiling.rows, blocks=pl.cdiv(tiling.blocks, 2))
    (out,) = wide.call(
        options,
        _answer,
        [per_clip(source), constant(phi_flat), per_clip(answers), *masks],
        [per_clip(jax.ShapeDtypeStruct(x.shape, x.dtype))],
    )
    return out, (slots, highest[:, : tiling.slots], total, *scores) if keep else ()


def backward(
    options: KernelOptions, dout: Array, kept: tuple[Array, ...], x: Array, phi: Array, *rest: Any
) -> tuple[Array, ...]:
    """Return the gradients of x, phi and the experts' weights."""
    tiling: Any = tile(options, x, phi, *rest)
    short = gpu_short.tile_short(tiling)
    if short is not None:
        return gpu_short.backward(short, options, dout, kept, x, phi, *rest)
    *experts, mask = rest
    slots, peak, total, *scores = kept
    batch, _, dim = x.shape
    masks = mask_argument(mask)
    phi_flat = constant(tiling.flatten_phi(phi, x.dtype))
    sums = jax.ShapeDtypeStruct((batch, tiling.splits, tiling.slots, dim), F32)
    sums = per_clip(sums, 2, tiling.padded)
    source = scores[0] if tiling.keep else x
    outputs, pull = jax.vjp(apply_experts, slots.reshape(batch, *phi.shape[1:], dim), *experts)
    (doutputs,) = tiling.call(
        options,
        _gather_back,
        [per_clip(source), phi_flat, per_clip(dout), *masks],
        [sums],
    )
    doutputs = doutputs.sum(axis=1)
    dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    delta = jnp.sum(slots * dslots, axis=2)
    wide = [each.reshape(slots.shape).astype(x.dtype) for each in (outputs, dslots)]
    per_slot = [*wide, peak, total, delta]
    fills = (0.0, 0.0, 0.0, 1.0, 0.0)
    padded = [tiling.pad_slots(*each) for each in zip(per_slot, fills, strict=True)]
    dx, dphi = tiling.call(
        options,
        _answer_back,
        [
            *map(per_clip, (x, dout)),
            phi_flat,
            *map(per_clip, padded),
            *masks,
            *map(per_clip, scores),
        ],
        [per_clip(jax.ShapeDtypeStruct(x.shape, x.dtype)), sums],
    )
    return dx, dphi.sum(axis=(0, 1)).T.reshape(phi.shape), *dweights
