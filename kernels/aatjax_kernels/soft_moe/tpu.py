"""Soft mixture of bottleneck adapters for TPU (Pallas, Mosaic).

Tokens lie on lanes: scores are [slots, tokens], so that a handful of slots fills the vector unit.

Whole clips: a grid step holds clips in VMEM, reads them once and writes them once. That is 2N bytes
forward and 3N backward, N one activation tensor. Short clips come several a step with
block-diagonal scores, the slots of a clip seeing its own tokens only. With few slots the scores
(s/n of 2N in bfloat16) and the slots are kept for the backward pass: of its seven products over the
tokens five remain. With many they are computed again.

Tiled: for sequences that do not fit, two passes over blocks of tokens in each direction, the
softmax over the tokens online: 3N forward and 5N backward.

The equations are those of `xla.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from aatjax_kernels.matmul import COLUMNS, F32, LANES, LOW, dot
from aatjax_kernels.soft_moe.packing import Options, Packed, gelu, ownership, pack, unpack
from aatjax_kernels.soft_moe.reference import NORM_EPS

VMEM = 56 * 2**20
"""Bytes a grid step may take: v5p has 64 MiB a core (v5e and v6e 128), and XLA needs some of it."""

KEPT_SLOTS = 32
"""Up to this many slots scores and slots are kept for the backward pass."""

CHUNK = 512
"""Tokens whose float32 product is made at once, so that it is never whole in VMEM."""


class Plan(NamedTuple):
    """How a shape is cut into grid steps.

    Attributes:
        batch, tokens, slots: the shape.
        clips: clips a step.
        rows: rows of VMEM that each takes, the tokens rounded up to whole tiles if there are more.
        tile: tokens a step where a clip does not fit, else 0.
        keep: the forward pass keeps scores and slots.
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
        """Parameter gradients are summed in two halves, so that two cores may share the work."""
        return 2 if self.steps % 2 == 0 else 1


def refuses(x: Array, phi: Array, width: int) -> str | None:
    """What of a shape the kernels do not take, or None."""
    if x.shape[1] < 8:
        return f"{x.shape[1]} tokens, fewer than 8"
    if phi.shape[1] * width < 2:
        return "a single hidden unit"
    if _taken(x, phi, width, 1, CHUNK) > VMEM:
        return f"weights of {phi.shape[1]} experts of bottleneck width {width}: VMEM is too small"
    return None


def _taken(x: Array, phi: Array, width: int, clips: int, tokens: int) -> int:
    """Bytes of VMEM that a step of the backward pass takes."""
    dim, size = x.shape[2], x.dtype.itemsize
    rows, scores = clips * tokens, clips * phi.shape[1] * phi.shape[2]
    # Tokens, their cotangents and the gradient, each twice: one moves while one is worked on.
    moved = 6 * rows * dim * size
    # A chunk of a float32 product, or the whole one where clips are stacked.
    product = 4 * dim * (min(rows, CHUNK) if clips == 1 else rows)
    # Scores, both weights and their gradients; slots and hidden units with their gradients.
    hidden = phi.shape[1] * width
    return moved + product + 4 * (6 * scores * rows + 8 * scores * dim + 10 * hidden * dim)


