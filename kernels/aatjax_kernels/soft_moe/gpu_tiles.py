"""Parts of the GPU kernels of the soft mixture: tiling, loads and stores, scores, the call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from aatjax_kernels import triton
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import F32, LANES, LOW, dot
from aatjax_kernels.pallas import pl
from aatjax_kernels.soft_moe.reference import NORM_EPS

KEPT_SLOTS = 32
"""Up to this many slots the scores are kept for the second pass and the backward pass."""

UNROLLED = 3
"""Chunks of the width up to which a program has no loop over them."""


class GpuMixtureTiling(NamedTuple):
    """How a shape is tiled.

    Attributes:
        batch, tokens, dim, slots: the shape.
        padded: slots rounded up to a power of two.
        chunk: columns of the width that are processed at a time.
        group: chunks that one program sums.
        rows: tokens per block.
        blocks: blocks of tokens per program.
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
    def keep(self) -> bool:
        """Whether the scores are kept."""
        return self.slots <= KEPT_SLOTS

    def slice_chunk(self, chunk: Any) -> Any:
        """Return the columns of a chunk of the width."""
        return pl.ds(chunk * self.chunk, self.chunk)

    def slice_block(self, block: Any) -> tuple[Any, Array]:
        """Return the rows of a block of tokens, and the mask of those inside the clip."""
        start = block * self.rows
        return pl.ds(start, self.rows), start + jnp.arange(self.rows) < self.tokens

    def over_chunks(self, step: Any, first: Any) -> Any:
        """Fold `step(chunk, carry)` over the width; many chunks in a loop, for fewer registers."""
        count = self.dim // self.chunk
        if count > UNROLLED:
            return lax.fori_loop(0, count, step, first)
        return functools.reduce(lambda carry, chunk: step(chunk, carry), range(count), first)

    def store_slots(self, ref: Any, columns: Any, values: Array) -> None:
        """Store the rows of the real slots."""
        real = jnp.arange(self.padded) < self.slots
        triton.store(ref.at[pl.ds(0, self.padded), columns], values, mask=real[:, None])

    def compute_lengths(self, x: Any, rows: Any, inside: Array) -> Array:
        """Return the reciprocal lengths of a block of tokens."""

        def step(chunk: Any, square: Array) -> Array:
            tokens = load_tile(x, rows, self.slice_chunk(chunk), inside).astype(F32)
            return square + jnp.sum(tokens * tokens, axis=1)

        return lax.rsqrt(self.over_chunks(step, jnp.zeros((self.rows,), F32)) + NORM_EPS)

    def compute_scores(
        self, x: Any, phi: Any, rows: Any, inside: Array
    ) -> tuple[Array, Array | None]:
        """Return scores of a block [tokens, slots], and the tokens' reciprocal lengths if used."""

        def step(chunk: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            scores, square = carry
            tokens = load_tile(x, rows, self.slice_chunk(chunk), inside)
            if self.normalize:
                square += jnp.sum(tokens.astype(F32) * tokens.astype(F32), axis=1)
            return scores + dot(tokens, phi[:, self.slice_chunk(chunk)], LANES), square

        first = (jnp.zeros((self.rows, self.padded), F32), jnp.zeros((self.rows,), F32))
        scores, square = self.over_chunks(step, first)
        if not self.normalize:
            return scores, None
        length = lax.rsqrt(square + NORM_EPS)
        return scores * length[:, None], length

    def compute_combine(self, scores: Array, valid: Array) -> Array:
        """Return combine weights [tokens, slots]: zero for padded slots and masked tokens."""
        real = jnp.arange(self.padded) < self.slots
        scores = jnp.where(real[None], scores, LOW)
        raw = jnp.exp(scores - jnp.max(scores, axis=1)[:, None])
        return jnp.where(valid[:, None], raw / jnp.sum(raw, axis=1)[:, None], 0.0)

    def flatten_phi(self, phi: Array, dtype: Any) -> Array:
        """Return phi as [padded slots, d]."""
        flat = phi.reshape(self.dim, -1).T.astype(dtype)
        return jnp.pad(flat, ((0, self.padded - self.slots), (0, 0)))

    def pad_slots(self, values: Array, fill: float = 0.0) -> Array:
        """Pad values [b, s, ...] to the padded slots."""
        more = [(0, 0)] * values.ndim
        more[1] = (0, self.padded - self.slots)
        return jnp.pad(values, more, constant_values=fill)

    def call(self, options: KernelOptions, kernel: Any, arguments: Any, results: Any) -> Any:
        """Run a kernel on (array, block) pairs, for (shape, block) results."""
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(self.batch, self.splits, self.groups),
            in_specs=[spec for _, spec in arguments],
            out_specs=[spec for _, spec in results],
            out_shape=[shape for shape, _ in results],
            compiler_params=triton.CompilerParams(
                num_warps=8, num_stages=2 if self.padded == 16 else 1
            ),
            interpret=options.interpret,
        )(*(array for array, _ in arguments))


def load_tile(ref: Any, rows: Any, columns: Any, inside: Array) -> Array:
    """Load rows of tokens; zeros outside the clip."""
    return triton.load(ref.at[rows, columns], mask=inside[:, None], other=0.0)


def store_tile(ref: Any, rows: Any, columns: Any, values: Array, inside: Array) -> None:
    """Store the rows inside the clip."""
    triton.store(ref.at[rows, columns], values, mask=inside[:, None])


def mask_tokens(mask_ref: Any, rows: Any, inside: Array) -> Array:
    """Return which rows are tokens inside the clip and the mask."""
    if mask_ref is None:
        return inside
    return inside & (triton.load(mask_ref.at[rows], mask=inside, other=0.0) > 0)


def per_clip(array: Any, skip: int = 1, rows: int = 0) -> tuple[Any, pl.BlockSpec]:
    """Pair an array [b, ...] with the block of one clip; with `skip=2` [b, splits, ...].

    A block of more `rows` than the array has must be masked where it is loaded and stored.
    """
    shape = array.shape[skip:]
    if rows:
        shape = (rows, *shape[1:])
    rest = (0,) * len(shape)
    if skip == 1:
        return array, pl.BlockSpec((None, *shape), lambda b, k, g: (b, *rest))
    return array, pl.BlockSpec((None, None, *shape), lambda b, k, g: (b, k, *rest))


def constant(array: Any) -> tuple[Any, pl.BlockSpec]:
    """Pair an array that all programs read with its block."""
    return array, pl.BlockSpec(array.shape, lambda b, k, g: (0,) * array.ndim)


def mask_argument(mask: Array | None, rows: int = 0) -> list[Any]:
    """Return the mask as an argument, or none."""
    return [] if mask is None else [per_clip(mask.astype(F32), rows=rows)]
