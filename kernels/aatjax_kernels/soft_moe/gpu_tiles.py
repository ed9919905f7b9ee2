"""What the GPU kernels of the soft mixture share: how a shape is cut, loads, scores, the call."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.matmul import F32, LANES, LOW, dot
from aatjax_kernels.soft_moe.packing import Options
from aatjax_kernels.soft_moe.reference import NORM_EPS

KEPT_SLOTS = 32
UNROLLED = 3
"""Chunks of the width that a program goes through without a loop."""


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


def load(ref: Any, rows: Any, columns: Any, inside: Array) -> Array:
    return triton.load(ref.at[rows, columns], mask=inside[:, None], other=0.0)


def columns(plan: Plan, chunk: Any) -> Any:
    return pl.ds(chunk * plan.chunk, plan.chunk)


def over_chunks(plan: Plan, step: Any, first: Any) -> Any:
    """Goes through the width; many chunks in a loop, whose loads do not fill the registers."""
    count = plan.dim // plan.chunk
    if count > UNROLLED:
        return lax.fori_loop(0, count, step, first)
    return functools.reduce(lambda carry, chunk: step(chunk, carry), range(count), first)


def inside(plan: Plan, block: Any) -> tuple[Any, Array]:
    """The rows of a block of tokens, and which of them are tokens."""
    start = block * plan.rows
    return pl.ds(start, plan.rows), start + jnp.arange(plan.rows) < plan.tokens


def score(plan: Plan, x: Any, phi: Any, rows: Any, inside: Array) -> tuple[Array, Array | None]:
    """Scores of a block, [tokens, slots], and the tokens' reciprocal lengths."""

    def step(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, square = carry
        tokens = load(x, rows, columns(plan, chunk), inside)
        if plan.normalize:
            square += jnp.sum(tokens.astype(F32) * tokens.astype(F32), axis=1)
        return scores + dot(tokens, phi[:, columns(plan, chunk)], LANES), square

    first = (jnp.zeros((plan.rows, plan.padded), F32), jnp.zeros((plan.rows,), F32))
    scores, square = over_chunks(plan, step, first)
    if not plan.normalize:
        return scores, None
    length = lax.rsqrt(square + NORM_EPS)
    return scores * length[:, None], length


def lengths(plan: Plan, x: Any, rows: Any, inside: Array) -> Array:
    def step(chunk: Any, square: Array) -> Array:
        tokens = load(x, rows, columns(plan, chunk), inside).astype(F32)
        return square + jnp.sum(tokens * tokens, axis=1)

    square = over_chunks(plan, step, jnp.zeros((plan.rows,), F32))
    return lax.rsqrt(square + NORM_EPS)


def store(ref: Any, rows: Any, columns: Any, values: Array, inside: Array) -> None:
    """Writes the rows that there are."""
    triton.store(ref.at[rows, columns], values, mask=inside[:, None])


def put(plan: Plan, ref: Any, columns: Any, sums: Array) -> None:
    """Writes sums of the real slots."""
    real = jnp.arange(plan.padded) < plan.slots
    triton.store(ref.at[pl.ds(0, plan.padded), columns], sums, mask=real[:, None])


def seen(valid: Any, rows: Any, inside: Array) -> Array:
    """Which rows are tokens that take part."""
    if valid is None:
        return inside
    return inside & (triton.load(valid.at[rows], mask=inside, other=0.0) > 0)


def read(plan: Plan, scores: Array, seen: Array) -> Array:
    """Combine weights [tokens, slots]: zero for padded slots and tokens that are not seen."""
    real = jnp.arange(plan.padded) < plan.slots
    scores = jnp.where(real[None], scores, LOW)
    raw = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
    return jnp.where(seen[:, None], raw / jnp.sum(raw, axis=1)[:, None], 0.0)


def clip(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One clip's part of an array [b, ...]."""
    return pl.BlockSpec((None, *shape), lambda b, k, g: (b, *(0 for _ in shape)))


def constant(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda b, k, g: (0,) * array.ndim)


def call(plan: Plan, options: Options, kernel: Any, arrays: Any, outputs: Any) -> Any:
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


def packed_phi(plan: Plan, phi: Array, dtype: Any) -> Array:
    """Phi as [padded slots, d]."""
    flat = phi.reshape(plan.dim, -1).T.astype(dtype)
    return jnp.pad(flat, ((0, plan.padded - plan.slots), (0, 0)))


def pad(plan: Plan, values: Array, fill: float = 0.0) -> Array:
    """Per-slot values [b, s, ...] with the slots padded."""
    more = [(0, 0)] * values.ndim
    more[1] = (0, plan.padded - plan.slots)
    return jnp.pad(values, more, constant_values=fill)


def valid(plan: Plan, mask: Array | None) -> list[Any]:
    return [] if mask is None else [(mask.astype(F32), clip((plan.tokens,)))]


def shaped(shape: tuple[int, ...], dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