def plan_of(x: Array, phi: Array, width: int) -> Plan:
    """Chooses clips a step, or a tile, by a count of bytes in VMEM."""
    batch, tokens, _ = x.shape
    slots, size = phi.shape[1] * phi.shape[2], x.dtype.itemsize
    taken = functools.partial(_taken, x, phi, width)
    # Block-diagonal scores cost clips times the slots. With 15 slots and 110 tokens 8 clips a step
    # (120 rows) are behind 'xla' on v5p, 112 against 97 us by the schedules; 4 are not.
    clips = 1
    for more in (2, 4, 8):
        fits = more * slots <= 64 and more * tokens <= 2560 and taken(more, tokens) <= VMEM // 2
        if fits and more <= batch:
            clips = more
    sublanes = 32 // size
    rows = tokens if clips == 1 else -(-tokens // sublanes) * sublanes
    tile = 0 if taken(clips, tokens) <= VMEM else CHUNK
    return Plan(batch, tokens, slots, clips, rows, tile, keep=not tile and slots <= KEPT_SLOTS)


# Pieces of the kernels. Everything here is an array in VMEM or registers.


class Experts(NamedTuple):
    """Packed weights, and `own` [slots, hidden units]."""

    w_down: Array
    b_down: Array
    w_up: Array
    b_up: Array
    own: Array

    def forward(self, slots: Array) -> tuple[Array, Array, Array]:
        """Outputs, and the hidden units with the slope of their GELU."""
        hidden, slope = gelu(dot(slots, self.w_down, LANES) + self.b_down)
        hidden = hidden * self.own
        return dot(hidden, self.w_up) + self.b_up, hidden, slope

    def backward(
        self, slots: Array, hidden: Array, slope: Array, doutputs: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Gradients of the slots and of w_down, b_down, w_up and b_up (by slot)."""
        dbefore = dot(doutputs, self.w_up, LANES) * self.own * slope
        return dot(dbefore, self.w_down), (
            dot(dbefore, slots, COLUMNS),
            jnp.sum(dbefore, axis=0, keepdims=True),
            dot(hidden, doutputs, COLUMNS),
            doutputs,
        )


def _lengths(x: Array) -> Array:
    """(|x|^2 + eps)^(-1/2) of every token, on lanes: [1, tokens]."""
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


def _select(member: Array | None, chosen: Array, other: float) -> Array:
    return chosen if member is None else jnp.where(member, chosen, other)


def _sent(scores: Array, member: Array | None) -> Array:
    """Dispatch: softmax over the tokens (axis 1), zero where a slot sees nothing."""
    scores = _select(member, scores, LOW)
    sent = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    sent = _select(member, sent, 0.0)
    return sent / jnp.maximum(sent.sum(axis=1, keepdims=True), 1e-30)


def _read(scores: Array, member: Array | None) -> Array:
    """Combine: softmax over the slots (axis 0), zero where a token is not seen."""
    scores = _select(member, scores, LOW)
    read = _select(member, jnp.exp(scores - scores.max(axis=0, keepdims=True)), 0.0)
    return read / jnp.maximum(read.sum(axis=0, keepdims=True), 1e-30)


def _dscores(
    sent: Array, read: Array, slots: Array, dslots: Array, outputs: Array, x: Array, dout: Array
) -> Array:
    """Gradient of the scores, through both softmaxes."""
    dread = dot(outputs.astype(x.dtype), dout, LANES)
    dsent = dot(dslots.astype(x.dtype), x, LANES)
    of_tokens = jnp.sum(read * dread, axis=0, keepdims=True)
    of_slots = jnp.sum(slots * dslots, axis=1, keepdims=True)
    return read * (dread - of_tokens) + sent * (dsent - of_slots)


def _dtokens(
    out: Any,
    x: Array,
    phi: Array,
    sent: Array,
    scores: Array,
    dslots: Array,
    dscores: Array,
    length: Array | None,
) -> Array:
    """Writes dX and returns the gradient of phi."""
    scaled = dscores if length is None else dscores * length
    both = jnp.concatenate([sent, scaled], axis=0).astype(x.dtype)
    given = jnp.concatenate([dslots.astype(x.dtype), phi], axis=0)
    along = None
    if length is not None:
        along = -length * length * jnp.sum(dscores * scores, axis=0, keepdims=True)
    _store(out, both, given, x, along)
    return dot(scaled.astype(x.dtype), x)


def _store(
    out: Any, weights: Array, values: Array, x: Array | None = None, along: Array | None = None
) -> None:
    """out = weights^T values (+ along x), in chunks of tokens."""
    clips, rows, dim = out.shape
    chunk = clips * rows if clips > 1 else CHUNK
    for start in range(0, clips * rows, chunk):
        part = slice(start, min(start + chunk, clips * rows))
        product = dot(weights[:, part], values, COLUMNS)
        if x is not None and along is not None:
            column = jnp.broadcast_to(along[:, part], (8, part.stop - part.start)).T[:, :1]
            product = product + column * x[part].astype(F32)
        product = product.astype(out.dtype)
        if clips > 1:
            out[...] = product.reshape(clips, rows, dim)
        else:
            out[0, part] = product


def _accumulate(sums: Any, grads: Any, first: Any) -> None:
    """Adds to sums that stay in VMEM over the steps of a part."""

    @pl.when(first)
    def _() -> None:
        for ref, grad in zip(sums, grads, strict=True):
            ref[0] = grad

    @pl.when(jnp.logical_not(first))
    def _() -> None:
        for ref, grad in zip(sums, grads, strict=True):
            ref[0] += grad


# Whole clips.


def _member(plan: Plan, valid: Array | None) -> Array | None:
    """Which tokens a slot sees, [slots of all clips, tokens of all clips]; None where all."""
    if plan.clips == 1:
        return None if valid is None else valid > 0
    slot = lax.broadcasted_iota(jnp.int32, (plan.clips * plan.slots, 1), 0)
    column = lax.broadcasted_iota(jnp.int32, (1, plan.clips * plan.rows), 1)
    clip = lax.div(column, jnp.int32(plan.rows))
    member = lax.div(slot, jnp.int32(plan.slots)) == clip
    if plan.rows != plan.tokens:
        member = member & (column - clip * plan.rows < plan.tokens)
    return member if valid is None else member & (valid > 0)


def _tokens(plan: Plan, ref: Any, step: Any) -> Array:
    """The tokens of a step as [tokens, d]; what lies beyond the clips or the batch is zero."""
    tokens = ref[...]
    clips, rows, dim = tokens.shape
    ragged = plan.batch % plan.clips != 0
    if rows != plan.tokens or ragged:
        inside = lax.broadcasted_iota(jnp.int32, (clips, rows, 1), 1) < plan.tokens
        if ragged:
            clip = lax.broadcasted_iota(jnp.int32, (clips, rows, 1), 0)
            inside = inside & (clip < plan.batch - step * clips)
        tokens = jnp.where(inside, tokens, jnp.zeros_like(tokens))
    return tokens.reshape(clips * rows, dim)


def _forward_whole(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    x_ref, phi, *weights = refs[:7]
    valid = refs[7][0] if masked else None
    out, *kept = refs[7 + masked :]
    x = _tokens(plan, x_ref, pl.program_id(0))
    scores = _scores(phi[...], x, _lengths(x) if normalize else None)
    member = _member(plan, valid)
    slots = dot(_sent(scores, member).astype(x.dtype), x)
    outputs, _, _ = Experts(*(ref[...] for ref in weights)).forward(slots)
    _store(out, _read(scores, member).astype(x.dtype), outputs.astype(x.dtype))
    if kept:
        # Every column has the scores of its own clip only: one block of rows is all there is.
        scores = _select(_member(plan, None), scores, 0.0)
        kept[0][0] = (
            sum(scores[i * plan.slots : (i + 1) * plan.slots] for i in range(1, plan.clips))
            + scores[: plan.slots]
        )
        kept[1][0] = slots.astype(x.dtype)


def _backward_whole(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    x_ref, dout_ref, phi, *weights = refs[:8]
    valid = refs[8][0] if masked else None
    kept = refs[8 + masked : 8 + masked + 2 * plan.keep]
    dx, *sums = refs[8 + masked + 2 * plan.keep :]
    step = pl.program_id(0) * (plan.steps // plan.parts) + pl.program_id(1)
    x, dout = _tokens(plan, x_ref, step), _tokens(plan, dout_ref, step)
    length = _lengths(x) if normalize else None
    member = _member(plan, valid)
    if kept:
        scores = jnp.concatenate([kept[0][0]] * plan.clips, axis=0)
    else:
        scores = _scores(phi[...], x, length)
    sent, read = _sent(scores, member), _read(scores, member)
    slots = kept[1][0].astype(F32) if kept else dot(sent.astype(x.dtype), x)
    experts = Experts(*(ref[...] for ref in weights))
    outputs, hidden, slope = experts.forward(slots)
    doutputs = dot(read.astype(x.dtype), dout)
    dslots, grads = experts.backward(slots, hidden, slope, doutputs)
    dscores = _dscores(sent, read, slots, dslots, outputs, x, dout)
    dphi = _dtokens(dx, x, phi[...], sent, scores, dslots, dscores, length)
    _accumulate(sums, (dphi, *grads), pl.program_id(1) == 0)


# Tiles of clips.


def _tile(plan: Plan, ref: Any, tile: Any) -> Array:
    """The tokens of a tile, zero beyond the clip."""
    tokens = ref[0]
    if plan.tokens % plan.tile == 0:
        return tokens
    row = lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0)
    return jnp.where(row < plan.tokens - tile * plan.tile, tokens, jnp.zeros_like(tokens))


def _tile_member(plan: Plan, valid: Array | None, tile: Any) -> Array | None:
    member = None if valid is None else valid > 0
    if plan.tokens % plan.tile:
        column = lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1)
        inside = column < plan.tokens - tile * plan.tile
        member = inside if member is None else member & inside
    return member


def _gather(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    """First pass forward: slots by an online softmax, then the experts."""
    x_ref, phi, *weights = refs[:7]
    slots, outputs, peaks, totals = refs[7 + masked : 11 + masked]
    peak, total, mean = refs[11 + masked :]
    tile = pl.program_id(1)
    x = _tile(plan, x_ref, tile)
    member = _tile_member(plan, refs[7][0] if masked else None, tile)

    @pl.when(tile == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, LOW)
        total[...] = jnp.zeros_like(total)
        mean[...] = jnp.zeros_like(mean)

    scores = _scores(phi[...], x, _lengths(x) if normalize else None)
    scores = _select(member, scores, LOW)
    higher = jnp.maximum(peak[...], scores.max(axis=1, keepdims=True))
    shrink = jnp.exp(peak[...] - higher)
    raw = _select(member, jnp.exp(scores - higher), 0.0)
    total[...] = total[...] * shrink + raw.sum(axis=1, keepdims=True)
    mean[...] = mean[...] * shrink + dot(raw.astype(x.dtype), x)
    peak[...] = higher

    @pl.when(tile == pl.num_programs(1) - 1)
    def _() -> None:
        gathered = mean[...] / jnp.maximum(total[...], 1e-30)
        slots[0] = gathered
        outputs[0] = Experts(*(ref[...] for ref in weights)).forward(gathered)[0]
        peaks[0] = peak[...]
        totals[0] = total[...]


def _answer(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    """Second pass forward: tokens read the outputs of the slots."""
    x_ref, phi, outputs = refs[:3]
    out = refs[-1]
    tile = pl.program_id(1)
    x = _tile(plan, x_ref, tile)
    member = _tile_member(plan, refs[3][0] if masked else None, tile)
    scores = _scores(phi[...], x, _lengths(x) if normalize else None)
    _store(out, _read(scores, member).astype(x.dtype), outputs[0].astype(x.dtype))


def _gather_back(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    """First pass backward: gradients of the slots' outputs, then through the experts."""
    x_ref, dout_ref, phi, *weights = refs[:8]
    slots, dslots, *sums = refs[8 + masked : -1]
    gathered = refs[-1]
    first, tile = pl.program_id(1) == 0, pl.program_id(2)
    x, dout = _tile(plan, x_ref, tile), _tile(plan, dout_ref, tile)
    member = _tile_member(plan, refs[8][0] if masked else None, tile)

    @pl.when(tile == 0)
    def _() -> None:
        gathered[...] = jnp.zeros_like(gathered)

    scores = _scores(phi[...], x, _lengths(x) if normalize else None)
    gathered[...] += dot(_read(scores, member).astype(x.dtype), dout)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        experts = Experts(*(ref[...] for ref in weights))
        _, hidden, slope = experts.forward(slots[0])
        dslots[0], grads = experts.backward(slots[0], hidden, slope, gathered[...])
        _accumulate(sums, grads, first)


def _answer_back(plan: Plan, normalize: bool, masked: bool, *refs: Any) -> None:
    """Second pass backward: gradients of the tokens and of phi."""
    x_ref, dout_ref, phi, slots, outputs, dslots, peak, total = refs[:8]
    dx, dphi = refs[-2:]
    tile = pl.program_id(2)
    x, dout = _tile(plan, x_ref, tile), _tile(plan, dout_ref, tile)
    member = _tile_member(plan, refs[8][0] if masked else None, tile)
    length = _lengths(x) if normalize else None
    scores = _scores(phi[...], x, length)
    sent = jnp.exp(_select(member, scores, LOW) - peak[0]) / jnp.maximum(total[0], 1e-30)
    sent = _select(member, sent, 0.0)
    dscores = _dscores(sent, _read(scores, member), slots[0], dslots[0], outputs[0], x, dout)
    grad = _dtokens(dx, x, phi[...], sent, scores, dslots[0], dscores, length)
    _accumulate((dphi,), (grad,), (pl.program_id(1) == 0) & (tile == 0))


# The calls.


def _call(
    plan: Plan,
    options: Options,
    kernel: Any,
    mask: Array | None,
    grid: tuple[int, ...],
    semantics: tuple[Any, ...],
    **given: Any,
) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, plan, options.normalize, mask is not None),
        grid=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM),
        interpret=options.interpret,
        **given,
    )


