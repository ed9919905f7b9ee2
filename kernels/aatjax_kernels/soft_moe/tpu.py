"""Soft mixture of bottleneck adapters for TPU (Pallas, Mosaic).

Tokens lie on lanes: scores are [slots, tokens], so that a few slots fill the vector unit.

Whole clips: a grid step holds clips in VMEM, reads them once and writes them once: 2N bytes forward
and 3N backward, N one activation tensor. Several short clips share a step with block-diagonal
scores, in which the slots of a clip are masked to its own tokens. With few slots, scores (s/n of 2N
in bfloat16) and slots are kept for the backward pass: of its seven products over the tokens five
remain. With many they are recomputed.

Tiled: sequences that do not fit take two passes over blocks of tokens in each direction, the
softmax over the tokens online: 3N forward and 5N backward.

The equations are those of `xla.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl, pltpu
from aatjax_kernels.soft_moe import packing
from aatjax_kernels.soft_moe.reference import NORM_EPS

VMEM = 56 * 2**20
"""Bytes that a grid step may use: v5p has 64 MiB per core, of which XLA needs some."""

KEPT_SLOTS = 32
"""Up to this many slots the scores and slots are kept for the backward pass."""

CHUNK = 512
"""Tokens of a float32 product that are computed at a time, to bound its size in VMEM."""


class TpuMixtureTiling(NamedTuple):
    """How a shape is divided into grid steps.

    Attributes:
        batch, tokens, slots: the shape.
        clips: clips per step.
        rows: rows of VMEM per clip: the tokens, rounded up to whole tiles if there are more clips.
        tile: tokens per step where a clip does not fit, else 0.
        keep: whether the forward pass keeps scores and slots.
    """

    batch: int
    tokens: int
    slots: int
    clips: int
    rows: int
    tile: int
    keep: bool

    @property
    def steps(self) -> int:
        """Groups of clips."""
        return -(-self.batch // self.clips)

    @property
    def parts(self) -> int:
        """Halves in which parameter gradients are summed, so that two cores can share the work."""
        return 2 if self.steps % 2 == 0 else 1


def tile(
    options: KernelOptions, x: Any, phi: Any, w_down: Any, *rest: Any
) -> TpuMixtureTiling | str:
    """Return the tiling of a shape by a count of bytes in VMEM; see `Backend`."""
    (batch, tokens, dim), (_, experts, per_expert) = x.shape, phi.shape
    width, size = w_down.shape[2], x.dtype.itemsize
    slots, hidden = experts * per_expert, experts * width
    if tokens < 8:
        return f"{tokens} tokens, fewer than 8"
    if hidden < 2:
        return "a single hidden unit"

    def count(clips: int, tokens: int) -> int:
        """Return the bytes of VMEM that a step of the backward pass uses."""
        rows, scores = clips * tokens, clips * slots
        # Tokens, their cotangents and the gradient, double-buffered.
        moved = 6 * rows * dim * size
        # A chunk of a float32 product, or the whole one where clips are stacked.
        product = 4 * dim * (min(rows, CHUNK) if clips == 1 else rows)
        # Scores, both weights and their gradients; slots and hidden units with their gradients.
        return moved + product + 4 * (6 * scores * rows + 8 * scores * dim + 10 * hidden * dim)

    if count(1, CHUNK) > VMEM:
        return f"weights of {experts} experts of bottleneck width {width}: VMEM is too small"
    # Block-diagonal scores cost clips times the slots. With 15 slots and 110 tokens, 8 clips per
    # step (120 rows) take 112 us on v5p against 97 us of 'xla' by the schedules; 4 take fewer.
    clips = 1
    for more in (2, 4, 8):
        fits = more * slots <= 64 and more * tokens <= 2560 and count(more, tokens) <= VMEM // 2
        if fits and more <= batch:
            clips = more
    sublanes = 32 // size
    rows = tokens if clips == 1 else -(-tokens // sublanes) * sublanes
    tile = 0 if count(clips, tokens) <= VMEM else CHUNK
    keep = not tile and slots <= KEPT_SLOTS
    return TpuMixtureTiling(batch, tokens, slots, clips, rows, tile, keep)


# Parts of the kernels. All arrays here are in VMEM or registers.


class ExpertWeights(NamedTuple):
    """Packed weights, and `own` [slots, hidden units]."""

    w_down: Array
    b_down: Array
    w_up: Array
    b_up: Array
    own: Array

    def forward(self, slots: Array) -> tuple[Array, Array, Array]:
        """Return the outputs, and the hidden units with the slope of their GELU."""
        hidden, slope = packing.gelu_and_slope(dot(slots, self.w_down, LANES) + self.b_down)
        hidden = hidden * self.own
        return dot(hidden, self.w_up) + self.b_up, hidden, slope

    def backward(
        self, slots: Array, hidden: Array, slope: Array, doutputs: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Return the gradients of the slots and of w_down, b_down, w_up and b_up (by slot)."""
        dhidden = dot(doutputs, self.w_up, LANES) * self.own * slope
        return dot(dhidden, self.w_down), (
            dot(dhidden, slots, COLUMNS),
            jnp.sum(dhidden, axis=0, keepdims=True),
            dot(hidden, doutputs, COLUMNS),
            doutputs,
        )