def _constant(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def _params(plan: Plan, dtype: Any, phi: Array, *experts: Array) -> tuple[Array, ...]:
    """Packed weights, those that go by slot repeated for each clip of a step."""
    packed = pack(phi, *experts)
    own = ownership(phi.shape[1], phi.shape[2], experts[0].shape[2])
    copies = (plan.clips, 1)
    return (
        jnp.tile(packed.phi.astype(dtype), copies),
        *(each.astype(F32) for each in packed[1:4]),
        jnp.tile(packed.b_up.astype(F32), copies),
        jnp.tile(jnp.asarray(own), copies),
    )


def _valid(plan: Plan, mask: Array | None) -> list[Array]:
    """The mask on lanes, [steps, 1, tokens of a step]."""
    if mask is None:
        return []
    more = (plan.steps * plan.clips - plan.batch, plan.rows - plan.tokens)
    padded = jnp.pad(mask.astype(F32), [(0, more[0]), (0, more[1])])
    return [padded.reshape(plan.steps, 1, plan.clips * plan.rows)]


def forward(
    options: Options, x: Array, phi: Array, *experts: Array, mask: Array | None, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and with `keep` what the backward pass needs beside the arguments."""
    plan = plan_of(x, phi, experts[0].shape[2])
    params = _params(plan, x.dtype, phi, *experts)
    valid, dim = _valid(plan, mask), x.shape[2]
    if plan.tile:
        return _forward_tiled(plan, options, x, params, valid, mask)
    first = lambda i: (i, 0, 0)  # noqa: E731
    block = pl.BlockSpec((plan.clips, plan.rows, dim), first)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    specs = [block]
    if keep and plan.keep:
        columns, rows = plan.clips * plan.rows, plan.clips * plan.slots
        shapes.append(jax.ShapeDtypeStruct((plan.steps, plan.slots, columns), F32))
        shapes.append(jax.ShapeDtypeStruct((plan.steps, rows, dim), x.dtype))
        specs += [pl.BlockSpec((1, *shape.shape[1:]), first) for shape in shapes[1:]]
    call = _call(
        plan,
        options,
        _forward_whole,
        mask,
        (plan.steps,),
        ("parallel",),
        in_specs=[
            block,
            *map(_constant, params),
            *(pl.BlockSpec((1, *v.shape[1:]), first) for v in valid),
        ],
        out_specs=specs,
        out_shape=shapes,
    )
    out, *kept = call(x, *params, *valid)
    return out, tuple(kept)


def _forward_tiled(
    plan: Plan,
    options: Options,
    x: Array,
    params: tuple[Array, ...],
    valid: list[Array],
    mask: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    batch, tokens, dim = x.shape
    grid = (batch, -(-tokens // plan.tile))
    block = pl.BlockSpec((1, plan.tile, dim), lambda i, j: (i, j, 0))
    lanes = [pl.BlockSpec((1, 1, plan.tile), lambda i, j: (i, 0, j)) for _ in valid]
    wide, narrow = (plan.slots, dim), (plan.slots, 1)
    shapes = [wide, wide, narrow, narrow]
    specs = [pl.BlockSpec((1, *shape), lambda i, j: (i, 0, 0)) for shape in shapes]
    gather = _call(
        plan,
        options,
        _gather,
        mask,
        grid,
        ("parallel", "arbitrary"),
        in_specs=[block, *map(_constant, params), *lanes],
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct((batch, *shape), F32) for shape in shapes],
        scratch_shapes=[pltpu.VMEM(shape, F32) for shape in (narrow, narrow, wide)],
    )
    slots, outputs, peak, total = gather(x, *params, *valid)
    answer = _call(
        plan,
        options,
        _answer,
        mask,
        grid,
        ("parallel", "parallel"),
        in_specs=[block, _constant(params[0]), specs[1], *lanes],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    return answer(x, params[0], outputs, *valid), (slots, outputs, peak, total)


def backward(
    options: Options,
    dout: Array,
    kept: tuple[Array, ...],
    x: Array,
    phi: Array,
    *experts: Array,
    mask: Array | None,
) -> tuple[Array, ...]:
    """Gradients of x, phi and the experts' weights, those of the parameters in float32."""
    plan = plan_of(x, phi, experts[0].shape[2])
    params = _params(plan, x.dtype, phi, *experts)
    valid = _valid(plan, mask)
    run = _backward_tiled if plan.tile else _backward_clips
    dx, *grads = run(plan, options, x, dout, params, valid, kept, mask)
    grads = [grad.sum(axis=0) for grad in grads]
    for i in (0, 4):
        grads[i] = grads[i].reshape(plan.clips, plan.slots, -1).sum(axis=0)
    return dx, *unpack(Packed(*grads), phi.shape[1], phi.shape[2])


def _backward_clips(
    plan: Plan,
    options: Options,
    x: Array,
    dout: Array,
    params: tuple[Array, ...],
    valid: list[Array],
    kept: tuple[Array, ...],
    mask: Array | None,
) -> tuple[Array, ...]:
    inner = plan.steps // plan.parts
    step = lambda i, j: (i * inner + j, 0, 0)  # noqa: E731
    block = pl.BlockSpec((plan.clips, plan.rows, x.shape[2]), step)
    return _call(
        plan,
        options,
        _backward_whole,
        mask,
        (plan.parts, inner),
        ("parallel", "arbitrary"),
        in_specs=[
            block,
            block,
            *map(_constant, params),
            *(pl.BlockSpec((1, *each.shape[1:]), step) for each in (*valid, *kept)),
        ],
        out_specs=[block, *_sums(params[:5])],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *_sum_shapes(plan, params[:5])],
    )(x, dout, *params, *valid, *kept)


def _sums(params: tuple[Array, ...]) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((1, *each.shape), lambda i, *_: (i, 0, 0)) for each in params]