def _load_experts(refs: Any) -> ExpertWeights:
    return ExpertWeights(*(ref[...] for ref in refs))


def _lengths(normalize: bool, x: Array) -> Array | None:
    """Return (|x|^2 + eps)^(-1/2) of every token on lanes, [1, tokens], if `normalize`."""
    if not normalize:
        return None
    wide = x.astype(F32)
    square = lax.dot_general(
        jnp.ones((8, x.shape[1]), F32),
        wide * wide,
        LANES,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=F32,
    )
    return lax.rsqrt(square[:1] + NORM_EPS)


def _scores(phi: Array, x: Array, length: Array | None) -> Array:
    scores = dot(phi, x, LANES)
    return scores if length is None else scores * length


def _where(valid: Array | None, values: Array, other: float) -> Array:
    return values if valid is None else jnp.where(valid, values, other)


def _dispatch(scores: Array, valid: Array | None) -> Array:
    """Softmax over the tokens (axis 1); zero for a slot whose tokens are all masked."""
    scores = _where(valid, scores, LOW)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    weights = _where(valid, weights, 0.0)
    return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)


def _combine(scores: Array, valid: Array | None) -> Array:
    """Softmax over the slots (axis 0); zero for masked tokens."""
    scores = _where(valid, scores, LOW)
    weights = _where(valid, jnp.exp(scores - scores.max(axis=0, keepdims=True)), 0.0)
    return weights / jnp.maximum(weights.sum(axis=0, keepdims=True), 1e-30)


def _store_gradient(
    out: Any,
    tokens: tuple[Any, Array, Array, Array | None],
    weights: tuple[Array, Array, Array],
    by_slot: tuple[Array, Array, Array],
) -> Array:
    """Store the gradient of the tokens and return that of phi.

    Args:
        out: where it is stored.
        tokens: phi (a ref), x, dout and the lengths of the tokens, if used.
        weights: scores, dispatch and combine.
        by_slot: slots, their gradients, and the experts' outputs.
    """
    phi, x, dout, length = tokens
    scores, dispatch, combine = weights
    slots, dslots, outputs = by_slot
    # The gradient of the scores, through both softmaxes.
    dcombine = dot(outputs.astype(x.dtype), dout, LANES)
    ddispatch = dot(dslots.astype(x.dtype), x, LANES)
    of_tokens = jnp.sum(combine * dcombine, axis=0, keepdims=True)
    of_slots = jnp.sum(slots * dslots, axis=1, keepdims=True)
    dscores = combine * (dcombine - of_tokens) + dispatch * (ddispatch - of_slots)
    scaled = dscores if length is None else dscores * length
    flat = phi[...]
    both = jnp.concatenate([dispatch, scaled], axis=0).astype(x.dtype)
    values = jnp.concatenate([dslots.astype(x.dtype), flat], axis=0)
    inner = None
    if length is not None:
        inner = -length * length * jnp.sum(dscores * scores, axis=0, keepdims=True)
    _store_tokens(out, both, values, x, inner)
    return dot(scaled.astype(x.dtype), x)