def _sum_shapes(plan: Plan, params: tuple[Array, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((plan.parts, *each.shape), F32) for each in params]


def _backward_tiled(
    plan: Plan,
    options: Options,
    x: Array,
    dout: Array,
    params: tuple[Array, ...],
    valid: list[Array],
    kept: tuple[Array, ...],
    mask: Array | None,
) -> tuple[Array, ...]:
    slots, outputs, peak, total = kept
    batch, tokens, dim = x.shape
    inner = batch // plan.parts
    grid = (plan.parts, inner, -(-tokens // plan.tile))
    block = pl.BlockSpec((1, plan.tile, dim), lambda i, j, k: (i * inner + j, k, 0))
    lanes = [pl.BlockSpec((1, 1, plan.tile), lambda i, j, k: (i * inner + j, 0, k)) for _ in valid]
    wide, narrow = (
        pl.BlockSpec((1, *shape), lambda i, j, k: (i * inner + j, 0, 0))
        for shape in ((plan.slots, dim), (plan.slots, 1))
    )
    semantics = ("parallel", "arbitrary", "arbitrary")
    shape = jax.ShapeDtypeStruct((batch, plan.slots, dim), F32)
    dslots, *grads = _call(
        plan,
        options,
        _gather_back,
        mask,
        grid,
        semantics,
        in_specs=[block, block, *map(_constant, params), *lanes, wide],
        out_specs=[wide, *_sums(params[1:5])],
        out_shape=[shape, *_sum_shapes(plan, params[1:5])],
        scratch_shapes=[pltpu.VMEM((plan.slots, dim), F32)],
    )(x, dout, *params, *valid, slots)
    dx, dphi = _call(
        plan,
        options,
        _answer_back,
        mask,
        grid,
        semantics,
        in_specs=[
            block,
            block,
            _constant(params[0]),
            wide,
            wide,
            wide,
            narrow,
            narrow,
            *lanes,
        ],
        out_specs=[block, *_sums(params[:1])],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *_sum_shapes(plan, params[:1])],
    )(x, dout, params[0], slots, outputs, dslots, peak, total, *valid)
    return dx, dphi, *grads