def _store_tokens(
    out: Any, weights: Array, values: Array, x: Array | None = None, inner: Array | None = None
) -> None:
    """Store weights^T values (+ inner x), in chunks of tokens."""
    clips, rows, dim = out.shape
    chunk = clips * rows if clips > 1 else CHUNK
    for start in range(0, clips * rows, chunk):
        part = slice(start, min(start + chunk, clips * rows))
        product = dot(weights[:, part], values, COLUMNS)
        if x is not None and inner is not None:
            column = jnp.broadcast_to(inner[:, part], (8, part.stop - part.start)).T[:, :1]
            product = product + column * x[part].astype(F32)
        product = product.astype(out.dtype)
        if clips > 1:
            out[...] = product.reshape(clips, rows, dim)
        else:
            out[0, part] = product


def _accumulate(sums: Any, grads: Any, first: Any) -> None:
    """Add gradients to sums that stay in VMEM over the steps of a part."""

    @pl.when(first)
    def _() -> None:
        for ref, grad in zip(sums, grads, strict=True):
            ref[0] = grad

    @pl.when(jnp.logical_not(first))
    def _() -> None:
        for ref, grad in zip(sums, grads, strict=True):
            ref[0] += grad


# Whole clips.


def _mask_clips(tiling: TpuMixtureTiling, mask: Array | None) -> Array | None:
    """Return the tokens of each slot, [slots of all clips, tokens of all clips]; None for all."""
    if tiling.clips == 1:
        return None if mask is None else mask > 0
    slot = lax.broadcasted_iota(jnp.int32, (tiling.clips * tiling.slots, 1), 0)
    column = lax.broadcasted_iota(jnp.int32, (1, tiling.clips * tiling.rows), 1)
    clip = lax.div(column, jnp.int32(tiling.rows))
    valid = lax.div(slot, jnp.int32(tiling.slots)) == clip
    if tiling.rows != tiling.tokens:
        valid = valid & (column - clip * tiling.rows < tiling.tokens)
    return valid if mask is None else valid & (mask > 0)


def _load_clips(tiling: TpuMixtureTiling, ref: Any, step: Any) -> Array:
    """Load the tokens of a step as [tokens, d]; zeros beyond the clips and the batch."""
    tokens = ref[...]
    clips, rows, dim = tokens.shape
    ragged = tiling.batch % tiling.clips != 0
    if rows != tiling.tokens or ragged:
        inside = lax.broadcasted_iota(jnp.int32, (clips, rows, 1), 1) < tiling.tokens
        if ragged:
            clip = lax.broadcasted_iota(jnp.int32, (clips, rows, 1), 0)
            inside = inside & (clip < tiling.batch - step * clips)
        tokens = jnp.where(inside, tokens, jnp.zeros_like(tokens))
    return tokens.reshape(clips * rows, dim)


def _forward_kernel(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    x_ref, phi = refs[:2]
    mask = refs[7][0] if masked else None
    out, *kept = refs[7 + masked :]
    x = _load_clips(tiling, x_ref, pl.program_id(0))
    scores = _scores(phi[...], x, _lengths(normalize, x))
    valid = _mask_clips(tiling, mask)
    slots = dot(_dispatch(scores, valid).astype(x.dtype), x)
    outputs, _, _ = _load_experts(refs[2:7]).forward(slots)
    _store_tokens(out, _combine(scores, valid).astype(x.dtype), outputs.astype(x.dtype))
    if kept:
        # Every column has the scores of its own clip only: one block of rows holds all of them.
        scores, count = _where(_mask_clips(tiling, None), scores, 0.0), tiling.slots
        kept[0][0] = (
            sum(scores[i * count : (i + 1) * count] for i in range(1, tiling.clips))
            + scores[:count]
        )
        kept[1][0] = slots.astype(x.dtype)


def _backward_kernel(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    x_ref, dout_ref, phi = refs[:3]
    mask = refs[8][0] if masked else None
    kept = refs[8 + masked : 8 + masked + 2 * tiling.keep]
    dx, *sums = refs[8 + masked + 2 * tiling.keep :]
    step = pl.program_id(0) * (tiling.steps // tiling.parts) + pl.program_id(1)
    x, dout = _load_clips(tiling, x_ref, step), _load_clips(tiling, dout_ref, step)
    length = _lengths(normalize, x)
    valid = _mask_clips(tiling, mask)
    if kept:
        scores = jnp.concatenate([kept[0][0]] * tiling.clips, axis=0)
    else:
        scores = _scores(phi[...], x, length)
    dispatch, combine = _dispatch(scores, valid), _combine(scores, valid)
    slots = kept[1][0].astype(F32) if kept else dot(dispatch.astype(x.dtype), x)
    experts = _load_experts(refs[3:8])
    outputs, hidden, slope = experts.forward(slots)
    doutputs = dot(combine.astype(x.dtype), dout)
    dslots, grads = experts.backward(slots, hidden, slope, doutputs)
    tokens, weights = (phi, x, dout, length), (scores, dispatch, combine)
    dphi = _store_gradient(dx, tokens, weights, (slots, dslots, outputs))
    _accumulate(sums, (dphi, *grads), pl.program_id(1) == 0)


# Tiles of clips.


def _load_tile(tiling: TpuMixtureTiling, ref: Any, tile: Any) -> Array:
    """Load the tokens of a tile; zeros beyond the clip."""
    tokens = ref[0]
    if tiling.tokens % tiling.tile == 0:
        return tokens
    row = lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0)
    return jnp.where(row < tiling.tokens - tile * tiling.tile, tokens, jnp.zeros_like(tokens))


def _mask_tile(tiling: TpuMixtureTiling, mask: Array | None, tile: Any) -> Array | None:
    """Return the valid tokens of a tile, [1, tokens]; None for all."""
    valid = None if mask is None else mask > 0
    if tiling.tokens % tiling.tile:
        column = lax.broadcasted_iota(jnp.int32, (1, tiling.tile), 1)
        inside = column < tiling.tokens - tile * tiling.tile
        valid = inside if valid is None else valid & inside
    return valid


def _gather(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    """First pass forward: slots by an online softmax, then the experts."""
    x_ref, phi = refs[:2]
    slots, outputs, peaks, totals = refs[7 + masked : 11 + masked]
    peak, total, mean = refs[11 + masked :]
    tile = pl.program_id(1)
    x = _load_tile(tiling, x_ref, tile)
    valid = _mask_tile(tiling, refs[7][0] if masked else None, tile)

    @pl.when(tile == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, LOW)
        total[...] = jnp.zeros_like(total)
        mean[...] = jnp.zeros_like(mean)

    scores = _scores(phi[...], x, _lengths(normalize, x))
    scores = _where(valid, scores, LOW)
    higher = jnp.maximum(peak[...], scores.max(axis=1, keepdims=True))
    shrink = jnp.exp(peak[...] - higher)
    raw = _where(valid, jnp.exp(scores - higher), 0.0)
    total[...] = total[...] * shrink + raw.sum(axis=1, keepdims=True)
    mean[...] = mean[...] * shrink + dot(raw.astype(x.dtype), x)
    peak[...] = higher

    @pl.when(tile == pl.num_programs(1) - 1)
    def _() -> None:
        gathered = mean[...] / jnp.maximum(total[...], 1e-30)
        slots[0] = gathered
        outputs[0] = _load_experts(refs[2:7]).forward(gathered)[0]
        peaks[0] = peak[...]
        totals[0] = total[...]


def _answer(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    """Second pass forward: the output of the tokens."""
    x_ref, phi, outputs = refs[:3]
    tile = pl.program_id(1)
    x = _load_tile(tiling, x_ref, tile)
    valid = _mask_tile(tiling, refs[3][0] if masked else None, tile)
    scores = _scores(phi[...], x, _lengths(normalize, x))
    _store_tokens(refs[-1], _combine(scores, valid).astype(x.dtype), outputs[0].astype(x.dtype))


def _gather_back(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    """First pass backward: gradients of the slots' outputs, then through the experts."""
    x_ref, dout_ref, phi = refs[:3]
    slots, dslots, *sums = refs[8 + masked : -1]
    gathered = refs[-1]
    first, tile = pl.program_id(1) == 0, pl.program_id(2)
    x, dout = _load_tile(tiling, x_ref, tile), _load_tile(tiling, dout_ref, tile)
    valid = _mask_tile(tiling, refs[8][0] if masked else None, tile)

    @pl.when(tile == 0)
    def _() -> None:
        gathered[...] = jnp.zeros_like(gathered)

    scores = _scores(phi[...], x, _lengths(normalize, x))
    gathered[...] += dot(_combine(scores, valid).astype(x.dtype), dout)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        experts = _load_experts(refs[3:8])
        _, hidden, slope = experts.forward(slots[0])
        dslots[0], grads = experts.backward(slots[0], hidden, slope, gathered[...])
        _accumulate(sums, grads, first)


def _answer_back(tiling: TpuMixtureTiling, normalize: bool, masked: bool, *refs: Any) -> None:
    """Second pass backward: gradients of the tokens and of phi."""
    x_ref, dout_ref, phi, slots, outputs, dslots, peak, total = refs[:8]
    dx, dphi = refs[-2:]
    tile = pl.program_id(2)
    x, dout = _load_tile(tiling, x_ref, tile), _load_tile(tiling, dout_ref, tile)
    valid = _mask_tile(tiling, refs[8][0] if masked else None, tile)
    length = _lengths(normalize, x)
    scores = _scores(phi[...], x, length)
    dispatch = jnp.exp(_where(valid, scores, LOW) - peak[0]) / jnp.maximum(total[0], 1e-30)
    dispatch = _where(valid, dispatch, 0.0)
    combine = _combine(scores, valid)
    tokens, weights = (phi, x, dout, length), (scores, dispatch, combine)
    grad = _store_gradient(dx, tokens, weights, (slots[0], dslots[0], outputs[0]))
    _accumulate((dphi,), (grad,), (pl.program_id(1) == 0) & (tile == 0))


# The calls.


class _Arguments(NamedTuple):
    """What the passes of a call share: tiling, options, packed parameters and mask (or none)."""

    tiling: TpuMixtureTiling
    options: KernelOptions
    params: tuple[Array, ...]
    masks: list[Array]

    def call(self, kernel: Any, grid: tuple[int, ...], semantics: Any, **more: Any) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, self.tiling, self.options.normalize, bool(self.masks)),
            grid=grid,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=VMEM
            ),
            interpret=self.options.interpret,
            **more,
        )

    def sums(self, *which: int) -> tuple[list[pl.BlockSpec], list[jax.ShapeDtypeStruct]]:
        """Return blocks and shapes of the gradients of some parameters, summed over parts."""
        shapes = [self.params[i].shape for i in which]
        return (
            [pl.BlockSpec((1, *shape), lambda i, *_: (i, 0, 0)) for shape in shapes],
            [jax.ShapeDtypeStruct((self.tiling.parts, *shape), F32) for shape in shapes],
        )


def _constant(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def _prepare(
    options: KernelOptions, x: Array, phi: Array, *experts: Array, mask: Array | None
) -> _Arguments:
    """Pack the parameters, those by slot repeated for each clip of a step; the mask on lanes."""
    tiling: Any = tile(options, x, phi, *experts)
    packed = packing.pack(phi, *experts)
    own = packing.make_ownership(phi.shape[1], phi.shape[2], experts[0].shape[2])
    copies = (tiling.clips, 1)
    params = (
        jnp.tile(packed.phi.astype(x.dtype), copies),
        *(each.astype(F32) for each in packed[1:4]),
        jnp.tile(packed.b_up.astype(F32), copies),
        jnp.tile(jnp.asarray(own), copies),
    )
    if mask is None:
        return _Arguments(tiling, options, params, [])
    more = (tiling.steps * tiling.clips - tiling.batch, tiling.rows - tiling.tokens)
    padded = jnp.pad(mask.astype(F32), [(0, more[0]), (0, more[1])])
    rows = padded.reshape(tiling.steps, 1, tiling.clips * tiling.rows)
    return _Arguments(tiling, options, params, [rows])


def _per_step(arrays: Any, index: Callable[..., Any]) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((1, *array.shape[1:]), index) for array in arrays]


def _tile_blocks(
    tiling: TpuMixtureTiling, dim: int, index: Callable[..., tuple[Any, Any]]
) -> tuple[pl.BlockSpec, ...]:
    """Return blocks of tokens, mask, slots and numbers of slots; `index` gives clip and tile."""

    def lanes(*grid: Any) -> tuple[Any, ...]:
        clip, tile = index(*grid)
        return clip, 0, tile

    def slots(*grid: Any) -> tuple[Any, ...]:
        return index(*grid)[0], 0, 0

    return (
        pl.BlockSpec((1, tiling.tile, dim), lambda *grid: (*index(*grid), 0)),
        pl.BlockSpec((1, 1, tiling.tile), lanes),
        pl.BlockSpec((1, tiling.slots, dim), slots),
        pl.BlockSpec((1, tiling.slots, 1), slots),
    )


def kept_shapes(
    options: KernelOptions, x: Array, phi: Array, *rest: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes of what `forward` keeps: scores and slots, or what the tiled form keeps."""
    tiling = tile(options, x, phi, *rest)
    assert not isinstance(tiling, str)
    dim, slots = x.shape[2], tiling.slots
    if tiling.tile:
        sizes = (dim, dim, 1, 1)
        return tuple(jax.ShapeDtypeStruct((x.shape[0], slots, size), F32) for size in sizes)
    if not tiling.keep:
        return ()
    return (
        jax.ShapeDtypeStruct((tiling.steps, slots, tiling.clips * tiling.rows), F32),
        jax.ShapeDtypeStruct((tiling.steps, tiling.clips * slots, dim), x.dtype),
    )


def forward(
    options: KernelOptions, x: Array, phi: Array, *rest: Any, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output, and with `keep` what the backward pass needs."""
    *experts, mask = rest
    arguments = _prepare(options, x, phi, *experts, mask=mask)
    tiling, _, params, masks = arguments
    if tiling.tile:
        return _forward_tiled(arguments, x)
    index = lambda i: (i, 0, 0)  # noqa: E731
    block = pl.BlockSpec((tiling.clips, tiling.rows, x.shape[2]), index)
    kept = kept_shapes(options, x, phi, *rest) if keep else ()
    out, *kept = arguments.call(
        _forward_kernel,
        (tiling.steps,),
        ("parallel",),
        in_specs=[block, *map(_constant, params), *_per_step(masks, index)],
        out_specs=[block, *_per_step(kept, index)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *kept],
    )(x, *params, *masks)
    return out, tuple(kept)


def _forward_tiled(arguments: _Arguments, x: Array) -> tuple[Array, tuple[Array, ...]]:
    tiling, _, params, masks = arguments
    batch, tokens, dim = x.shape
    grid = (batch, -(-tokens // tiling.tile))
    block, lanes, wide, narrow = _tile_blocks(tiling, dim, lambda i, j: (i, j))
    on_lanes = [lanes] * len(masks)
    sizes = [(tiling.slots, dim), (tiling.slots, 1)]
    slots, outputs, peak, total = arguments.call(
        _gather,
        grid,
        ("parallel", "arbitrary"),
        in_specs=[block, *map(_constant, params), *on_lanes],
        out_specs=[wide, wide, narrow, narrow],
        out_shape=[jax.ShapeDtypeStruct((batch, *sizes[narrow]), F32) for narrow in (0, 0, 1, 1)],
        scratch_shapes=[pltpu.VMEM(sizes[narrow], F32) for narrow in (1, 1, 0)],
    )(x, *params, *masks)
    out = arguments.call(
        _answer,
        grid,
        ("parallel", "parallel"),
        in_specs=[block, _constant(params[0]), wide, *on_lanes],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, params[0], outputs, *masks)
    return out, (slots, outputs, peak, total)


def backward(
    options: KernelOptions, dout: Array, kept: tuple[Array, ...], x: Array, phi: Array, *rest: Any
) -> tuple[Array, ...]:
    """Return the gradients of x, phi and the experts' weights, those of parameters in float32."""
    *experts, mask = rest
    arguments = _prepare(options, x, phi, *experts, mask=mask)
    tiling = arguments.tiling
    run = _backward_tiled if tiling.tile else _backward_whole
    dx, *grads = run(arguments, x, dout, kept)
    grads = [grad.sum(axis=0) for grad in grads]
    for i in (0, 4):
        grads[i] = grads[i].reshape(tiling.clips, tiling.slots, -1).sum(axis=0)
    return dx, *packing.unpack(packing.PackedParams(*grads), phi.shape[1], phi.shape[2])


def _backward_whole(
    arguments: _Arguments, x: Array, dout: Array, kept: tuple[Array, ...]
) -> tuple[Array, ...]:
    tiling, _, params, masks = arguments
    inner = tiling.steps // tiling.parts
    index = lambda i, j: (i * inner + j, 0, 0)  # noqa: E731
    block = pl.BlockSpec((tiling.clips, tiling.rows, x.shape[2]), index)
    specs, shapes = arguments.sums(*range(5))
    return arguments.call(
        _backward_kernel,
        (tiling.parts, inner),
        ("parallel", "arbitrary"),
        in_specs=[block, block, *map(_constant, params), *_per_step((*masks, *kept), index)],
        out_specs=[block, *specs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
    )(x, dout, *params, *masks, *kept)


def _backward_tiled(
    arguments: _Arguments, x: Array, dout: Array, kept: tuple[Array, ...]
) -> tuple[Array, ...]:
    tiling, _, params, masks = arguments
    slots, outputs, peak, total = kept
    batch, tokens, dim = x.shape
    inner = batch // tiling.parts
    grid = (tiling.parts, inner, -(-tokens // tiling.tile))
    semantics = ("parallel", "arbitrary", "arbitrary")
    block, lanes, wide, narrow = _tile_blocks(tiling, dim, lambda i, j, k: (i * inner + j, k))
    on_lanes = [lanes] * len(masks)
    specs, shapes = arguments.sums(*range(1, 5))
    dslots, *grads = arguments.call(
        _gather_back,
        grid,
        semantics,
        in_specs=[block, block, *map(_constant, params), *on_lanes, wide],
        out_specs=[wide, *specs],
        out_shape=[jax.ShapeDtypeStruct((batch, tiling.slots, dim), F32), *shapes],
        scratch_shapes=[pltpu.VMEM((tiling.slots, dim), F32)],
    )(x, dout, *params, *masks, slots)
    specs, shapes = arguments.sums(0)
    phi = params[0]
    dx, dphi = arguments.call(
        _answer_back,
        grid,
        semantics,
        in_specs=[
            *(block, block, _constant(phi), wide, wide, wide, narrow, narrow),
            *on_lanes,
        ],
        out_specs=[block, *specs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
    )(x, dout, phi, slots, outputs, dslots, peak, total, *masks)
    return dx, dphi, *grads
